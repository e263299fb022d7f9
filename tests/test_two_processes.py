"""Two processes with different data hold the same masks and the same weights, at every step of every method.

One pair of processes runs all methods and writes down what it saw; the tests read that.
"""

import contextlib
import functools
import hashlib
import json
import warnings
from datetime import timedelta

import pytest
import torch
from torch import nn

from sparse_optim import (
    Bernoulli,
    ChildTuningAdamW,
    DPSAdamW,
    GradDropAdamW,
    GradualUnfreezing,
    MaskedAdamW,
    Schedule,
    SecondOrderAdamW,
    SignedGradient,
    SquaredGradient,
    TopK,
)
from sparse_optim.integrations.distributed import _hash as mask_hash
from sparse_optim.integrations.distributed import check_masks

RANKS = 2
STEPS = 10

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch.distributed was built without gloo",
)
pytestmark = [pytest.mark.filterwarnings("error"), needs_gloo]

METHODS = {
    "child_tuning_f": lambda p: ChildTuningAdamW(p, lr=0.02, variant="F", keep=0.4),
    "child_tuning_d": lambda p: ChildTuningAdamW(p, lr=0.02, variant="D", density=0.3, observe_steps=3),
    "child_tuning_d_release": lambda p: ChildTuningAdamW(
        p, lr=0.02, variant="D", density=0.3, observe_steps=3, fidelity="release"
    ),
    "dps_dense": lambda p: DPSAdamW(p, lr=0.02, variant="dense", density=0.6, update_steps=2),
    "dps_dense_release": lambda p: DPSAdamW(
        p, lr=0.02, variant="dense", density=0.6, update_steps=2, fidelity="release"
    ),
    "second_order": lambda p: SecondOrderAdamW(p, lr=0.02, density=0.1, observe_steps=3),
    "second_order_release": lambda p: SecondOrderAdamW(
        p, lr=0.02, density=0.1, observe_steps=3, fidelity="release"
    ),
    "grad_drop_layer": lambda p: GradDropAdamW(p, lr=0.02, keep=0.5, granularity="layer"),
    "grad_drop_layer_epoch": lambda p: GradDropAdamW(
        p, lr=0.02, keep=0.5, granularity="layer", refresh="epoch"
    ),
    "gradual_unfreezing": lambda p: MaskedAdamW(p, lr=0.02, policy=GradualUnfreezing()),
}
# their masks come from gradients, so that processes that share none must come to differ
FROM_GRADIENTS = ["child_tuning_d", "child_tuning_d_release", "dps_dense", "dps_dense_release"]
FROM_GRADIENTS += ["second_order", "second_order_release"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(11, 8)
        self.layer = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()) for _ in range(3)
        )
        self.classifier = nn.Linear(8, 3)

    def forward(self, tokens):
        hidden = self.embeddings(tokens)
        for layer in self.layer:
            hidden = hidden + layer(hidden)
        return self.classifier(hidden)


def digest(tensors):
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def train(name, rank, *, share):
    """Hashes of all masks and all weights after each step, and what makes the comparison worth something."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Net()) if share else Net()
    optimizer = METHODS[name](model.named_parameters())
    generator = torch.Generator().manual_seed(1000 + rank)
    rows = []
    for number in range(STEPS):
        if number % 3 == 0:
            optimizer.new_epoch()
        tokens = torch.randint(0, 11, (16,), generator=generator)
        labels = torch.randint(0, 3, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
        masks = [optimizer.mask(p) for p in model.parameters()]
        share_of_one = float(torch.cat([mask.flatten() for mask in masks]).double().mean())
        data = digest([tokens, labels])
        rows.append(
            {
                "masks": digest(masks),
                "weights": digest(model.parameters()),
                "data": data,
                "mean": share_of_one,
            }
        )
    return rows


def refused_curvature():
    p = nn.Parameter(torch.ones(3))
    optimizer = SecondOrderAdamW([p], observe_steps=1, curvature="hutchinson")
    try:
        optimizer.observe_curvature(p.square().sum())
    except RuntimeError as error:
        return str(error)
    return "not refused"


# gradients that are released: DistributedDataParallel leaves them alone, and ranks share the selected entries


class Half(nn.Module):
    """Its second layer is used where asked for."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(24, 30), nn.Linear(30, 30)
        self.head = nn.Linear(30, 2)

    def forward(self, x, use_second=True):
        hidden = self.first(x).relu()
        return self.head(hidden + self.second(hidden) if use_second else hidden)


RELEASED = {
    "squares": {"statistic": SquaredGradient()},
    "one layer unused on one rank": {"statistic": SquaredGradient(), "unused": True},
    "a scaler": {"statistic": SquaredGradient(), "scaler": True},
    "an infinity that is not selected": {"statistic": SquaredGradient(), "scaler": True, "elsewhere": True},
    "tied weights": {"statistic": SquaredGradient(), "tied": True},
    "signed": {"statistic": SignedGradient()},
}


def train_released(rank, release, *, statistic, unused=False, scaler=False, elsewhere=False, tied=False):
    """Three micro-batches a step; hashes of the weights, the selected entries, and the bytes of each step."""
    torch.manual_seed(rank)
    model = Half()
    if tied:
        model.second.bias = model.first.bias
    # DDP may have been told before what to leave alone, a buffer say
    model.register_buffer("steps", torch.zeros(1))
    ddp = nn.parallel.DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(model, ["steps"])
    optimizer = MaskedAdamW(
        [
            {"params": [(name, p) for name, p in model.named_parameters() if not name.startswith("head")]},
            {"params": list(model.head.named_parameters("head")), "masked": False},
        ],
        lr=0.02,
        policy=TopK(0.2, statistic=statistic, schedule=Schedule(observe=3, train=5)),
        max_grad_norm=0.05,
        release_gradients=release,
    )
    if release:
        optimizer.gradient_release.exclude_from_ddp(model)
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    scale = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=4, enabled=scaler)
    if scaler:
        optimizer.attach_scaler(scale)
    generator = torch.Generator().manual_seed(1000 + rank)
    rows = []
    for number in range(12):
        optimizer.zero_grad()
        for micro in range(3):
            with contextlib.nullcontext() if micro == 2 else parallel.no_sync():
                x = torch.randn(4, 24, generator=generator)
                use_second = not (unused and rank == 1 and number > 4)
                loss = parallel(x, use_second).square().mean()
                if scaler and rank == 1 and number in (1, 5):
                    if elsewhere:
                        chosen = optimizer.mask(model.first.weight).flatten()
                        where = int((~chosen).nonzero()[0])
                        loss = loss + (model.first.weight.view(-1)[where] * 3e38) * 3e38
                    else:
                        loss = loss * float("inf")
                scale.scale(loss / 3).backward()
        with counted() as elements:
            scale.step(optimizer)
        scale.update()
        masks = [optimizer.mask(p) for p in model.parameters()]
        kept = sum(
            p.grad.kept.values.numel()
            for p in model.parameters()
            if hasattr(p.grad, "kept") and p.grad.kept.values is not None
        )
        rows.append(
            {
                "weights": digest(model.parameters()),
                "masks": digest(masks),
                "bytes": sum(elements),
                "kept": kept,
            }
        )
    rows.append(scale.get_scale())
    return rows


@contextlib.contextmanager
def counted():
    """Bytes of everything that this process gives to a reduction."""
    found, reduce = [], torch.distributed.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        found.append(tensor.numel() * tensor.itemsize)
        return reduce(tensor, *args, **kwargs)

    torch.distributed.all_reduce = all_reduce
    try:
        yield found
    finally:
        torch.distributed.all_reduce = reduce


def refused_without_exclusion():
    torch.manual_seed(0)
    model = Half()
    optimizer = MaskedAdamW(
        model.named_parameters(), policy=TopK(0.2, schedule=Schedule(observe=1)), release_gradients=True
    )
    parallel = nn.parallel.DistributedDataParallel(model)
    texts = []
    try:
        optimizer.gradient_release.exclude_from_ddp(parallel)
    except TypeError as error:
        texts.append(str(error))
    try:
        for _ in range(2):
            optimizer.zero_grad()
            parallel(torch.ones(2, 24)).square().mean().backward()
            optimizer.step()
    except RuntimeError as error:
        texts.append(str(error))
    return texts


def unwrapped(rank):
    """Everything is masked, so that DDP would refuse the model: it stays as it is."""
    torch.manual_seed(0)
    model, seen = Half(), []
    policy = TopK(0.2, statistic=SignedGradient(), schedule=Schedule(observe=2, train=2))
    optimizer = MaskedAdamW(model.named_parameters(), lr=0.02, policy=policy, release_gradients=True)
    model.second.weight.requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.gradient_release.exclude_from_ddp(model)
    seen.append([str(warning.message) for warning in caught])
    try:
        optimizer.gradient_release.remove()
    except RuntimeError as error:
        seen.append(str(error))
    generator = torch.Generator().manual_seed(1000 + rank)
    hashes = []
    for number in range(10):
        if number != 7:
            # later than the exclusion, and in one step no gradient is there anywhere, nor is one dropped
            optimizer.zero_grad()
            model.second.weight.requires_grad_(True)
            # in one step on one rank only, in another with a value on one rank that is no number
            if number not in (1, 5) or rank == 0:
                loss = model(torch.randn(4, 24, generator=generator)).square().mean()
                (loss * (float("nan") if number == 0 and rank == 0 else 1)).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        hashes.append([digest(model.parameters()), len(caught)])
    seen.append(hashes)
    optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(3)))]})
    try:
        optimizer.step()
    except RuntimeError as error:
        seen.append(str(error))
    return seen


def lists_that_differ(rank):
    torch.manual_seed(0)
    model = Half()
    optimizer = MaskedAdamW(model.named_parameters(), policy=TopK(0.2 + 0.1 * rank), release_gradients=True)
    model(torch.ones(2, 24)).square().mean().backward()
    optimizer.observe()
    optimizer.select()
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.gradient_release.exclude_from_ddp(model)
    model(torch.ones(2, 24)).square().mean().backward()
    with pytest.raises(RuntimeError) as averaged:
        optimizer.step()
    with pytest.raises(RuntimeError) as clipped:
        nn.utils.clip_grad_value_([model.first.weight], 1.0, foreach=False)
    return [str(averaged.value), str(clipped.value)]


def checked(name, rank, *, share=True, **options):
    """What a comparison of masks says, after which step, and how often processes met for it."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Net()) if share else Net()
    optimizer = METHODS[name](model.named_parameters())
    for group in optimizer.param_groups:
        group.update(options)
    handle = check_masks(optimizer)
    generator = torch.Generator().manual_seed(1000 + rank)
    gathered, gather = [], torch.distributed.all_gather
    torch.distributed.all_gather = lambda *arguments: (
        gathered.append(arguments[1].nbytes),
        gather(*arguments),
    )
    try:
        for number in range(STEPS):
            if number % 3 == 0:
                optimizer.new_epoch()
            tokens, labels = torch.randint(0, 3, (2, 16), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(tokens), labels).backward()
            try:
                optimizer.step()
            except RuntimeError as error:
                handle.remove()
                return [number, str(error)]
    finally:
        torch.distributed.all_gather = gather
    return gathered


# how gradients may come to be averaged
ENGINES = {
    "ddp": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "accumulation": {},
}


def engine(how, rank, *, ddp, method):
    """Hashes of masks and weights after each step, with DDP and with gradients averaged by hand."""
    torch.manual_seed(0)
    model = Half()
    parallel = nn.parallel.DistributedDataParallel(model, **ENGINES[how]) if ddp else model
    optimizer = METHODS[method](model.named_parameters())
    if ddp:
        check_masks(optimizer)
    generator = torch.Generator().manual_seed(1000 + rank)
    rows = []
    for number in range(STEPS):
        optimizer.new_epoch()
        optimizer.zero_grad()
        use_second = how != "unused parameters" or rank == 0 or number % 3 == 0
        for micro in range(2 if how == "accumulation" else 1):
            syncs = micro == 1 or how != "accumulation" or not ddp
            with contextlib.nullcontext() if syncs else parallel.no_sync():
                x = torch.randn(4, 24, generator=generator)
                parallel(x, use_second).square().mean().backward()
        for p in model.parameters() if not ddp else ():
            p.grad = (torch.zeros_like(p) if p.grad is None else p.grad) / RANKS
            torch.distributed.all_reduce(p.grad)
        optimizer.step()
        rows.append([digest(map(optimizer.mask, model.parameters())), digest(model.parameters())])
    return rows


def zero(rank):
    """Hashes of weights with and without ZeroRedundancyOptimizer, and how it refuses what it would change."""
    with warnings.catch_warnings():
        # it uses what torch itself calls old
        warnings.simplefilter("ignore")
        from torch.distributed.optim import ZeroRedundancyOptimizer
    policy = TopK(0.3, scope="tensor", schedule=Schedule(observe=2, train=2))
    make = functools.partial(MaskedAdamW, policy=policy)
    runs = []
    for partitioned in (False, True):
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(Net())

        def build(params, partitioned=partitioned):
            return ZeroRedundancyOptimizer(params, make, lr=0.02) if partitioned else make(params, lr=0.02)

        optimizer = build(model.parameters())
        generator = torch.Generator().manual_seed(1000 + rank)
        weights = []
        for number in range(STEPS):
            tokens, labels = torch.randint(0, 3, (2, 16), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(tokens), labels).backward()
            optimizer.step()
            weights.append(digest(model.parameters()))
            if partitioned and number == 4:
                optimizer.consolidate_state_dict(to=0)
                saved = [optimizer.state_dict() if rank == 0 else None]
                torch.distributed.broadcast_object_list(saved)
                optimizer = build(model.parameters())
                optimizer.load_state_dict(saved[0])
        runs.append(weights)
    refused = []
    for other in (TopK(0.3), Bernoulli(0.3)):
        with pytest.raises(ValueError) as error:
            ZeroRedundancyOptimizer(Net().parameters(), functools.partial(MaskedAdamW, policy=other), lr=0.1)
        refused.append(str(error.value))
    return [*runs, refused]


CHECKED = {
    "the same seed": ("child_tuning_f", {}),
    "gradients that are averaged": ("child_tuning_d", {}),
    "selections again and again": ("dps_dense", {}),
    "gradients of their own": ("child_tuning_d", {"share": False}),
    "a seed of their own": ("grad_drop_layer", {"seed": None}),
}


def work(rank, folder):
    """What one process does."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    try:
        seen = {
            name: {how: train(name, rank, share=how == "shared") for how in ("shared", "alone")}
            for name in METHODS
        }
        seen["curvature"] = refused_curvature()
        seen["released"] = {
            name: [train_released(rank, release, **case) for release in (False, True)]
            for name, case in RELEASED.items()
        }
        seen["refused"] = refused_without_exclusion()
        seen["unwrapped"] = unwrapped(rank)
        seen["lists"] = lists_that_differ(rank)
        seen["engines"] = {
            f"{how} {method}": [engine(how, rank, ddp=ddp, method=method) for ddp in (False, True)]
            for how in ENGINES
            for method in ("child_tuning_f", "dps_dense", "second_order")
        }
        seen["zero"] = zero(rank)
        seen["checked"] = {
            how: checked(name, rank, **({"seed": rank} if "seed" in options else options))
            for how, (name, options) in CHECKED.items()
        }
        with open(f"{folder}/rank_{rank}.json", "w") as file:
            json.dump(seen, file)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=RANKS)
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(RANKS)]


def column(ranks, name, how, key):
    return [[row[key] for row in rank[name][how]] for rank in ranks]


@pytest.mark.parametrize("name", METHODS)
def test_processes_hold_the_same_masks_and_weights_at_every_step(ranks, name):
    first, second = column(ranks, name, "shared", "data")
    assert all(a != b for a, b in zip(first, second, strict=True))
    for key in ("masks", "weights"):
        first, second = column(ranks, name, "shared", key)
        assert len(first) == STEPS
        assert first == second, key
    # something was trained, something was left alone, and weights moved
    means, _ = column(ranks, name, "shared", "mean")
    assert any(0.0 < mean < 1.0 for mean in means)
    weights, _ = column(ranks, name, "shared", "weights")
    assert len(set(weights)) > STEPS / 2


@pytest.mark.parametrize("name", METHODS)
def test_processes_that_do_not_share_gradients_come_to_differ(ranks, name):
    """The test above can fail: without the reduction it does."""
    first, second = column(ranks, name, "alone", "weights")
    assert first[-1] != second[-1]
    first, second = column(ranks, name, "alone", "masks")
    assert (first != second) == (name in FROM_GRADIENTS)


def test_curvature_is_refused_where_processes_would_estimate_different_ones(ranks):
    for rank in ranks:
        assert (
            "works in one process, got 2 ranks; use SecondOrderAdamW without curvature" in rank["curvature"]
        )


@pytest.mark.parametrize("name", [name for name in RELEASED if name != "signed"])
def test_released_gradients_train_as_whole_ones_do_under_ddp(ranks, name):
    for rank in ranks:
        whole, released = rank["released"][name]
        for key in ("weights", "masks"):
            assert [row[key] for row in released[:-1]] == [row[key] for row in whole[:-1]], key
        assert released[-1] == whole[-1]
        assert len({row["weights"] for row in released[:-1]}) > 5


def test_signed_sums_are_shared_once_and_select_the_same_entries_on_every_rank(ranks):
    first, second = (rank["released"]["signed"][1] for rank in ranks)
    assert [row["masks"] for row in first[:-1]] == [row["masks"] for row in second[:-1]]
    assert [row["weights"] for row in first[:-1]] == [row["weights"] for row in second[:-1]]
    # flags while observing; the statistics in the step that selects
    assert [row["bytes"] < 1 << 10 for row in first[:3]] == [True, True, False]


@pytest.mark.parametrize("name", RELEASED)
def test_ranks_exchange_four_bytes_an_entry(ranks, name):
    for rank in ranks:
        rows = [row for row in rank["released"][name][1][:-1] if row["kept"]]
        assert rows
        for row in rows:
            assert 4 * row["kept"] <= row["bytes"] <= 4 * row["kept"] + (64 << 10)
            # far less than the gradients
            assert row["bytes"] < 4 * (24 * 30 + 30 * 31) / 2


def test_gradients_that_ddp_would_reduce_are_not_released(ranks):
    for wrapped, reduced in (rank["refused"] for rank in ranks):
        assert "got a DistributedDataParallel; call exclude_from_ddp(model) and then" in wrapped
        assert "optimizer.gradient_release.exclude_from_ddp(model) before the model is wrapped" in reduced


def test_a_model_whose_weights_are_all_excluded_stays_unwrapped(ranks):
    first, second = (rank["unwrapped"] for rank in ranks)
    for warned, removed, hashes, later in (first, second):
        assert len(warned) == 1 and "leave it unwrapped: step() averages the gradients" in warned[0]
        assert "remove() must come before exclude_from_ddp()" in removed
        assert "must know every masked parameter, got 'more' later" in later
        # four of the ten steps train
        assert len({weights for weights, _ in hashes}) == 5
    # the second step selects, and every rank hears of the value that was no number on one
    assert first[2] == second[2]
    assert [count for _, count in first[2]][:3] == [0, 1, 0]


def test_ranks_that_hold_other_lists_are_told(ranks):
    for averaged, clipped in (rank["lists"] for rank in ranks):
        assert "ranks must select the same entries, got" in averaged
        assert "ranks average it in step(), which clips with max_grad_norm=" in clipped


@pytest.mark.parametrize("how", ENGINES)
def test_every_way_in_which_ddp_averages_trains_as_averaging_by_hand_does(ranks, how):
    others = []
    for rank in ranks:
        runs = {name: run for name, run in rank["engines"].items() if name.startswith(how + " ")}
        assert len(runs) == 3
        for by_hand, ddp in runs.values():
            assert ddp == by_hand
            assert len({weights for _, weights in ddp}) > STEPS / 2
        others.append(runs)
    assert others[0] == others[1]


def test_zero_redundancy_optimizer_trains_what_is_selected_tensor_by_tensor_and_refuses_the_rest(ranks):
    for rank in ranks:
        plain, partitioned, refused = rank["zero"]
        assert partitioned == plain
        # two steps observe, two train
        assert len(set(plain)) == 5
        for text in refused:
            assert text.startswith("under ZeroRedundancyOptimizer") and "use fully_shard() or Dist" in text


def test_masks_are_compared_after_the_first_step_and_after_each_selection(ranks):
    bytes_of_all = 8 * len(list(Net().parameters()))
    for rank in ranks:
        assert rank["checked"]["the same seed"] == [bytes_of_all] * 4
        # in the first step, the third, which selects, and each of the epochs that begin every third step
        assert rank["checked"]["gradients that are averaged"] == [bytes_of_all] * 5
        assert len(rank["checked"]["selections again and again"]) > 3


def test_the_first_mask_that_differs_is_named_with_its_rank(ranks):
    name = next(name for name, _ in Net().named_parameters())
    for rank in ranks:
        step, text = rank["checked"]["gradients of their own"]
        # the third step selects
        assert step == 2
        assert f"got another of {name!r} on rank 1 than on rank 0; give all the same seed" in text
        step, text = rank["checked"]["a seed of their own"]
        assert step == 0 and "on rank 1" in text


def test_masks_that_differ_in_one_entry_have_other_hashes():
    masks = torch.eye(3000, dtype=torch.bool)
    assert len({int(mask_hash(mask)) for mask in masks}) == 3000
    assert int(mask_hash(masks[0])) == int(mask_hash(masks[0].clone()))
