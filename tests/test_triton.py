"""The Triton kernels as a whole: what they compile to, how often they are launched, the optimizer on them.

What single verbs compute is tested in test_backends.py; here as there in Triton's interpreter, unless there
is a GPU.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_backends import (
    BF16,
    F32,
    check_accumulate,
    check_adamw,
    check_compact,
    check_indexed,
    check_seeded,
    words_of,
)
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_optim import Bernoulli, MaskedAdamW, Schedule, TopK, backends
from sparse_optim.backends import reference
from sparse_optim.backends.reference import Draws, seeded_mask

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
missing = backends.why_not("triton", DEVICE)
if missing:
    pytest.skip(f"the Triton backend cannot run here: {missing}", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from sparse_optim.backends import triton_kernels  # noqa: E402

# --- machine code -----------------------------------------------------------------------------------------

# 128-bit loads and stores per thread and full tile of 4096 entries, with 128 threads: 4096 entries of 4 bytes
# are 8 accesses, of 2 bytes 4, of 8 bytes 16
FULL_TILES = {
    "adamw_ float32": (4 * 8, 3 * 8),
    "adamw_ bfloat16, float32 moments": (2 * 4 + 2 * 8, 4 + 2 * 8),
    "adamw_ bfloat16": (4 * 4, 3 * 4),
    "adamw_ float16": (4 * 4, 3 * 4),
    "adamw_ float64": (4 * 16, 3 * 16),
    "adamw_ amsgrad": (5 * 8, 4 * 8),
    "adamw_ bits, frozen": (4 * 8, 3 * 8),
    "adamw_ seeded, frozen": (4 * 8, 3 * 8),
    "adamw_ seeded, zero_grad": (4 * 8, 3 * 8),
    "adamw_ seeded, track": (4 * 8, 3 * 8),
    "adamw_ scores, frozen": (5 * 8, 3 * 8),
    "adamw_ rounded": (4 * 4, 3 * 4),
    # the statistic and the four arrays: the gradient is not read a second time
    "adamw_ and squares": (5 * 8, 4 * 8),
    "accumulate_ squares": (2 * 8, 8),
    "accumulate_ squares, bfloat16": (2 * 4, 4),
    "accumulate_ rounded": (2 * 4, 4),
    "accumulate_ rounded, float32 grads": (8 + 4, 4),
    # 256 threads
    "histogram first round": (4, 0),
    "histogram bfloat16": (2, 0),
    "accumulate_ and histogram": (2 * 4, 4),
    # a loop of four
    "compact count": (8 // 4, 0),
    "norm": (8, 0),
}


@pytest.fixture(scope="module", params=["80", "90", "100"], ids=lambda capability: f"sm_{capability}")
def machine_code(request):
    """What every variant of every kernel compiles to for one architecture."""
    script = Path(__file__).with_name("compiled_kernels.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(script.parents[1]), *sys.path])}
    done = subprocess.run(
        [sys.executable, script, request.param], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.one_in(3)
def test_compiled_kernels_keep_the_promises_of_their_machine_code(machine_code):
    for name, found in machine_code.items():
        instructions = Counter(found["instructions"])
        local = sum(count for op, count in instructions.items() if op.startswith(("LDL", "STL")))
        assert found["stack"] == 0 and local == 0, f"{name} spills registers"
        # at least two programs of 256, or four of 128 threads, fit into the 65,536 registers of a processor
        threads = 256 if "histogram" in name else 128
        assert found["registers"] * threads <= 65536 // 1.25, f"{name} needs {found['registers']} registers"
        assert not found["fused"], f"{name} contracts a multiplication and an addition"
        drawn = "seeded" in name or "rounded" in name
        assert found["philox"] == drawn, f"{name}: Philox in the machine code is {found['philox']}"
        if name in FULL_TILES:
            wide = instructions["LDG.E.128"], instructions["STG.E.128"]
            assert wide == FULL_TILES[name], f"{name}: {wide} wide loads and stores"
    assert set(FULL_TILES) <= set(machine_code)
    # a multiply-add in the machine code of a sum of squares would be one that the assembler made
    for name in ("accumulate_ squares", "accumulate_ rounded", "accumulate_ rounded, float32 grads"):
        assert "FFMA" not in machine_code[name]["instructions"], name


# --- masks ------------------------------------------------------------------------------------------------


def test_random_cases_draw_the_masks_of_the_reference(every_case):
    """Random seeds, draws, keys, lengths, and shards at any offset and stride, up to 2^44 entries."""
    rng = np.random.default_rng(20)
    cases = 0
    while cases < (1_000_000 if every_case else 30_000):
        count, lengths = 24, rng.integers(1, 4096, 24)
        seed, draw = int(rng.integers(2**63)), int(rng.integers(2**32))
        keys = [int(key) for key in rng.integers(2**32, size=count)]
        geometries = []
        for length in lengths:
            inner = int(rng.integers(1, length + 1)) if rng.random() < 0.6 else int(length)
            stride = inner + int(rng.integers(0, 2**20))
            offset = int(rng.integers(0, 2 ** int(rng.integers(1, 44))))
            if rng.random() < 0.4:
                # tiles of the seeded rule that stay whole
                offset, stride = offset // 1024 * 1024, -(-stride // 1024) * 1024
                inner = min(-(-inner // 1024) * 1024, 4096)
            geometries.append((offset, inner, stride))
        seeded = Draws(seed, draw, int(rng.integers(2**32)), keys)
        params = [torch.zeros(int(length), device=DEVICE) for length in lengths]
        state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        triton_kernels.adamw_(
            params, [torch.ones_like(p) for p in params], *state, [], [torch.zeros(()) for _ in params],
            lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0,
            seeded=seeded, geometries=geometries,
        )  # fmt: skip
        for i, param in enumerate(params):
            expected = seeded_mask(seeded, i, param.numel(), geometries[i], torch.device("cpu"))
            assert torch.equal(param.cpu() != 0, expected), (seeded, i, geometries[i])
            cases += param.numel()
    # and the reference is right about the last of them
    offset, inner, stride = geometries[-1]
    local = np.arange(lengths[-1])
    words = words_of(seed, draw, keys[-1], offset + local // inner * stride + local % inner)
    assert np.array_equal((params[-1] != 0).cpu().numpy(), words < seeded.threshold)


# --- the checks bite --------------------------------------------------------------------------------------


@triton.jit
def ignores_shards(local, numel, offset, inner, stride):
    return local + offset * 0


@triton.jit
def forgets_decay(
    param, grad, exp_avg, exp_avg_sq, largest, decay, weight1, beta2, weight2, eps, step_size, correction2,
    amsgrad: tl.constexpr,
):  # fmt: skip
    exp_avg = exp_avg + weight1 * (grad - exp_avg)
    exp_avg_sq = exp_avg_sq * beta2 + weight2 * (grad * grad)
    param = param - step_size * exp_avg / (tl.sqrt(exp_avg_sq) / correction2 + eps)
    return param, exp_avg, exp_avg_sq, largest


@triton.jit
def stores_in_float16(value, dtype: tl.constexpr):
    return value.to(tl.float16).to(dtype)


@triton.jit
def counts_infinities(grad, kind: tl.constexpr):
    return grad * grad, grad == grad


@triton.jit
def rounds_to_nearest(value, word):
    return triton_kernels._stored(value + word.to(tl.float32) * 0, tl.bfloat16)


@triton.jit
def lets_every_tie_pass(start, last_tie, reachable):
    return tl.where(reachable, 1 << 30, -1) + (start * 0 + last_tie * 0).to(tl.int32)


WRONG = [
    ("_global_index", ignores_shards, check_seeded, (5000, (2048, 13, 40))),
    ("_adamw_entries", forgets_decay, check_adamw, ((F32, F32), ("bits", "frozen"), {"weight_decay": 0.1})),
    ("_adamw_entries", forgets_decay, check_indexed, (F32, {"weight_decay": 0.1})),
    ("_stored", stores_in_float16, check_adamw, ((F32, F32), ("everything", "frozen"), {})),
    ("_contribution", counts_infinities, check_accumulate, ("squares", F32, F32, False)),
    ("_round_stochastically", rounds_to_nearest, check_accumulate, ("squares", BF16, F32, True, "whole")),
    ("_ties_within", lets_every_tie_pass, check_compact, (BF16, False)),
]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="compiled kernels do not look their functions up again")
@pytest.mark.parametrize(
    ("name", "wrong", "check", "arguments"),
    [pytest.param(*row, id=f"{row[1].__name__}_{i}") for i, row in enumerate(WRONG)],
)
def test_a_wrong_kernel_is_caught(name, wrong, check, arguments, monkeypatch):
    check(triton_kernels, *arguments)
    monkeypatch.setattr(triton_kernels, name, wrong)
    with pytest.raises(AssertionError):
        check(triton_kernels, *arguments)


# --- odd circumstances ------------------------------------------------------------------------------------

HYPER = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}


def one_step(verbs=triton_kernels, numel=10, step=None, **arguments):
    """A parameter of ones after one dense step under gradients of one."""
    param = torch.ones(numel, device=DEVICE)
    state = [torch.full((numel,), 0.5, device=DEVICE) for _ in range(2)]
    steps = [torch.tensor(0.0, device="cpu") if step is None else step]
    verbs.adamw_([param], [torch.ones_like(param)], *[[s] for s in state], [], steps, **HYPER | arguments)
    return param


@pytest.mark.parametrize("count", [2.0**24 - 1, 2.0**24, 2.0**31 - 200])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["host", "device"])
def test_steps_beyond_two_to_the_24_still_move_weights(count, lr):
    step = torch.tensor(count, dtype=torch.float64)
    expected = one_step(reference, step=step.clone(), lr=float(lr))
    param = one_step(step=step, lr=lr)
    assert step == count + 1
    torch.testing.assert_close(param, expected)


def test_whole_numbers_count_steps_too():
    step = torch.tensor(3)
    torch.testing.assert_close(one_step(step=step), one_step(reference, step=torch.tensor(3)))
    assert step == 4


def test_tables_are_made_on_the_host_whatever_the_default_device():
    with torch.device("meta"):
        numbers = triton_kernels._Table(torch.device("cpu"), 0, ((0, (1,)),), (5000,), 1024)
    assert numbers.rows.device.type == numbers.owner.device.type == "cpu"


def test_a_table_that_was_made_in_inference_mode_serves_outside_it():
    buffers, lists = [torch.zeros(3, device=DEVICE)], [torch.arange(3, dtype=torch.int32, device=DEVICE)]
    with torch.inference_mode():
        triton_kernels.gather_(buffers, [torch.ones(7, device=DEVICE)], lists)
    triton_kernels.gather_(buffers, [torch.ones(7, device=DEVICE)], lists)
    assert buffers[0].tolist() == [2.0] * 3


def test_tensors_with_steps_of_different_dtypes_can_share_a_call():
    runs = []
    for verbs in (reference, triton_kernels):
        params = [torch.ones(5, device=DEVICE) for _ in range(2)]
        state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        steps = [torch.tensor(3.0), torch.tensor(4.0, dtype=torch.float64)]
        verbs.adamw_(
            params,
            [torch.ones_like(p) for p in params],
            *state,
            [],
            steps,
            **HYPER | {"lr": torch.tensor(0.1)},
        )
        assert [step.item() for step in steps] == [4.0, 5.0]
        runs.append(params)
    torch.testing.assert_close(*runs)


def indexed_step(verbs, dtypes, masters=()):
    """One step of two bfloat16 tensors whose states may have any dtypes: moments, largest, ages."""
    indices = [torch.arange(0, 40, 2, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    params = [torch.linspace(-1, 1 + i, 40, device=DEVICE).bfloat16() for i in range(2)]
    grads = [torch.linspace(-2, 3, 40, device=DEVICE).bfloat16() for _ in range(2)]
    values = torch.linspace(0.25, 0.5, 20, device=DEVICE).bfloat16()
    *moments, ages = [
        [values.to(dtype) if dtype.is_floating_point else torch.arange(20, device=DEVICE, dtype=dtype)
         for dtype in pair]
        for pair in dtypes
    ]  # fmt: skip
    masters = [p[i.long()].to(dtype) for p, i, dtype in zip(params, indices, masters, strict=False)]
    steps = [torch.tensor(3.0, device="cpu") for _ in range(2)]
    verbs.adamw_indexed_(params, grads, indices, *moments, masters, ages, steps, **HYPER)
    return [params, *moments, masters, ages]


@pytest.mark.parametrize("column", range(5), ids=["exp_avg", "exp_avg_sq", "largest", "age", "master"])
def test_lists_whose_states_have_different_dtypes_can_share_a_call(column):
    state, other = [(torch.float32,) * 2] * 3 + [(torch.int32,) * 2], (torch.float32, torch.float64)
    masters = (torch.float32,) * 2
    expected = indexed_step(reference, state, masters)
    if column == 4:
        masters = other
    else:
        state[column] = (torch.int32, torch.int64) if column == 3 else other
    for got, want in zip(indexed_step(triton_kernels, state, masters), expected, strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-6, atol=1e-7)


ELSEWHERE = torch.device("cpu" if DEVICE.type == "cuda" else "meta")


@pytest.mark.parametrize("column", range(1, 6), ids=["grad", "exp_avg", "exp_avg_sq", "mask", "statistic"])
def test_a_tensor_on_another_device_is_refused_before_anything_is_counted(column):
    columns = [torch.full((40,), 0.5, device=DEVICE) for _ in range(6)]
    columns[4] = torch.full((8,), 255, dtype=torch.uint8, device=DEVICE)
    columns[column] = columns[column].to(ELSEWHERE)
    param, grad, exp_avg, exp_avg_sq, bits, statistic = columns
    step, flag = torch.tensor(0.0, device="cpu"), torch.tensor(False, device=DEVICE)
    # a table that has been refused is not one that is known to be right
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"must be there too, got a tensor on {ELSEWHERE}.*; move it"):
            triton_kernels.adamw_(
                [param], [grad], [exp_avg], [exp_avg_sq], [], [step],
                bits=[bits], statistics=[statistic], nonfinite=[flag], **HYPER,
            )  # fmt: skip
    assert step == 0 and torch.equal(param, torch.full_like(param, 0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_scores_of_other_dtypes_are_ranked_as_float32(dtype):
    scores = torch.tensor([1.0, float("inf"), float("nan"), 2.0, 0.5], dtype=dtype, device=DEVICE)
    policy = TopK(0.4)
    for as_bits in (False, True):
        ours, theirs = (
            policy.select([scores], verbs, as_bits=as_bits) for verbs in (triton_kernels, reference)
        )
        assert torch.equal(ours[0][0], theirs[0][0])


def test_strided_lists_and_states_are_read_in_their_order():
    wide = torch.arange(0, 40, dtype=torch.int32, device=DEVICE)
    index, weights = wide[::2], torch.arange(80.0, device=DEVICE)
    assert triton_kernels.norm([weights], indices=[index]) == reference.norm([weights], indices=[index])
    runs = []
    for verbs in (reference, triton_kernels):
        buffer, param = torch.zeros(20, device=DEVICE), torch.zeros(80, device=DEVICE)
        verbs.gather_([buffer], [weights], [index])
        verbs.apply_delta_([param], [index], [buffer])
        (carried,) = verbs.remap_([index], [wide[1::3]], [[torch.arange(40.0, device=DEVICE)[::2]]])
        moments = [torch.zeros(40, device=DEVICE)[::2] for _ in range(2)]
        verbs.adamw_indexed_(
            [param], [weights], [index], [moments[0]], [moments[1]], [], [], [], [torch.tensor(0.0)], **HYPER
        )
        runs.append([buffer, param, carried[0], *moments])
    torch.testing.assert_close(*runs)


def test_a_gradient_whose_sign_is_a_flag_keeps_its_sign():
    runs = []
    for verbs in (reference, triton_kernels):
        param, state = torch.zeros(5, device=DEVICE), [torch.zeros(5, device=DEVICE) for _ in range(2)]
        grad = torch._neg_view(torch.ones(5, device=DEVICE))
        verbs.adamw_([param], [grad], [state[0]], [state[1]], [], [torch.tensor(0.0)], **HYPER)
        runs.append(param)
    torch.testing.assert_close(*runs)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: capture of a graph")
def test_a_first_step_inside_a_capture_is_refused():
    graph = torch.cuda.CUDAGraph()
    param = torch.ones(77, device=DEVICE)
    state = [torch.zeros_like(param) for _ in range(2)]
    with pytest.raises(RuntimeError, match="captured"), torch.cuda.graph(graph):
        triton_kernels.adamw_(
            [param], [torch.ones_like(param)], *[[s] for s in state], [], [torch.tensor(0.0)], **HYPER
        )


# --- the optimizer ----------------------------------------------------------------------------------------

POLICIES = {
    "dense": (None, "frozen"),
    "bernoulli_zero_grad": (Bernoulli(0.3), "zero_grad"),
    "bernoulli_frozen": (Bernoulli(0.3), "frozen"),
    "bernoulli_layer": (Bernoulli(0.5, unit="layer"), "track"),
    "top_k_list": (TopK(0.1, schedule=Schedule(observe=2)), "frozen"),
    "top_k_bits": (TopK(0.1, schedule=Schedule(observe=2)), "zero_grad"),
    "alternating_lists": (TopK(0.2, scope="tensor", schedule=Schedule(observe=1, train=2)), "frozen"),
    "observe_and_train": (TopK(0.2, schedule=Schedule(observe=2, train=2, meanwhile="everything")), "frozen"),
}


def ragged(dtype=torch.float32, count=40):
    """Named parameters of many lengths, from 0 to three tiles."""
    generator = torch.Generator().manual_seed(21)
    lengths = torch.randint(1, 3000, (count,), generator=generator).tolist()
    lengths[:7] = 0, 1, 31, 1023, 1024, 1025, 5000
    return [
        (
            f"layer.{i // 4}.weight{i % 4}",
            torch.nn.Parameter(torch.randn(n, generator=generator).to(DEVICE, dtype)),
        )
        for i, n in enumerate(lengths)
    ]


def give_gradients(named, step):
    generator = torch.Generator().manual_seed(100 + step)
    for _, p in named:
        # whole eighths: sums of their squares are exact, so that rankings cannot differ by a rounding
        grad = torch.randint(-16, 17, p.shape, generator=generator) / 8
        p.grad = grad.to(DEVICE, p.dtype)


@pytest.mark.one_in(2, by="case")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", POLICIES)
def test_the_optimizer_on_the_kernels_is_the_optimizer_on_the_reference(case, dtype):
    policy, unselected = POLICIES[case]
    runs = {}
    for backend in ("reference", "triton"):
        named = ragged(dtype, 16)
        optimizer = MaskedAdamW(
            named, lr=1e-2, policy=policy, unselected=unselected, backend=backend, seed=5,
            stochastic_rounding=dtype == torch.bfloat16, max_grad_norm=3.0,
        )  # fmt: skip
        for step in range(5):
            give_gradients(named, step)
            optimizer.step()
        runs[backend] = named, optimizer
    (expected, reference_optimizer), (got, optimizer) = runs.values()
    for (name, p), (_, q) in zip(got, expected, strict=True):
        assert torch.equal(optimizer.mask(p), reference_optimizer.mask(q)), f"mask of {name}"
        assert optimizer.state[p].keys() == reference_optimizer.state[q].keys()
        # five steps of at most lr each; a last bit of float32 may tip the rounding of a bfloat16 weight
        tolerance = 2e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(p.detach(), q.detach(), rtol=tolerance, atol=tolerance)
        for key in ("indices", "bits", "age"):
            if key in optimizer.state[p]:
                assert torch.equal(optimizer.state[p][key], reference_optimizer.state[q][key]), (name, key)


class Counting:
    """Counts the launches of every kernel."""

    def __init__(self, monkeypatch):
        self.launches = Counter()
        for name in [n for n in vars(triton_kernels) if n.endswith("_kernel")]:
            monkeypatch.setattr(triton_kernels, name, self.counted(name, getattr(triton_kernels, name)))

    def counted(self, name, kernel):
        counter = self

        class Counted:
            def __getitem__(self, grid):
                def launch(*args, **kwargs):
                    counter.launches[name] += 1
                    return kernel[grid](*args, **kwargs)

                return launch

        return Counted()

    def of(self, run):
        self.launches.clear()
        run()
        return dict(self.launches)


LAUNCHES = {
    "dense": [{"_adamw_kernel": 1}] * 3,
    "bernoulli_zero_grad": [{"_adamw_kernel": 1}] * 3,
    "bernoulli_layer": [{"_adamw_kernel": 1}] * 3,
    # the first round of three rides on the last accumulation
    "top_k_list": [
        {"_accumulate_kernel": 1},
        {"_histogram_kernel": 3, "_compact_kernel": 2},
        {"_adamw_indexed_kernel": 1},
    ],
    "top_k_bits": [
        {"_accumulate_kernel": 1},
        {"_histogram_kernel": 3, "_compact_kernel": 1},
        {"_adamw_kernel": 1},
    ],
    # a step that observes and trains is one launch
    "observe_and_train": [
        {"_adamw_kernel": 1},
        {"_adamw_kernel": 1, "_histogram_kernel": 3, "_compact_kernel": 1},
        {"_adamw_kernel": 1},
    ],
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", LAUNCHES)
def test_forty_tensors_need_as_many_launches_as_one(case, monkeypatch):
    policy, unselected = POLICIES[case]
    named = ragged()
    counting = Counting(monkeypatch)
    optimizer = MaskedAdamW(named, policy=policy, unselected=unselected, backend="triton")
    for step, expected in enumerate(LAUNCHES[case]):
        generator = torch.Generator().manual_seed(step)
        for _, p in named:
            # without ties, which would need rounds of their own
            p.grad = torch.randn(p.shape, generator=generator).to(DEVICE)
        assert counting.of(optimizer.step) == expected, f"step {step}"


class Operations(TorchDispatchMode):
    """Records the operations of torch, besides the launches."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", ["dense", "bernoulli_zero_grad", "top_k_list", "top_k_bits"])
def test_a_later_step_makes_no_table_and_touches_no_tensor_of_the_device(case):
    policy, unselected = POLICIES[case]
    named = ragged()
    optimizer = MaskedAdamW(named, policy=policy, unselected=unselected, backend="triton")
    for step in range(3):
        give_gradients(named, step)
        optimizer.step()
    misses = triton_kernels._remembered_table.cache_info().misses
    with Operations() as operations:
        optimizer.step()
    assert triton_kernels._remembered_table.cache_info().misses == misses
    # the steps, which are on the host, are counted together and read there, one by one
    done = operations.names
    assert done["_foreach_add_"] == 1 and done["_local_scalar_dense"] == len(named)
    made = {"zeros", "zeros_like", "clone", "cat", "contiguous", "_to_copy", "nonzero"}
    assert not made & set(done), done
    # gradients elsewhere are one more copy: that of their addresses
    give_gradients(named, 4)
    with Operations() as operations:
        optimizer.step()
    assert triton_kernels._remembered_table.cache_info().misses == misses
    assert operations.names["copy_"] == done["copy_"] + 1, operations.names


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: synchronisation and allocation on the device")
@pytest.mark.parametrize("case", ["dense", "bernoulli_zero_grad", "top_k_list", "top_k_bits"])
def test_a_later_step_neither_waits_for_the_device_nor_allocates_there(case):
    policy, unselected = POLICIES[case]
    named = ragged()
    optimizer = MaskedAdamW(named, policy=policy, unselected=unselected, backend="triton")
    for step in range(4):
        give_gradients(named, step)
        optimizer.step()
    for kept in (True, False):
        if not kept:
            give_gradients(named, 5)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.get_device_properties(0).total_memory < 40 << 30,
    reason="needs a GPU with 40 GiB",
)
def test_a_tensor_beyond_two_to_the_31_entries_is_updated_to_its_end():
    n = 2**31 + 5000
    param = torch.ones(n, dtype=torch.bfloat16, device=DEVICE)
    state = [torch.zeros(n, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    seeded = Draws(1, 2, 2**31, [3])
    hyper = {"lr": 0.5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    triton_kernels.adamw_(
        [param],
        [torch.ones_like(param)],
        *[[s] for s in state],
        [],
        [torch.zeros(())],
        **hyper,
        seeded=seeded,
    )
    tail = 10_000
    words = words_of(1, 2, 3, np.arange(n - tail, n))
    assert np.array_equal((param[-tail:] != 1).cpu().numpy(), words < 2**31)
