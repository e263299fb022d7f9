"""The benchmarks measure what they say, refuse to time what is wrong, and fill the README."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gates, harness, large, memory, operands, peers, report, scaling, step, topk
from sparse_optim import Bernoulli, Schedule, SignedGradient, SquaredGradient, TopK, backends, estimate_memory
from sparse_optim.backends import reference

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[1]
ONE_SHAPE: operands.Shapes = [(64, 33), (7,)]
RELEASED = "TopK, indexed, 1 %, released, {}"


def options(**changes: object) -> harness.Options:
    asked = harness.Options(CPU, None, True, "", ("reference",), 0.01, None)
    return replace(asked, **changes)


# end to end


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # a process of its own: the warnings of other libraries are not ours to turn into errors
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}", "--quick", "--device", "cpu", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )


SAMPLES = {
    "step": ("dense", ["plain copy", "torch fused", "adamw_ dense, reference"]),
    "topk": ("global", ["plain copy", "torch.topk", "select, global, reference"]),
    "scaling": ("indexed", ["plain copy", "torch fused", "MaskedAdamW TopK indexed, 1%, reference"]),
    "memory": (
        # not those of the Llama, whose names end otherwise
        ", float32",
        ["torch.optim.AdamW fused, float32", "TopK, indexed, 1 %, float32", RELEASED.format("float32")],
    ),
}


@pytest.mark.parametrize("script", SAMPLES)
def test_a_quick_run_prints_and_keeps_its_rows(script: str, tmp_path: Path) -> None:
    only, expected = SAMPLES[script]
    path = tmp_path / "tiny.csv"
    command = ["--backend", "reference", "--rows", only, "--output", str(path)]
    done = run(script, *command)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["row"]: row for row in harness.read_csv(path)}
    for name in expected:
        assert name in done.stdout
        assert rows[name]["ms"] or rows[name]["states"], rows[name]["note"]
        assert rows[name]["command"].startswith(f"python -m benchmarks.{script} --quick")
    assert not [row["note"] for row in rows.values() if row["note"].startswith("wrong")]


def test_a_backend_that_is_not_there_is_one_line() -> None:
    done = run("memory", "--backend", "quantum", "--rows", "policy=None")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[0] == "backend quantum is not measured: there is no such backend"
    assert "policy=None" not in done.stdout


# the gates

KERNELS = {
    "dense": step.adamw(),
    "seeded": step.adamw("zero_grad", step.by_draws),
    "seeded, frozen": step.adamw("frozen", step.by_draws, lambda o: o.drawn_masks(step.KEEP)),
    "bits": step.adamw("frozen", step.by_bits, lambda o: o.masks(step.DENSITY)),
    "threshold": step.adamw("frozen", step.by_scores, lambda o: o.masks(step.DENSITY)),
    "observing": step.adamw(observes=True),
    "two launches": step.two_launches,
    "indexed": step.indexed(0.1),
}


def altered(**verbs: object) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(reference), **verbs})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_gate_of_kernels_passes_the_reference_and_stops_a_wrong_one(
    name: str, dtype: torch.dtype
) -> None:
    setup = KERNELS[name]
    assert gates.wrong_kernel(setup, reference, CPU, dtype, torch.float32) is None

    def heavier(verb):
        return lambda *args, **kwargs: verb(*args, **{**kwargs, "eps": 1e-3})

    wrong = altered(adamw_=heavier(reference.adamw_), adamw_indexed_=heavier(reference.adamw_indexed_))
    problem = gates.wrong_kernel(setup, wrong, CPU, dtype, torch.float32)
    assert problem is not None
    assert problem.startswith("error")


@pytest.mark.parametrize("name", ["seeded, frozen", "bits", "threshold", "indexed"])
def test_the_gate_of_kernels_stops_one_that_moves_other_entries(name: str) -> None:
    def leaks(verb):
        def leaking(params, *args, **kwargs):
            verb(params, *args, **kwargs)
            for p in params:
                # one unit in the last place, everywhere
                p.view(torch.int32).add_(1)

        return leaking

    wrong = altered(adamw_=leaks(reference.adamw_), adamw_indexed_=leaks(reference.adamw_indexed_))
    problem = gates.wrong_kernel(KERNELS[name], wrong, CPU)
    assert problem == "entries that are not selected moved"


def test_the_gate_of_kernels_stops_a_statistic_in_the_wrong_last_bit() -> None:
    def off(statistics, *args, **kwargs):
        reference.accumulate_(statistics, *args, **kwargs)
        statistics[-1].view(torch.int32).view(-1)[-1] += 1

    problem = gates.wrong_kernel(step.two_launches, altered(accumulate_=off), CPU)
    assert problem is not None
    assert "bit for bit" in problem


OPTIMIZERS = {
    "dense": (None, "frozen"),
    "bernoulli": (Bernoulli(0.3), "zero_grad"),
    "bits": (TopK(0.3, schedule=Schedule(observe=1)), "zero_grad"),
    "indexed": (TopK(0.1, schedule=Schedule(observe=1)), "frozen"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_gate_of_optimizers_passes_the_reference_and_stops_a_wrong_step(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, unselected = OPTIMIZERS[name]
    assert gates.wrong_optimizer(policy, unselected, "reference", CPU) is None

    class Heavier(gates.MaskedAdamW):
        def __init__(self, params, lr, **given):
            super().__init__(params, lr, eps=1e-3, **given)

    monkeypatch.setattr(gates, "MaskedAdamW", Heavier)
    problem = gates.wrong_optimizer(policy, unselected, "reference", CPU)
    assert problem is not None
    assert problem.startswith("error")


def test_a_backward_pass_makes_the_given_gradients_one_at_a_time() -> None:
    given = operands.Operands([(50, 20)] * 4, CPU)
    params, grads = given.params, given.grads
    for p in params:
        p.grad = None
    gates.backward(params, grads)
    for p, grad in zip(params, grads, strict=True):
        assert torch.equal(p.grad, grad)
        assert p.grad is not grad
        p.grad = None
    order: list[int] = []
    for number, p in enumerate(params):

        def drop(p: torch.Tensor, number: int = number) -> None:
            order.append(number)
            p.grad = None

        p.register_post_accumulate_grad_hook(drop)
    kept, most = memory._balance(lambda: gates.backward(params, grads), CPU)
    assert order == [3, 2, 1, 0]
    assert kept == 0
    assert 4000 <= most < 4100


RELEASES = {
    "signed": (SignedGradient(), {}),
    "squares": (SquaredGradient(), {}),
    "bfloat16 statistic": (SignedGradient(), {"statistic_dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("name", RELEASES)
def test_the_gate_of_optimizers_sees_what_is_wrong_with_released_gradients(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistic, given = RELEASES[name]
    policy = TopK(0.1, statistic, schedule=Schedule(observe=1))
    released = {"release_gradients": True, **given}
    assert gates.wrong_optimizer(policy, "frozen", "reference", CPU, **released) is None

    def negated(values, grads, indices):
        gather(values, [-grad for grad in grads], indices)

    gather = reference.gather_
    monkeypatch.setattr(reference, "gather_", negated)
    problem = gates.wrong_optimizer(policy, "frozen", "reference", CPU, **released)
    assert problem is not None
    assert problem.startswith("error")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_gate_of_packages_passes_adamw_and_stops_another_rule(dtype: torch.dtype) -> None:
    def adamw(**options):
        return lambda params: torch.optim.AdamW(params, lr=1.0, foreach=False, **options)

    assert gates.wrong_adamw(adamw(), CPU, dtype) is None
    problem = gates.wrong_adamw(adamw(eps=1e-3), CPU, dtype)
    assert problem is not None
    assert problem.startswith("error")
    if dtype == torch.float32:
        # a peer whose decay is off unless it is asked for
        assert gates.wrong_adamw(adamw(weight_decay=0.0), CPU, dtype) is not None


def test_packages_that_keep_whole_moments_pass_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    def another_rule(params):
        return torch.optim.RMSprop(params)

    def all_wrong(dtype):
        return dict.fromkeys((*peers.WHOLE, "quantised"), ("torch", "torch", 28.0, another_rule))

    assert set(peers.WHOLE) <= set(peers.packages(torch.float32))
    monkeypatch.setattr(peers, "packages", all_wrong)
    found = {row.name: row.check() for row in peers.package_rows(operands.Operands(ONE_SHAPE, CPU))}
    assert {name for name, problem in found.items() if problem} == set(peers.WHOLE)
    held = {
        method.name: method.check() for method in memory.methods(options()) if method.build is another_rule
    }
    assert {name for name, problem in held.items() if problem} == {
        f"{name}, {dtype}" for name in peers.WHOLE for dtype in ("float32", "bfloat16")
    }


@pytest.mark.parametrize("package", ["bitsandbytes", "deepspeed"])
def test_a_peer_that_is_installed_passes_its_gate(package: str) -> None:
    rows = peers.packages(torch.float32)
    for name in peers.WHOLE:
        named, module, _, build = rows[name]
        if named == package:
            reason = peers.why_missing(module)
            if reason:
                pytest.skip(f"{package}: {reason}")
            assert gates.wrong_adamw(build, CPU, torch.float32) is None


def test_a_peer_for_the_cpu_says_so_elsewhere() -> None:
    build = peers.packages(torch.float32)["deepspeed CPUAdam"][-1]
    elsewhere = torch.nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(harness.UnavailableError, match="on a CPU only"):
        build([elsewhere])


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_gate_of_selections_passes_the_reference_and_stops_a_wrong_set(
    scope: str, dtype: torch.dtype
) -> None:
    for as_bits, counted in ((False, False), (True, True)):
        found = topk.wrong_selection(reference, CPU, dtype, scope, as_bits=as_bits, counted=counted)
        assert found is None

    def last_ties_first(scores, *, cuts, **given):
        # as many entries, other ones
        flipped = [score.flip(tuple(range(score.dim()))) for score in scores]
        return reference.compact(flipped, cuts=cuts, **given)

    wrong = altered(compact=last_ties_first)
    problem = topk.wrong_selection(wrong, CPU, dtype, scope, as_bits=False, counted=False)
    assert problem is not None
    assert "stable sort" in problem


def test_the_gate_of_selections_stops_a_first_round_that_counts_otherwise() -> None:
    def off(*args, first_counts=None, **kwargs):
        reference.accumulate_(*args, first_counts=first_counts, **kwargs)
        first_counts[0, 0] += 1

    wrong = altered(accumulate_=off)
    problem = topk.wrong_selection(wrong, CPU, torch.float32, "global", as_bits=False, counted=True)
    assert problem == "accumulate_ counts otherwise than the reference's histogram"


def test_wrong_rows_are_not_timed_and_end_the_run_with_an_error() -> None:
    rows = [harness.Row("kernel", 8, lambda: pytest.fail("was set up"), check=lambda: "it is wrong")]
    records = harness.measure("step", "one", rows, parameters=1, anchor="", device=CPU, seconds=0.01)
    assert records[0].ms is None
    assert records[0].note == "wrong, not measured: it is wrong"
    with pytest.raises(SystemExit, match="wrong or failed, not measured: kernel"):
        harness.finish(records)


def test_a_backend_that_raises_ends_the_run_with_an_error_and_leaves_the_other_rows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [
        harness.Row(harness.COPY, 8, lambda: lambda: None),
        harness.Row("kernel", 8, lambda: undefined_name, backend="native"),  # noqa: F821
    ]
    records = harness.measure("step", "one", rows, parameters=1, anchor="", device=CPU, seconds=0.01)
    assert records[0].ms is not None
    assert records[1].note.startswith("failed, not measured: NameError")
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="kernel"):
        harness.finish(records)


# rows


def test_a_row_that_cannot_run_stays_visible_with_its_reason() -> None:
    def make() -> harness.Step:
        raise RuntimeError("needs a machine that is not here")

    rows = [harness.Row(harness.COPY, 8, lambda: lambda: None), harness.Row("kernel", 8, make)]
    record = harness.measure(
        "step", "one", rows, parameters=1, anchor=harness.COPY, device=CPU, seconds=0.01
    )[1]
    assert record.ms is None
    assert record.note == "RuntimeError: needs a machine that is not here"


def test_a_package_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"no_such_package"}
    real = peers.packages

    def all_absent(dtype):
        return {name: ("nobody", *absent, *row[2:]) for name, row in real(dtype).items()}

    monkeypatch.setattr(peers, "packages", all_absent)
    rows = peers.package_rows(operands.Operands(ONE_SHAPE, CPU))
    assert [row.name for row in rows] == ["nobody"]
    record = harness.measure("step", "one", rows, parameters=1, anchor="", device=CPU, seconds=0.01)[0]
    assert record.note == "not installed"
    names = [method.name for method in memory.methods(options())]
    assert names.count("nobody") == 1


def test_bars_compare_with_the_fastest_peer_and_with_the_copy() -> None:
    def timing(name: str, seconds: float, scratch: int | None = None) -> harness._Timing:
        row = harness.Row(name, 8.0, lambda: lambda: None)
        return harness._Timing(row, lambda: None, None, [seconds] * 3, scratch)

    all_timings = [
        timing(harness.COPY, 1.0),
        timing("slow", 8.0),
        timing("quick", 4.0),
        timing("ours", 2.0, 2**19),
    ]
    results = harness._Results({one.row.name: one for one in all_timings})
    assert harness.Faster(2.0, ("slow", "quick")).judge("ours", results) == ("2 x as fast", True)
    assert harness.Faster(2.1, ("slow", "quick")).judge("ours", results) == ("2 x as fast", False)
    assert harness.Faster(1 / 1.5, ("quick",)).judge("slow", results) == ("2 x the time", False)
    assert harness.Faster(1.0, ("not there",)).judge("ours", results) is None
    assert harness.OfCopy(50).judge("ours", results) == ("50 %", True)
    assert harness.OfCopy(51).judge("ours", results) == ("50 %", False)
    assert harness.ScratchBelow(1.0).judge("ours", results) == ("0.5 MiB", True)
    assert harness.ScratchBelow(1.0).judge("quick", results) is None


def test_rows_run_on_their_number_of_threads_and_leave_it_as_it_was() -> None:
    before = torch.get_num_threads()
    seen: dict[str, set[int]] = {"one": set(), "three": set(), "whatever": set()}

    def row(name: str, threads: int) -> harness.Row:
        def note() -> None:
            seen[name].add(torch.get_num_threads())

        return harness.Row(name, 8, lambda: (note, note), threads=threads)

    records = harness.measure(
        "scaling", "one", [row("one", 1), row("three", 3), row("whatever", 0)],
        parameters=1, anchor="", device=CPU, seconds=0.01,
    )  # fmt: skip
    assert seen == {"one": {1}, "three": {3}, "whatever": {before}}
    assert [record.threads for record in records] == [1, 3, 0]
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), harness.on_threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before


def test_the_number_of_threads_of_a_row_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "machine.csv"
    records = [harness.Record("scaling", "a", "row", 1, "float32", threads=threads) for threads in (0, 3)]
    harness.keep("scaling", records, options(output=path), ["a"])
    assert [row["threads"] for row in harness.read_csv(path)] == [str(torch.get_num_threads()), "3"]


def test_a_short_step_is_called_often_and_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = []

    def step() -> None:
        clock.append(0.001)

    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: sum(clock)))
    often = harness.Row("often", 8, lambda: step, calls=25)
    record = harness.measure("step", "one", [often], parameters=1, anchor="", device=CPU, seconds=0.11)[0]
    assert record.ms == pytest.approx(1.0)
    # as many rounds as there is time for, and two measurements during set-up
    assert record.samples == 4
    assert len(clock) == 25 * (4 + 2)


def test_each_number_of_threads_is_a_row_and_all_share_what_is_set_up() -> None:
    made = []

    def make() -> harness.Step:
        made.append(0)
        return lambda: None

    row = harness.Row("kernel", 8, make, check=lambda: "wrong", backend="native")
    rows = scaling.on_each(row, scaling.MANY, [1, 2, 4], lambda: [torch.ones(3)])
    assert [(one.name, one.threads) for one in rows] == [
        ("kernel, 1 thread", 1), ("kernel, 2 threads", 2), ("kernel, 4 threads", 4),
    ]  # fmt: skip
    for one in rows:
        one.make()
    assert len(made) == 1
    # one thread passes the row's own gate, the others give what it gives
    assert [one.check() for one in rows] == ["wrong", None, None]
    assert [one.bars for one in rows] == [(), (harness.Faster(1.2, ("kernel, 1 thread",)),), ()]
    assert rows[2].peers == ("kernel, 1 thread", "torch fused, 4 threads")


def test_the_gate_of_threads_stops_results_that_depend_on_their_number() -> None:
    def by_threads() -> list[torch.Tensor]:
        return [torch.full((3,), 1 + (torch.get_num_threads() - 1) * 2**-23)]

    assert scaling.depends_on_threads(lambda: [torch.ones(3)], 2) is None
    assert scaling.depends_on_threads(by_threads, 2) == "2 threads give other bits than one"
    assert scaling.depends_on_threads(lambda: [torch.ones(3)] * torch.get_num_threads(), 2) is not None


@pytest.mark.parametrize("name", scaling.methods(CPU, scaling.ONE))
def test_the_gate_of_threads_compares_weights_and_moments(name: str) -> None:
    policy, unselected, _, _ = scaling.methods(CPU, scaling.ONE)[name]
    values = scaling.three_steps(policy, unselected, "reference")
    weights, rest = values[: len(scaling.SHARED)], values[len(scaling.SHARED) :]
    start = operands.Operands(scaling.SHARED, CPU).weights
    assert not torch.equal(weights[0], start[0])
    # two moments for each weight, and more
    assert len([value for value in rest if value.is_floating_point() and value.numel() > 1]) >= 2 * len(
        weights
    )
    assert scaling.depends_on_threads(lambda: scaling.three_steps(policy, unselected, "reference"), 2) is None


def test_the_gate_of_threads_compares_the_lists_of_a_selection() -> None:
    lists = scaling.one_selection("reference")
    n = sum(torch.Size(shape).numel() for shape in scaling.SHARED)
    assert sum(map(len, lists)) == int(topk.DENSITY * n)
    assert scaling.depends_on_threads(lambda: scaling.one_selection("reference"), 2) is None


def test_sizes_go_up_by_half_decades_to_what_was_asked_for() -> None:
    assert scaling.sizes(options(numel=None))[::2] == [10**4, 10**5, 10**6, 10**7, 10**8]
    assert scaling.sizes(options(numel=10**5)) == [10_000, 31_623, 100_000]
    assert scaling.sizes(options(numel=5_000)) == [5_000]


def test_memory_counts_what_an_optimizer_holds() -> None:
    held = {
        method.name: memory.held(method, ONE_SHAPE, CPU)
        for method in memory.methods(options())
        if method.name in ("torch.optim.AdamW fused, float32", "TopK, indexed, 10 %, bfloat16")
    }
    dense, listed = held.values()
    assert (dense.weights, dense.gradients, dense.states, dense.masks) == (4, 4, 8, 0)
    n = sum(torch.Size(shape).numel() for shape in ONE_SHAPE)
    share = int(0.1 * n) / n
    assert (listed.weights, listed.gradients) == (2, 2)
    assert listed.states == pytest.approx(12 * share)
    assert listed.masks == pytest.approx(4 * share)
    # the float32 statistic comes and goes
    assert listed.peak >= 2 + 2 + 4


def released_row(dtype: str, backend: str = "reference") -> memory.Method:
    reason = backends.why_not(backend, CPU)
    if reason:
        pytest.skip(f"{backend}: {reason}")
    asked = options(backends=(backend,))
    return next(method for method in memory.methods(asked) if method.name == RELEASED.format(dtype))


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_released_row_holds_selected_entries_and_meets_its_bars(dtype: str, backend: str) -> None:
    size = 4 if dtype == "float32" else 2
    record = memory.held(released_row(dtype, backend), ONE_SHAPE, CPU)
    assert not record.note
    n = record.parameters
    share = int(0.01 * n) / n
    assert record.weights == size
    assert record.gradients == pytest.approx(4 * share)
    assert record.states == pytest.approx((8 if size == 4 else 12) * share)
    assert record.masks == pytest.approx(4 * share)
    total = record.weights + record.gradients + record.states + record.masks
    assert total <= (2.22 if size == 2 else 4.17)
    assert record.ideal_bytes == pytest.approx((4.16 if size == 4 else 2.2) * n)
    # one layer's gradient, and while observing all of a float32 statistic besides
    layer = size * 64 * 33 / n
    assert record.peak >= size + 4 + layer
    words = [word for _, _, word in harness.verdicts(asdict(record))]
    assert words[:-1] == ["met"] * (size == 2)
    if backend == "native":
        assert record.step_peak == pytest.approx(total + layer, abs=0.01)
        assert words[-1] == "met"
    else:
        # plain PyTorch gathers entries through a list of int64
        assert total + layer - 0.01 <= record.step_peak <= total + layer + 16 * share


@pytest.mark.parametrize("until_step", [False, True], ids=["kept for good", "kept until the step"])
def test_an_optimizer_that_keeps_dense_gradients_in_secret_is_seen(until_step: bool) -> None:
    method = released_row("bfloat16")
    kept: dict[int, torch.Tensor] = {}

    def leaking(params):
        optimizer = method.build(params)
        for number, p in enumerate(params):
            p.register_hook(lambda grad, number=number: kept.__setitem__(number, grad))
        if until_step:
            optimizer.register_step_post_hook(lambda *_: kept.clear())
        return optimizer

    # several layers: the largest is far from all
    shapes: operands.Shapes = [(64, 33)] * 4
    honest = memory.held(method, shapes, CPU)
    record = memory.held(replace(method, build=leaking), shapes, CPU)
    words = [word for _, _, word in harness.verdicts(asdict(record))]
    if until_step:
        assert record.states == honest.states
        # all four, and the copy that autograd makes of a gradient that somebody holds
        assert record.step_peak == pytest.approx(honest.step_peak + 2, abs=0.01)
        assert words == ["met", "missed"]
    else:
        assert record.states == pytest.approx(honest.states + 2, abs=0.01)
        assert words[0] == "missed"


def test_the_bytes_of_a_model_count_what_a_method_adds_and_hides() -> None:
    pytest.importorskip("transformers")
    found = {method.name: method for method in memory.model_methods(options())}

    def held(name: str) -> harness.Record:
        record = memory.held_by_model(found[f"{name}, Llama in bfloat16"], CPU, tiny=True)
        assert not record.note
        return record

    dense, released = held("torch.optim.AdamW fused"), held("TopK, indexed, 10 %, released")
    assert dense.parameters == released.parameters
    assert (dense.weights, dense.gradients, dense.states, dense.masks) == (2, 2, 4, 0)
    share = int(0.1 * released.parameters) / released.parameters
    assert released.weights == 2
    assert released.gradients == pytest.approx(4 * share)
    assert released.states == pytest.approx(12 * share)

    def adding(model):
        model.extra = torch.nn.Parameter(torch.zeros(released.parameters, dtype=torch.bfloat16))
        hidden.append(torch.zeros(released.parameters))
        return torch.optim.SGD([model.extra])

    hidden: list[torch.Tensor] = []
    method = memory.ModelMethod("one more", torch.bfloat16, lambda model: 0.0, adding)
    record = memory.held_by_model(method, CPU, tiny=True)
    # gradients of weights that no optimizer trains are still there
    assert (record.weights, record.gradients) == (4, 2)
    assert record.states == pytest.approx(4, abs=0.01)


@pytest.mark.parametrize("row", ["LoRA, rank 8, AdamW", "BAdam, one layer at a time", "GaLore, rank 64"])
def test_a_peer_for_models_holds_what_it_should(row: str) -> None:
    pytest.importorskip("transformers")
    reason = peers.why_missing(peers.model_peers(torch.bfloat16)[row].module)
    if reason:
        pytest.skip(f"{row}: {reason}")
    found = {method.name: method for method in memory.model_methods(options())}
    record = memory.held_by_model(found[f"{row}, Llama in bfloat16"], CPU, tiny=True)
    assert not record.note
    total = record.weights + record.gradients + record.states + record.masks
    assert total == pytest.approx(record.ideal_bytes / record.parameters, rel=0.02)


def test_scratch_is_what_a_step_gives_back() -> None:
    x = torch.ones(1000)
    assert harness.scratch_bytes(lambda: x + 1, CPU) < 100
    assert 4000 <= harness.scratch_bytes(lambda: (x + 1) + 1, CPU) < 4100
    held = harness.storages([x, x[:10]], {"view": x.view(10, 100)})
    assert list(held.values()) == [4000]


# results and the report


def some_records() -> list[harness.Record]:
    small = operands.Operands(ONE_SHAPE, CPU)
    rows = [row for row in step.float32(small, options()) if "Bernoulli" not in row.name]
    return harness.measure(
        "step", "float32", rows, parameters=small.numel, anchor=step.FUSED, device=CPU, seconds=0.01
    )


def test_results_come_back_as_a_markdown_table(tmp_path: Path) -> None:
    shared = harness.surroundings(CPU)
    records = [harness.Record(**(asdict(record) | shared)) for record in some_records()]
    path = tmp_path / "tiny.csv"
    harness.write_csv(records, path)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.csv"]

    rows = harness.read_csv(path)
    text = report.render(rows)
    assert all(f"| {record.row} |" in text for record in records)
    written = report.replace(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n", text)
    assert text in written
    assert "stale" not in written
    assert report.replace(written, text) == written
    with pytest.raises(ValueError, match="must hold the lines"):
        report.replace("no markers", text)
    assert "everything on a GPU" in report.missing([rows])
    assert "dense steps" not in report.missing([rows])


def test_a_later_run_replaces_its_own_questions_and_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "machine.csv"
    given = options(output=path)

    def run_of(script: str, *questions: str, known: tuple[str, ...] = ("a", "b")) -> None:
        harness.keep(
            script, [harness.Record(script, name, "row", 1, "float32") for name in questions], given, known
        )

    def kept() -> list[tuple[str, str]]:
        return [(row["script"], row["question"]) for row in harness.read_csv(path)]

    run_of("step", "a", "b")
    run_of("topk", "a")
    run_of("step", "b")
    assert kept() == [("step", "a"), ("topk", "a"), ("step", "b")]
    # a question that the script no longer asks
    run_of("step", "b", known=("b",))
    assert kept() == [("topk", "a"), ("step", "b")]


@pytest.mark.skipif(
    not list(importlib.metadata.distributions(name="matplotlib")), reason="not installed: matplotlib"
)
def test_the_figures_are_drawn_from_results(tmp_path: Path) -> None:
    timings = [replace(record, machine="here", device="cpu") for record in some_records()]
    drawn = [method for method in memory.methods(options()) if "1 %" in method.name]
    sizes = [memory.held(method, ONE_SHAPE, CPU) for method in drawn]
    path = tmp_path / "tiny.csv"
    harness.write_csv([*timings, *sizes, *scaling_records()], path)
    results = [harness.read_csv(path)]
    assert report.draw_steps(results, tmp_path / "step.png")
    assert report.draw_memory(results, tmp_path / "memory.png")
    assert report.draw_scaling(results, tmp_path / "scaling.png")
    assert not report.draw_steps([], tmp_path / "nothing.png")
    assert not report.draw_scaling([], tmp_path / "nothing.png")
    assert {file.name for file in tmp_path.iterdir()} == {
        "tiny.csv", "step.png", "memory.png", "scaling.png",
    }  # fmt: skip


def scaling_records() -> list[harness.Record]:
    def record(question: str, row: str, size: int, ms: float, **more: object) -> harness.Record:
        timing = {"ms": ms, "ms_20": ms, "ms_80": ms, "gb_per_s": 1.0}
        place = {"device": "cpu", "machine": "here", "threads": 2}
        return harness.Record("scaling", question, row, size, "float32", **(timing | place | more))

    one, two = "torch fused, 1 thread", "torch fused, 2 threads"
    return [
        record(scaling.ONE, "plain copy", 100, 1.0),
        record(scaling.ONE, one, 100, 30.0, threads=1),
        record(scaling.ONE, two, 100, 20.0, times_as_fast_as=f"{one}: 1.51"),
        record(scaling.MANY, one, 10, 3.0, threads=1),
        record(scaling.MANY, two, 10, None, note="not measured"),
        record(scaling.SIZES, "torch fused", 1_000_000, 2.0),
        record(scaling.SIZES, "torch fused", 10_000, 0.04),
        record(scaling.SIZES, "MaskedAdamW policy=None, native", 10_000, 0.03, backend="native"),
        record(scaling.SIZES, "MaskedAdamW policy=None, native", 1_000_000, None, backend="native"),
    ]


def test_a_large_model_becomes_a_table(tmp_path: Path) -> None:
    place = {"device": "cpu", "machine": "here", "threads": 2}
    records = [
        harness.Record(
            "large", large.QUESTIONS[0], "TopK", 1000, "bfloat16", ideal_bytes=4100.0, ms=30.0, ms_20=29.0,
            ms_80=31.0, peak=4.2, note="0.1 GiB, 9 tokens per second", **place,
        ),
        harness.Record(
            "large", large.QUESTIONS[0], "AdamW", 1000, "bfloat16", ideal_bytes=8000.0, note="failed", **place
        ),
    ]  # fmt: skip
    path = tmp_path / "tiny.csv"
    harness.write_csv(records, path)
    text = report.readme_text([harness.read_csv(path)])
    assert "| TopK | 4.2 | 4.1 | 30 (29 - 31) | 0.1 GiB, 9 tokens per second |" in text
    assert "| AdamW | - | 8 | - | failed |" in text


def test_the_largest_model_is_as_deep_as_its_budget_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    options = harness.parse("", ["--device", "cpu", "--backend", "reference", "--rows", "none"])
    monkeypatch.setattr(large, "shapes", lambda options: (128, 344, 1_000))
    monkeypatch.setattr(large, "budget", lambda device: 6e6)
    shape = large.fitting(options)
    deeper = large.Shape(128, shape.layers + 1, 344, 1_000)
    peaks = [
        estimate_memory(s.config(), dtype=torch.bfloat16, **large.SETTINGS).peak for s in (shape, deeper)
    ]
    assert peaks[0] <= 6e6 < peaks[1]
    assert shape.layers > 1


def test_a_large_model_is_trained_in_a_process_of_its_own() -> None:
    pytest.importorskip("transformers")
    options = harness.parse("", ["--device", "cpu", "--quick"])
    row = next(row for row in large.ROWS if row.startswith("TopK"))
    record = large.measured(row, large.Shape(64, 1, 64, 100), options)
    assert record.ms and record.peak and "tokens per second" in record.note
    assert "wrong" not in record.note


def test_scaling_becomes_a_table_of_threads_and_one_of_sizes(tmp_path: Path) -> None:
    path = tmp_path / "tiny.csv"
    harness.write_csv(scaling_records(), path)
    rows = harness.read_csv(path)
    by_threads = report.thread_table([row for row in rows if row["question"] != scaling.SIZES])
    assert by_threads.splitlines()[0] == (
        "| ms | one huge tensor, 1 thread | one huge tensor, 2 threads "
        "| 300 tiny tensors, 1 thread | 300 tiny tensors, 2 threads |"
    )
    assert by_threads.splitlines()[2:] == ["| torch fused | 30 | 20 (1.51 x) | 3 | - |"]
    by_size = report.size_table([row for row in rows if row["question"] == scaling.SIZES])
    assert by_size.splitlines()[0] == "| ns per entry | 10,000 | 1,000,000 |"
    assert by_size.splitlines()[2:] == [
        "| torch fused | 4 | 2 |", "| MaskedAdamW policy=None, native | 3 | - |",
    ]  # fmt: skip
    text = report.readme_text([rows])
    assert by_threads in text
    assert by_size in text
    assert f"results/{report.SCALING_FIGURE}" in text
    assert "threads and sizes" not in report.missing([rows])


def test_memory_becomes_a_table_by_dtype_with_bars_and_a_panel_for_each(tmp_path: Path) -> None:
    def record(question: str, row: str, dtype: str, **more: object) -> harness.Record:
        sizes = {"weights": 2.0, "gradients": 0.04, "states": 0.12, "masks": 0.04, "step_peak": 2.3}
        place = {"device": "cpu", "machine": "here", "peak": 6.1, "ideal_bytes": 220.0, "backend": "native"}
        return harness.Record("memory", question, row, 100, dtype, **(sizes | place | more))

    asked = memory.OPERANDS
    bars = {"bars": "at most 2.22 bytes per weight", "reached": "2.200", "met": "yes"}
    released = record(asked, "TopK, indexed, 1 %, released, bfloat16", "bfloat16", **bars)
    records = [
        record(asked, "AdamW, float32", "float32"),
        released,
        record(asked, "absent", "float32", states=None, note="not installed"),
        record(memory.LLAMA, "AdamW, Llama in float32", "float32"),
    ]
    path = tmp_path / "tiny.csv"
    harness.write_csv(records, path)
    rows = harness.read_csv(path)
    lines = report.memory_table(rows[:3]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| AdamW, float32", "| absent", "| TopK, indexed, 1 %, released, bfloat16",
    ]  # fmt: skip
    assert lines[3].endswith("| - | not installed |")
    assert lines[4].endswith("| 6.10 | at most 2.22 bytes per weight: 2.200, **met** |")
    assert "bar" not in report.memory_table(rows[3:]).splitlines()[0]
    assert {line.count("|") for line in lines} == {11}
    text = report.readme_text([rows])
    assert f"| {released.row} | {asked} | - | at most 2.22 bytes per weight | 2.200 | met |" in text
    assert f"**{memory.LLAMA}**, 100 weights" in text
    assert "released during" not in report.missing([rows])
    assert "released during" in report.missing([rows[:1]])


@pytest.mark.skipif(not (REPOSITORY / "README.md").is_file(), reason="needs the source tree")
def test_the_readme_says_what_the_committed_results_say() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert report.replace(readme, report.readme_text(report.all_results())) == readme, (
        "run python -m benchmarks.report"
    )
    for name in (report.STEP_FIGURE, report.MEMORY_FIGURE, report.SCALING_FIGURE):
        assert (f"results/{name}" in readme) == (harness.RESULTS / name).is_file()
