"""Every backend keeps every promise of the verbs.

Each group has a `check_*` function that takes a backend, so that the last group can show the same checks
rejecting backends that are wrong on purpose. The oracles are written here, from the equations, in NumPy.

The bar for floating-point results is `err(kernel) <= err(plain) + k eps`. Both errors are distances from the
equation in float64 (long double for float64 tensors), as far as they exceed the one rounding into the stored
dtype, relative to the magnitudes that went into an entry; plain is the equation in the arithmetic's dtype.
Masks, indices, counts and whatever must stay as it is are compared bit for bit.
"""

import importlib.util
import inspect
import math
import threading
from typing import NamedTuple

import emulated
import numpy as np
import pytest
import torch

from sparse_optim import backends
from sparse_optim.backends import reference
from sparse_optim.backends.reference import (
    BEYOND_ALL_KEYS,
    EVERY_TIE,
    MASK_DRAWS,
    STATISTIC_ROUNDING_DRAWS,
    WEIGHT_ROUNDING_DRAWS,
    Cuts,
    Draws,
    purpose_draw,
)
from sparse_optim.masks import Bits, Indexed
from sparse_optim.policies import TopK
from sparse_optim.scores import SignedGradient, SquaredGradient

CPU = torch.device("cpu")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
HYPER = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
UPDATE_K = 4  # times eps of the arithmetic: a handful of roundings, whatever their order


class OneAtATime:
    """The interpreter patches Triton while it runs, so that threads have to take turns."""

    def __init__(self, backend):
        self.backend, self.lock = backend, threading.Lock()

    def __getattr__(self, name):
        verb = getattr(self.backend, name)

        def call(*args, **kwargs):
            with self.lock:
                return verb(*args, **kwargs)

        return call


class OnGPU:
    """A backend that is handed copies on the GPU of whatever a check gives it, storage by storage, so that
    views, alignment and the guards around them are the same there; everything is copied back afterwards.
    """

    def __init__(self, backend):
        self.backend = backend

    def __getattr__(self, name):
        verb = getattr(self.backend, name)

        def call(*args, **kwargs):
            bound = inspect.signature(verb).bind(*args, **kwargs)
            moved = {}
            # steps stay on the host unless the learning rate is on the device, as in a training loop
            stays = () if isinstance(kwargs.get("lr"), torch.Tensor) else ("steps",)
            arguments = {
                key: value if key in stays else self.move(value, moved)
                for key, value in bound.arguments.items()
            }
            result = verb(**arguments)
            for here, there in moved.values():
                here.copy_(there)
            return self.bring_back(result)

        return call

    def move(self, value, moved):
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in moved:
                moved[storage.data_ptr()] = (storage, storage.cuda())
            there = torch.empty(0, dtype=value.dtype, device="cuda").set_(moved[storage.data_ptr()][1])
            return there.as_strided(value.shape, value.stride(), value.storage_offset())
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.move(part, moved) for part in value))
        return [self.move(part, moved) for part in value] if isinstance(value, list | tuple) else value

    def bring_back(self, result):
        if isinstance(result, list):
            return [self.bring_back(part) for part in result]
        return result.cpu() if isinstance(result, torch.Tensor) else result


# Triton's interpreter needs most of the time
BACKENDS = [
    pytest.param((name, CPU), id=name, marks=[pytest.mark.one_in(8)] if name == "triton" else [])
    for name in backends.available(CPU)
]
if not emulated.why_not():
    BACKENDS.append(pytest.param(("emulated", CPU), id="cuda_on_cpu"))
if torch.cuda.is_available():
    GPU = torch.device("cuda", 0)
    BACKENDS += [pytest.param((name, GPU), id=f"{name}_cuda") for name in backends.available(GPU)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    name, device = request.param
    if name == "emulated":
        return OneAtATime(emulated.load())
    module = backends.resolve(name, device, wants_reference=False)
    if device != CPU:
        return OnGPU(module)
    return OneAtATime(module) if name == "triton" else module


def test_kernels_that_are_installed_are_among_the_backends_under_test():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    assert any(parameter.values[0][0] == "triton" for parameter in BACKENDS), backends.why_not("triton", CPU)


def fewer(backend, many, few):
    """`few` of what Triton's interpreter needs minutes for, else `many`."""
    return few if isinstance(backend, OneAtATime) else many


def named(**rows):
    """Parametrize values with readable ids."""
    return [pytest.param(value, id=name) for name, value in rows.items()]


# --- bits and memory --------------------------------------------------------------------------------------


def bits_of(tensor):
    """The bits as integers, in the tensor's shape."""
    return tensor.detach().view(INTEGER[tensor.element_size()])


def assert_same_bits(got, want, what):
    assert got.dtype == want.dtype and got.shape == want.shape, f"{what}: {got.dtype} {got.shape}"
    wrong = bits_of(got) != bits_of(want)
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} entries changed, {got[wrong][:4]} for {want[wrong][:4]}"
    )


# quiet NaN with a payload, signalling NaN, -0.0, inf, -inf, smallest denormal, largest negative denormal
SPECIALS = {
    F64: [0x7FF8000012345678, -0xBFFFFFFFFFFFF, -(2**63), 0x7FF << 52, -(1 << 52), 1, -(2**63) + 2**52 - 1],
    F32: [0x7FC12345, 0xFFA00001 - 2**32, -(2**31), 0x7F800000, 0xFF800000 - 2**32, 1, 0x807FFFFF - 2**32],
    BF16: [0x7FC5, 0xFFA1 - 2**16, -(2**15), 0x7F80, 0xFF80 - 2**16, 1, 0x807F - 2**16],
    F16: [0x7E55, 0xFD01 - 2**16, -(2**15), 0x7C00, 0xFC00 - 2**16, 1, 0x83FF - 2**16],
}  # fmt: skip


def plant(values, places):
    """Write the special bit patterns into the first and last of these flat places of a contiguous tensor."""
    patterns = torch.tensor(SPECIALS[values.dtype], dtype=INTEGER[values.element_size()])
    places = torch.as_tensor(places)
    bits_of(values).view(-1)[places[: len(patterns)]] = patterns[: len(places)]
    bits_of(values).view(-1)[places[len(patterns) :][-len(patterns) :]] = patterns[
        : max(len(places) - len(patterns), 0)
    ]


class Buffer:
    """A tensor laid out inside a larger one, whose other entries are guarded."""

    def __init__(self, values, layout):
        bits, shape = bits_of(values), values.shape
        if layout == "transposed":
            base = torch.full(shape[::-1], 0x5A, dtype=bits.dtype)
            view = base.permute(*reversed(range(len(shape))))
        elif layout == "sliced":
            base = torch.full((*shape[:-1], 2 * shape[-1] + 3), 0x5A, dtype=bits.dtype)
            view = base[..., 1 : 1 + 2 * shape[-1] : 2]
        elif layout == "columns":
            base = torch.full((*shape[:-1], shape[-1] + 5), 0x5A, dtype=bits.dtype)
            view = base[..., 2 : 2 + shape[-1]]
        elif layout == "channels_last":
            base = view = torch.full(shape, 0x5A, dtype=bits.dtype).to(memory_format=torch.channels_last)
        elif layout == "expanded":
            base = bits[..., :1].clone()
            view = base.expand(shape)
        else:
            # the place of a first entry within a 16-byte access
            first = 16 if layout == "aligned" else 17
            base = torch.full((values.numel() + 40,), 0x5A, dtype=bits.dtype)
            view = base[first : first + values.numel()].view(shape)
        if layout != "expanded":
            view.copy_(bits)
        self.base, self.tensor, self.before = base, view.view(values.dtype), base.clone()

    @property
    def values(self):
        """A contiguous copy, bit for bit."""
        return bits_of(self.tensor).contiguous().clone().view(self.tensor.dtype)

    def assert_guards_hold(self, what):
        expected, view = self.before.clone(), bits_of(self.tensor)
        expected.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(view)
        assert torch.equal(self.base, expected), f"{what}: memory around the tensor was written"


class Layout(NamedTuple):
    shape: tuple
    param: str = "contiguous"
    state: str = "contiguous"
    grad: str = "contiguous"


LAYOUTS = [
    Layout(()),
    Layout((0,)),
    Layout((1,)),
    Layout((31,), param="sliced"),
    Layout((1023,), state="sliced", grad="sliced"),
    Layout((1024,)),
    Layout((1025,), grad="expanded"),
    Layout((37, 53), param="transposed", state="transposed"),
    Layout((12, 7), param="columns", grad="transposed"),
    Layout((2, 3, 4, 5), param="channels_last", state="channels_last"),
    Layout((3, 0, 2)),
    Layout((129, 33), state="transposed", grad="expanded"),
    Layout((3, 2051), param="aligned", state="aligned", grad="aligned"),
    Layout((4096,), param="aligned", state="aligned", grad="contiguous"),
    Layout((5000,), param="aligned", state="aligned", grad="aligned"),
    Layout((5000,), param="aligned", state="aligned", grad="aligned"),
]


def normal(rng, shape, dtype):
    return torch.from_numpy(rng.standard_normal(shape).reshape(shape)).to(dtype)


# --- oracles ----------------------------------------------------------------------------------------------


def real_of(dtype):
    """The NumPy type of truth for a stored dtype, and that of the arithmetic."""
    return (np.longdouble, np.float64) if dtype == F64 else (np.float64, np.float32)


def adamw(real, param, grad, exp_avg, exp_avg_sq, largest, step, *, lr, beta1, beta2, eps, weight_decay):
    """Loshchilov and Hutter's AdamW, all arrays of type `real`: new values, and magnitudes they come of."""
    one = real(1)
    lr, beta1, beta2, eps, weight_decay = (real(x) for x in (lr, beta1, beta2, eps, weight_decay))
    if real is np.float32:
        # a plain program computes its scalars in double
        b1, b2 = 1 - np.float64(beta1) ** step, 1 - np.float64(beta2) ** step
    else:
        b1, b2 = one - beta1**step, one - beta2**step
    new_avg = beta1 * exp_avg + (one - beta1) * grad
    new_sq = beta2 * exp_avg_sq + (one - beta2) * grad * grad
    new_largest = new_sq if largest is None else np.maximum(largest, new_sq)
    denominator = np.sqrt(new_largest) / np.sqrt(b2).astype(real) + eps
    rate = (lr / b1).astype(real)
    new_param = (one - lr * weight_decay) * param - rate * new_avg / denominator
    inflow = beta1 * abs(exp_avg) + (one - beta1) * abs(grad)
    scales = [abs(param) + abs(new_param) + rate * inflow / denominator, inflow, new_sq, new_largest]
    return [new_param.astype(real), new_avg, new_sq, new_largest], scales


def to_numpy(tensor, real):
    return tensor.detach().double().reshape(-1).numpy().astype(real)


def assert_within_bar(got, plain, truth, scale, stored, what):
    """err(got) <= err(plain) + k eps, where err is what exceeds the one rounding into the stored dtype."""
    assert np.isfinite(truth).all(), "the oracle itself overflowed"
    info = torch.finfo(stored)
    got, plain = to_numpy(got, truth.dtype), to_numpy(plain, truth.dtype)
    assert np.isfinite(got).all(), f"{what}: not finite"
    power = np.maximum(np.ldexp(np.ones_like(truth), np.frexp(truth)[1] - 1), info.smallest_normal)

    def err(values):
        excess = np.maximum(abs(values - truth) - power * (info.eps / 2), 0)
        return float(np.max(excess / np.maximum(scale, info.smallest_normal), initial=0.0))

    allowed = err(plain) + UPDATE_K * torch.finfo(F64 if stored == F64 else F32).eps
    assert err(got) <= allowed, f"{what}: error {err(got):.3g}, allowed {allowed:.3g}"


def philox_exact(counter, key):
    """Philox-4x32-10 on Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high_0, low_0 = divmod(c0 * 0xD2511F53, 2**32)
        high_1, low_1 = divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def word_exact(seed, draw, key, entry):
    tile, within = divmod(entry, 1024)
    high, low = divmod(256 * tile + within % 256, 2**32)
    return philox_exact((low, high, draw, key), (seed % 2**32, seed >> 32))[within // 256]


def words_of(seed, draw, key, entries):
    """The same on an array of entries, one Philox call for each."""
    mask, shift = np.uint64(2**32 - 1), np.uint64(32)
    entries = np.asarray(entries, dtype=np.uint64)
    counter = entries // np.uint64(1024) * np.uint64(256) + entries % np.uint64(256)
    c = [counter & mask, counter >> shift, np.full_like(counter, draw), np.full_like(counter, key)]
    k0, k1 = seed % 2**32, seed >> 32
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> shift) ^ c[1] ^ np.uint64(k0), p1 & mask, (p0 >> shift) ^ c[3] ^ np.uint64(k1), p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.choose((entries % np.uint64(1024) // np.uint64(256)).astype(int), c)


def global_indices(numel, geometry):
    offset, inner, stride = geometry
    local = np.arange(numel)
    return offset + local // inner * stride + local % inner


def whole(numel):
    return (0, max(numel, 1), max(numel, 1))


def packed(mask):
    """Eight entries a byte, lowest bit first, padded to four bytes."""
    padded = np.zeros(-(-mask.size // 32) * 32, dtype=bool)
    padded[: mask.size] = mask
    return torch.from_numpy(np.packbits(padded, bitorder="little"))


def sort_keys(scores, absolute=False):
    """Integers that order as scores do, 32 bits for float32 or 16 for bfloat16; which are finite."""
    values = scores.detach().float().reshape(-1).numpy().copy()
    values = abs(values) if absolute else values + np.float32(0.0)
    raw = values.view(np.uint32).astype(np.int64)
    keys = np.where(raw < 2**31, raw + 2**31, 2**32 - 1 - raw)
    return keys >> (16 if scores.dtype == BF16 else 0), np.isfinite(values)


def as_cuts(rows):
    """(key, last tie) of each tensor in the form in which backends take them."""
    return Cuts(torch.tensor([key for key, _ in rows]), torch.tensor([last for _, last in rows]))


def above(scores, cut, geometry):
    key, last_tie = cut
    keys, finite = sort_keys(scores)
    tied = (keys == key) & (global_indices(keys.size, geometry) <= last_tie)
    return finite & ((keys > key) | tied)


# --- adamw_ -----------------------------------------------------------------------------------------------

DTYPES = named(
    float64=(F64, F64),
    float32=(F32, F32),
    bfloat16=(BF16, BF16),
    bfloat16_with_float32_moments=(BF16, F32),
    float16=(F16, F16),
    float16_with_float32_moments=(F16, F32),
    float32_with_bfloat16_moments=(F32, BF16),
)
MASKS = named(
    everything=("everything", "frozen"),
    **{
        f"{form}_{unselected}": (form, unselected)
        for form in ("bits", "seeded", "scores", "bfloat16_scores")
        for unselected in ("frozen", "zero_grad", "track")
    },
)
EVERY_FLAG = {
    "amsgrad": True,
    "maximize": True,
    "weight_decay": 0.1,
    "grad_scale": torch.tensor(0.37),
    "lr": torch.tensor(0.2, dtype=F64),
}
FLAGS = named(
    weight_decay={"weight_decay": 0.1},
    amsgrad={"amsgrad": True},
    maximize={"maximize": True},
    rescale={"rescale": 3.7},
    grad_scale={"grad_scale": torch.tensor(0.37)},
    float64_grad_scale={"grad_scale": torch.tensor(1.7, dtype=F64)},
    tensor_lr={"lr": torch.tensor(0.2)},
    tensor_betas={"beta1": torch.tensor(0.8), "beta2": torch.tensor(0.97)},
    large_eps={"eps": 0.3},
)


def some_selection(rng, i, numel):
    """A mask for the i-th tensor: half, one entry, 1 %, all, none, in turn."""
    mask = np.zeros(numel, dtype=bool)
    kind = i % 5
    if kind == 1 and numel:
        mask[rng.integers(numel)] = True
    elif kind == 2:
        mask = rng.random(numel) < 0.01
    elif kind == 3:
        mask[:] = True
    elif kind == 0:
        mask = rng.random(numel) < 0.5
    return mask


def make_selection(rng, form, numels):
    """Arguments for `adamw_`, and the masks they mean."""
    if form == "everything":
        return {}, [None] * len(numels)
    if form == "bits":
        masks = [some_selection(rng, i + 1, n) for i, n in enumerate(numels)]
        return {"bits": [packed(mask) for mask in masks]}, masks
    # every other tensor is a shard: two runs of entries in a larger tensor
    geometries = [whole(n) if i % 2 else (7 + i * 1024, max(n // 2, 1), n + 3) for i, n in enumerate(numels)]
    # one whose tiles of 1024 entries stay whole
    geometries[-2] = (3072, 1024, 5120)
    if form == "seeded":
        keys = [int(k) for k in rng.integers(2**32, size=len(numels))]
        seeded = Draws(0x0123456789ABCDEF, 5, int(0.3 * 2**32), keys)
        masks = [
            words_of(seeded.seed, seeded.draw, key, global_indices(n, g)) < seeded.threshold
            for key, n, g in zip(keys, numels, geometries, strict=True)
        ]
        return {"seeded": seeded, "geometries": geometries}, masks
    dtype = BF16 if form == "bfloat16_scores" else F32
    scores, cuts = [], []
    for i, n in enumerate(numels):
        score = torch.from_numpy(rng.integers(-2, 5, size=n).astype(np.float32))
        score[n // 2 :: 7] = float("nan")
        score[n // 3 :: 11] = float("inf")
        tie = int(sort_keys(torch.ones(1, dtype=dtype))[0][0])
        last = [EVERY_TIE, -1, int(global_indices(n, geometries[i])[n // 2]) if n else 0][i % 3]
        scores.append(score.to(dtype))
        cuts.append((BEYOND_ALL_KEYS, -1) if i == 4 else (tie, last))
    masks = [above(*row) for row in zip(scores, cuts, geometries, strict=True)]
    return {"scores": scores, "cuts": as_cuts(cuts), "geometries": geometries}, masks


def check_adamw(backend, dtypes, mask, flags, *, updates=3):
    """Several updates of a ragged list, each judged from where it started."""
    dtype, state_dtype = dtypes
    form, unselected = mask
    rng = np.random.default_rng(1)
    hyper = HYPER | {"lr": 0.3, "beta2": 0.95} | flags
    amsgrad = hyper.pop("amsgrad", False)
    numels = [int(np.prod(layout.shape)) for layout in LAYOUTS]
    arguments, masks = make_selection(rng, form, numels)
    assert form == "everything" or any(m.any() and not m.all() for m in masks)
    rest = [np.arange(0) if m is None else np.flatnonzero(~m) for m in masks]
    keeps_param = form != "everything" and unselected != "zero_grad"
    keeps_state = form != "everything" and unselected == "frozen"

    def buffers(role, stored, make):
        made = []
        for layout, places in zip(LAYOUTS, rest, strict=True):
            values = make(normal(rng, layout.shape, F64)).to(stored)
            if (role == "param" and keeps_param) or (role == "state" and keeps_state):
                plant(values, places)
            made.append(Buffer(values, getattr(layout, role)))
        return made

    params = buffers("param", dtype, lambda x: x)
    state = [
        buffers("state", state_dtype, lambda x: x),
        buffers("state", state_dtype, lambda x: (x.abs() + 0.1) ** 2),
    ]
    if amsgrad:
        state.append(buffers("state", state_dtype, lambda x: (x.abs() + 0.1) ** 2))
    steps = [torch.tensor(float(i % 3 * 5)) for i in range(len(LAYOUTS))]

    for _ in range(updates):
        grads = []
        for layout, places in zip(LAYOUTS, rest, strict=True):
            values = normal(rng, layout.shape, dtype)
            if form != "everything" and unselected != "track" and layout.grad != "expanded":
                plant(values, places)
            grads.append(Buffer(values, layout.grad))
        before = [[b.values for b in tensors] for tensors in (params, *state)]
        counts = [float(step) for step in steps]
        backend.adamw_(
            [b.tensor for b in params],
            [b.tensor for b in grads],
            [b.tensor for b in state[0]],
            [b.tensor for b in state[1]],
            [b.tensor for b in state[2]] if amsgrad else [],
            steps,
            **hyper,
            **arguments,
            unselected=unselected,
        )
        for i in range(len(LAYOUTS)):
            assert float(steps[i]) == counts[i] + 1, "step was not counted up by one"
            assert torch.equal(grads[i].base, grads[i].before), "a gradient was written to"
            selected = np.ones(numels[i], dtype=bool) if masks[i] is None else masks[i]
            after = [b.values for b in (params[i], *(tensors[i] for tensors in state))]
            old = [tensors[i] for tensors in before]
            results = {}
            for real in real_of(dtype):
                number = {k: real(float(v)) for k, v in hyper.items() if k in ("lr", "beta1", "beta2")}
                number |= {"eps": hyper["eps"], "weight_decay": hyper["weight_decay"]}
                with np.errstate(all="ignore"):
                    grad = to_numpy(grads[i].tensor, real) * real(
                        hyper.get("grad_scale", torch.ones(())).item()
                    )
                    grad = -grad if hyper.get("maximize") else grad
                    grad = np.where(selected, grad * real(hyper.get("rescale", 1.0)), grad)
                    if unselected == "zero_grad":
                        grad = np.where(selected, grad, real(0))
                    arrays = [to_numpy(t, real) for t in old]
                    largest = arrays[3] if amsgrad else None
                    results[real] = adamw(
                        real, arrays[0], grad, arrays[1], arrays[2], largest, counts[i] + 1, **number
                    )
            (truth, scales), (plain, _) = results.values()
            names = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
            for j, (name, got, was) in enumerate(zip(names[: len(old)], after, old, strict=True)):
                what = f"{name} of tensor {i} {LAYOUTS[i].shape}"
                keeps = keeps_param if j == 0 else keeps_state
                judged = selected if keeps else np.ones_like(selected)
                kept = torch.from_numpy(~judged)
                assert_same_bits(got.view(-1)[kept], was.view(-1)[kept], f"unselected {what}")
                assert_within_bar(
                    got.view(-1)[torch.from_numpy(judged)],
                    torch.from_numpy(plain[j][judged]).to(got.dtype),
                    truth[j][judged],
                    scales[j][judged],
                    got.dtype,
                    what,
                )
    for b in (*params, *(b for tensors in state for b in tensors)):
        b.assert_guards_hold("after the updates")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("flags", named(no_flags={}, every_flag=EVERY_FLAG))
def test_adamw_is_the_equation_in_every_dtype(backend, dtypes, mask, flags):
    check_adamw(backend, dtypes, mask, flags, updates=fewer(backend, 3, 1))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("flags", FLAGS)
def test_adamw_is_the_equation_under_every_flag(backend, mask, flags):
    check_adamw(backend, (F32, F32), mask, flags, updates=fewer(backend, 3, 1))


@pytest.mark.parametrize("dtype", named(float64=F64, float32=F32))
@pytest.mark.parametrize(
    "flags",
    named(
        default={},
        weight_decay={"weight_decay": 0.1},
        amsgrad={"amsgrad": True},
        maximize={"maximize": True, "weight_decay": 0.01},
        amsgrad_maximize={"amsgrad": True, "maximize": True, "weight_decay": 0.1},
        tensor_lr={"lr": torch.tensor(0.02), "weight_decay": 0.1},
        float64_tensor_lr={"lr": torch.tensor(0.02, dtype=F64), "weight_decay": 0.1},
        betas_of_zero={"betas": (0.0, 0.0)},
    ),
)
def test_dense_reference_is_torch_optim_adamw_bit_for_bit(dtype, flags):
    rng = np.random.default_rng(2)
    ours = [Buffer(normal(rng, layout.shape, dtype), layout.param).tensor for layout in LAYOUTS]
    theirs = [torch.nn.Parameter(p.clone()) for p in ours]
    flags = {"lr": 0.02, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0} | flags
    optimizer = torch.optim.AdamW(theirs, foreach=False, **flags)
    beta1, beta2 = flags.pop("betas")
    state = [[torch.zeros_like(p) for p in theirs] for _ in range(3)]
    amsgrad = flags.pop("amsgrad", False)
    steps = [torch.zeros(()) for _ in ours]
    for _ in range(4):
        grads = [Buffer(normal(rng, layout.shape, dtype), layout.grad).tensor for layout in LAYOUTS]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g
        optimizer.step()
        reference.adamw_(
            ours, grads, *state[:2], state[2] if amsgrad else [], steps, beta1=beta1, beta2=beta2, **flags
        )
        for i, p in enumerate(theirs):
            assert_same_bits(ours[i].contiguous(), p.detach().contiguous(), f"param {i}")
            assert_same_bits(state[0][i], optimizer.state[p]["exp_avg"], f"exp_avg {i}")
            assert_same_bits(state[1][i], optimizer.state[p]["exp_avg_sq"], f"exp_avg_sq {i}")
            if amsgrad:
                assert_same_bits(state[2][i], optimizer.state[p]["max_exp_avg_sq"], f"max_exp_avg_sq {i}")


def test_adamw_of_no_tensors_does_nothing(backend):
    hyper = HYPER | {"weight_decay": 0.1}
    backend.adamw_([], [], [], [], [], [], **hyper)
    backend.adamw_indexed_([], [], [], [], [], [], [], [], [], **hyper)


def check_stochastic_rounding(backend, geometry=None, mask=None):
    """The stored bfloat16 is the upper neighbour iff the entry's 16 random bits carry."""
    rng = np.random.default_rng(3)
    n, key = 5000, 0xDEADBEEF
    param = normal(rng, (n,), BF16)
    grad, exp_avg = normal(rng, (n,), F32), normal(rng, (n,), F32)
    exp_avg_sq = (normal(rng, (n,), F32).abs() + 0.1) ** 2
    arrays = [to_numpy(t, np.float64) for t in (param, grad, exp_avg, exp_avg_sq)]
    hyper = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    (truth, *_), (scale, *_) = adamw(np.float64, *arrays, None, 4.0, **hyper)
    rounding = Draws(0x0123456789ABCDEF, purpose_draw(WEIGHT_ROUNDING_DRAWS, 9), 0, [key])
    old, step = param.clone(), torch.tensor(3.0)
    selection = {} if mask is None else {"bits": [packed(mask)]}
    backend.adamw_(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        **hyper,
        **selection,
        rounding=rounding,
        geometries=None if geometry is None else [geometry],
    )
    if mask is not None:
        assert_same_bits(
            param[torch.from_numpy(~mask)], old[torch.from_numpy(~mask)], "unselected under rounding"
        )
    judged = np.ones(n, dtype=bool) if mask is None else mask
    spacing = 2.0 ** (np.floor(np.log2(abs(truth))) - 7)  # of bfloat16 around the true value
    fraction, lower = np.modf(abs(truth) / spacing)
    words = words_of(rounding.seed, rounding.draw, key, global_indices(n, geometry or whole(n)))
    carry = fraction + (words & np.uint64(0xFFFF)).astype(np.float64) / 2**16
    expected = np.copysign((lower + (carry >= 1)) * spacing, truth)
    # where float32 arithmetic decides the carry, either neighbour is right
    slack = 4 * 2.0**-23 * scale / spacing + 2.0**-16
    clear = judged & (abs(carry - 1) > slack) & (abs(fraction) > slack) & (abs(1 - fraction) > slack)
    assert clear.sum() > 0.98 * judged.sum()
    got = to_numpy(param, np.float64)
    assert np.array_equal(got[clear], expected[clear]), (
        f"{(got != expected)[clear].sum()} entries rounded otherwise"
    )
    either = (got == np.copysign(lower * spacing, truth)) | (got == np.copysign((lower + 1) * spacing, truth))
    assert (either | (fraction < slack) | (1 - fraction < slack))[judged].all()


@pytest.mark.parametrize(
    "geometry",
    named(whole=None, shard=(1024, 2500, 9000), odd_offset=(7, 5000, 5000), far=(2**40 + 5, 50, 1 << 20)),
)
def test_stochastic_rounding_adds_the_entrys_own_random_bits(backend, geometry):
    check_stochastic_rounding(backend, geometry)


def test_stochastic_rounding_leaves_unselected_entries_alone(backend):
    check_stochastic_rounding(backend, mask=np.random.default_rng(4).random(5000) < 0.3)


def test_stochastic_rounding_leaves_other_dtypes_alone(backend):
    check_other_dtypes_ignore_rounding(backend)


def check_other_dtypes_ignore_rounding(backend):
    for dtype in (F32, F16, F64):
        results = []
        for rounding in (None, Draws(1, 2, 0, [3])):
            param = normal(np.random.default_rng(5), (100,), dtype)
            moments = [torch.zeros_like(param), torch.zeros_like(param)]
            backend.adamw_(
                [param], [torch.ones_like(param)], moments[:1], moments[1:], [], [torch.zeros(())],
                **HYPER, rounding=rounding,
            )  # fmt: skip
            results.append(param)
        assert_same_bits(*results, f"{dtype} parameter")


def test_a_mask_of_one_word_still_rounds_every_entry_by_itself(backend):
    # unit="tensor" draws one word for the mask; weights that all round the same way would drift together
    n = 1000
    param, grad = torch.ones(n, dtype=BF16), torch.ones(n, dtype=BF16)
    backend.adamw_(
        [param], [grad], [torch.zeros(n)], [torch.zeros(n)], [], [torch.zeros(())],
        lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0,
        seeded=Draws(1, 0, 2**32, [5], one_word=True), rounding=Draws(1, 1 << 28, 0, [5]),
    )  # fmt: skip
    moved = int((param != 1).sum())
    assert 0 < moved < n, f"{moved} of {n} equal entries were rounded down"


def test_stochastic_rounding_keeps_non_finite_values():
    patterns = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7F800000, -0x800000], dtype=torch.int32)
    rounded = reference.round_stochastically(patterns.view(F32).repeat(500), 1, 2, 3, whole(2500)).view(
        500, 5
    )
    assert rounded[:, :3].isnan().all()
    assert (rounded[:, 3] == float("inf")).all() and (rounded[:, 4] == float("-inf")).all()


# --- adamw_indexed_ ---------------------------------------------------------------------------------------


def make_indices(rng, offset=0):
    numels = [int(np.prod(layout.shape)) for layout in LAYOUTS]
    return [
        torch.from_numpy(np.flatnonzero(some_selection(rng, i + offset, n))).int()
        for i, n in enumerate(numels)
    ]


INDEXED_DTYPES = named(float64=F64, float32=F32, bfloat16=BF16, float16=F16)
INDEXED_FORMS = named(
    plain={},
    masters={"masters": True},
    ages={"ages": True},
    masters_and_ages={"masters": True, "ages": True},
    compact_grads={"compact_grads": True},
    all_of_them={"masters": True, "ages": True, "compact_grads": True},
)


def check_indexed(backend, dtype, flags, *, masters=False, ages=False, compact_grads=False, updates=3):
    """Several updates of listed entries; a few masters go stale before each."""
    rng = np.random.default_rng(6)
    hyper = HYPER | {"lr": 0.3, "beta2": 0.95} | flags
    amsgrad = hyper.pop("amsgrad", False)
    compact_dtype = F64 if dtype == F64 else F32
    masters = masters and dtype in (BF16, F16)
    indices = make_indices(rng)
    sizes = [where.numel() for where in indices]
    params, master = [], []
    for layout, where in zip(LAYOUTS, indices, strict=True):
        values = normal(rng, layout.shape, dtype)
        precise = normal(rng, (where.numel(),), F32)
        if masters:
            values.view(-1)[where.long()] = precise.to(dtype)
        listed = np.zeros(values.numel(), dtype=bool)
        listed[where.numpy()] = True
        plant(values, np.flatnonzero(~listed))
        params.append(Buffer(values, layout.param))
        master.append(precise)
    state = [
        [normal(rng, (n,), compact_dtype) for n in sizes],
        [(normal(rng, (n,), compact_dtype).abs() + 0.1) ** 2 for n in sizes],
        [(normal(rng, (n,), compact_dtype).abs() + 0.1) ** 2 for n in sizes],
    ]
    age = [torch.from_numpy(rng.integers(0, 5, n)).int() for n in sizes]
    steps = [torch.tensor(float(i)) for i in range(len(LAYOUTS))]

    for _ in range(updates):
        grads = []
        for layout, where in zip(LAYOUTS, indices, strict=True):
            values = normal(rng, (where.numel(),) if compact_grads else layout.shape, dtype)
            grads.append(Buffer(values, "contiguous" if compact_grads else layout.grad))
        for p, where in zip(params, indices, strict=True):
            if masters and where.numel() > 2:
                # somebody writes to the parameter behind the optimizer's back
                stale = p.values
                stale.view(-1)[where[::3].long()] = normal(rng, (where[::3].numel(),), dtype)
                p.tensor.copy_(stale)
        before = [p.values for p in params]
        old_master, old_age = [m.clone() for m in master], [a.clone() for a in age]
        old_state = [[t.clone() for t in tensors] for tensors in state]
        counts = [float(step) for step in steps]
        backend.adamw_indexed_(
            [b.tensor for b in params],
            [b.tensor for b in grads],
            indices,
            state[0],
            state[1],
            state[2] if amsgrad else [],
            master if masters else [],
            age if ages else [],
            steps,
            **hyper,
            compact_grads=compact_grads,
        )
        for i, where in enumerate(indices):
            what, places = f"tensor {i} {LAYOUTS[i].shape}", where.long()
            assert float(steps[i]) == counts[i] + 1, "step was not counted up by one"
            assert torch.equal(grads[i].base, grads[i].before), "a gradient was written to"
            assert torch.equal(age[i], old_age[i] + int(ages)), "ages"
            after = params[i].values.view(-1)
            others = torch.ones(after.numel(), dtype=torch.bool)
            others[places] = False
            assert_same_bits(after[others], before[i].view(-1)[others], f"unlisted entries of {what}")
            start = before[i].view(-1)[places]
            if masters:
                stale = old_master[i].to(dtype) != start
                start = torch.where(stale, start.float(), old_master[i])
                assert_same_bits(after[places], master[i].to(dtype), f"rounded masters of {what}")
            step = (old_age[i].double().numpy() if ages else np.full(sizes[i], counts[i])) + 1
            grad_values = grads[i].tensor if compact_grads else grads[i].values.view(-1)[places]
            results = {}
            for real in real_of(dtype):
                number = {k: real(float(v)) for k, v in hyper.items() if k in ("lr", "beta1", "beta2")}
                number |= {"eps": hyper["eps"], "weight_decay": hyper["weight_decay"]}
                grad = to_numpy(grad_values, real) * real(hyper.get("grad_scale", torch.ones(())).item())
                grad = -grad if hyper.get("maximize") else grad
                arrays = [to_numpy(tensors[i], real) for tensors in old_state]
                results[real] = adamw(
                    real,
                    to_numpy(start, real),
                    grad,
                    *arrays[:2],
                    arrays[2] if amsgrad else None,
                    step,
                    **number,
                )
            (truth, scales), (plain, _) = results.values()
            got = [master[i] if masters else after[places], *(tensors[i] for tensors in state)]
            for j in range(4 if amsgrad else 3):
                plain_j = torch.from_numpy(plain[j]).to(got[j].dtype)
                assert_within_bar(got[j], plain_j, truth[j], scales[j], got[j].dtype, f"value {j} of {what}")
            if not amsgrad:
                assert_same_bits(state[2][i], old_state[2][i], "a moment that was not given")
            if not masters:
                assert_same_bits(master[i], old_master[i], "a master that was not given")
    for b in params:
        b.assert_guards_hold("after the updates")


@pytest.mark.parametrize("form", INDEXED_FORMS)
@pytest.mark.parametrize("dtype", INDEXED_DTYPES)
@pytest.mark.parametrize("flags", named(no_flags={}, every_flag=EVERY_FLAG))
def test_indexed_adamw_is_the_equation_on_the_listed_entries(backend, dtype, form, flags):
    check_indexed(backend, dtype, flags, **form)


def check_indexed_compact_grads(backend, dtype, flags):
    check_indexed(backend, dtype, flags, compact_grads=True)


def check_stale_masters(backend):
    check_indexed(backend, BF16, {}, masters=True)


def check_indexed_equals_bits(backend, dtype, flags):
    rng = np.random.default_rng(7)
    indices = make_indices(rng, offset=2)
    hyper = HYPER | flags
    amsgrad = hyper.pop("amsgrad", False)
    state_dtype = F64 if dtype == F64 else F32
    shaped = [normal(rng, layout.shape, dtype) for layout in LAYOUTS]
    listed = [p.clone() for p in shaped]
    state = [[torch.zeros(p.shape, dtype=state_dtype) for p in shaped] for _ in range(3)]
    compact = [[torch.zeros(where.numel(), dtype=state_dtype) for where in indices] for _ in range(3)]
    bits, steps = [], [[torch.zeros(()) for _ in shaped] for _ in range(2)]
    for p, where in zip(shaped, indices, strict=True):
        mask = np.zeros(p.numel(), dtype=bool)
        mask[where.numpy()] = True
        bits.append(packed(mask))
    for _ in range(4):
        grads = [normal(rng, layout.shape, dtype) for layout in LAYOUTS]
        last = [state[2] if amsgrad else [], compact[2] if amsgrad else []]
        backend.adamw_(shaped, grads, *state[:2], last[0], steps[0], bits=bits, **hyper)
        backend.adamw_indexed_(listed, grads, indices, *compact[:2], last[1], [], [], steps[1], **hyper)
    for i, where in enumerate(indices):
        assert_same_bits(listed[i], shaped[i], f"param {i}")
        for j in range(3):
            assert_same_bits(compact[j][i], state[j][i].view(-1)[where.long()], f"moment {j} of tensor {i}")


@pytest.mark.parametrize("dtype", INDEXED_DTYPES)
@pytest.mark.parametrize("flags", named(no_flags={}, every_flag=EVERY_FLAG))
def test_indexed_adamw_equals_adamw_with_bits_bit_for_bit(backend, dtype, flags):
    check_indexed_equals_bits(backend, dtype, flags)


def check_ages(backend, dtype):
    """An entry of age a moves exactly as it would in a tensor of its own with step a."""
    rng = np.random.default_rng(8)
    n = 60
    hyper = HYPER | {"weight_decay": 0.1}
    state_dtype = F64 if dtype == F64 else F32
    param, where = normal(rng, (n,), dtype), torch.arange(n, dtype=torch.int32)
    exp_avg = normal(rng, (n,), state_dtype)
    exp_avg_sq = normal(rng, (n,), state_dtype).square()
    ages = torch.from_numpy(rng.integers(0, 9, n)).int()
    alone = [
        [
            param[i : i + 1].clone(),
            exp_avg[i : i + 1].clone(),
            exp_avg_sq[i : i + 1].clone(),
            ages[i].float().clone(),
        ]
        for i in range(n)
    ]
    step = torch.tensor(100.0)
    for _ in range(3):
        grad = normal(rng, (n,), dtype)
        backend.adamw_indexed_(
            [param], [grad], [where], [exp_avg], [exp_avg_sq], [], [], [ages], [step], **hyper
        )
        for i, (p, m, v, a) in enumerate(alone):
            zero = torch.zeros(1, dtype=torch.int32)
            backend.adamw_indexed_([p], [grad[i : i + 1]], [zero], [m], [v], [], [], [], [a], **hyper)
    for i, (p, m, v, a) in enumerate(alone):
        for got, want in ((param, p), (exp_avg, m), (exp_avg_sq, v)):
            assert_same_bits(got[i : i + 1], want, f"entry {i}")
        assert int(ages[i]) == int(a)
    assert float(step) == 103


@pytest.mark.parametrize("dtype", INDEXED_DTYPES)
def test_an_entry_of_age_a_moves_as_in_a_tensor_of_its_own(backend, dtype):
    check_ages(backend, dtype)


@pytest.mark.parametrize(
    "dtypes",
    named(
        float64=(F64, F64), float32=(F32, F32), bfloat16=(BF16, F32), float16=(F16, F32),
        bfloat16_gathered_as_float32=(BF16, BF16),
    ),
)  # fmt: skip
@pytest.mark.parametrize(
    "flags",
    named(
        plain={}, masters={"masters": True}, ages={"ages": True}, amsgrad={"amsgrad": True},
        grad_scale={"grad_scale": torch.tensor(0.37)}, maximize={"maximize": True},
        all_of_them={
            "masters": True, "ages": True, "amsgrad": True, "grad_scale": torch.tensor(0.37),
            "maximize": True, "weight_decay": 0.1, "lr": torch.tensor(0.3),
        },
    ),
)  # fmt: skip
def test_gathered_gradients_update_as_dense_ones_do_bit_for_bit(backend, dtypes, flags):
    dtype, grad_dtype = dtypes
    rng, hyper = np.random.default_rng(44), HYPER | {"lr": 0.3} | flags
    with_masters = hyper.pop("masters", False) and dtype in (BF16, F16)
    with_ages, amsgrad = hyper.pop("ages", False), hyper.pop("amsgrad", False)
    indices, wide = make_indices(rng), F64 if dtype == F64 else F32
    sizes = [where.numel() for where in indices]
    state = [[normal(rng, (n,), wide).square() for n in sizes] for _ in range(3)]
    ages = [torch.from_numpy(rng.integers(0, 5, n)).int() for n in sizes] if with_ages else []
    params = [normal(rng, layout.shape, dtype) for layout in LAYOUTS]
    masters = []
    if with_masters:
        masters = [normal(rng, (n,), F32) for n in sizes]
        for param, where, master in zip(params, indices, masters, strict=True):
            # the last half is stale
            param.view(-1)[where[: len(where) // 2].long()] = master[: len(where) // 2].to(dtype)
    start = [
        params,
        *state[:2],
        state[2] if amsgrad else [],
        masters,
        ages,
        [torch.tensor(3.0) for _ in sizes],
    ]
    results = []
    for compact in (False, True):
        columns, draw = copies(start), np.random.default_rng(45)
        for _ in range(2):
            grads = [Buffer(normal(draw, layout.shape, grad_dtype), layout.grad).tensor for layout in LAYOUTS]
            if compact:
                # from the middle of a buffer on, as of several tensors together
                grads = [
                    torch.cat([torch.zeros(3, dtype=wide), grad.reshape(-1)[where.long()].to(wide)])[3:]
                    for grad, where in zip(grads, indices, strict=True)
                ]
            param, *rest = columns
            backend.adamw_indexed_(param, grads, indices, *rest, **hyper, compact_grads=compact)
        results.append(columns)
    for i, (dense, gathered) in enumerate(zip(*results, strict=True)):
        for want, got in zip(dense, gathered, strict=True):
            assert_same_bits(got, want, f"column {i}")
    assert not torch.equal(results[0][0][7], params[7])


def test_int64_indices_are_taken_too(backend):
    results = []
    for dtype in (torch.int32, torch.int64):
        param, where = torch.zeros(10), torch.tensor([1, 4, 9], dtype=dtype)
        backend.adamw_indexed_(
            [param], [torch.ones(10)], [where], [torch.zeros(3)], [torch.zeros(3)],
            [], [], [], [torch.zeros(())], **HYPER,
        )  # fmt: skip
        results.append(param)
    assert results[0].nonzero().view(-1).tolist() == [1, 4, 9]
    assert_same_bits(*results, "param")


# --- accumulate_ ------------------------------------------------------------------------------------------


def rounded_by(total, words):
    """float32 as bfloat16, up where the low 16 bits of the word carry; to nearest where not finite."""
    low = (words & np.uint64(0xFFFF)).astype(np.int64).reshape(total.shape)
    carried = ((total.view(np.int32).astype(np.int64) + low) >> 16).astype(np.int16)
    nearest = bits_of(torch.from_numpy(total).to(BF16)).numpy()
    return torch.from_numpy(np.where(np.isfinite(total), carried, nearest)).view(BF16)


STATISTIC_ROUNDING = Draws(
    # a seed that is a negative number in 64 bits, keys that are none in 32
    0xFEDC_BA98_7654_3210, purpose_draw(STATISTIC_ROUNDING_DRAWS, 5), 0,
    [0xF000_0000 + 977 * i for i in range(len(LAYOUTS))],
)  # fmt: skip
PLACES = {
    "whole": None,
    "run_of_tiles": lambda n: (3072, max(n, 1), max(n, 1)),
    "run_from_inside_a_tile": lambda n: (1023, max(n, 1), max(n, 1)),
    # with addresses that are aligned where their tile of the rule begins
    "run_from_an_aligned_place": lambda n: (2**40 + 512, max(n, 1), max(n, 1)),
    "short_rows": lambda n: (77, 13, 40),
    "rows_of_tiles": lambda n: (1024, 1024, 3072),
    "long_rows": lambda n: (2**35 + 5, 1500, 70_000),
}


def check_accumulate(backend, kind, statistic_dtype, grad_dtype, scaled, places=None):
    """Multiply, then add, each rounded on its own, as NumPy does it. With `places`, bfloat16 statistics are
    rounded by the words of the entries there.
    """
    rng = np.random.default_rng(9)
    statistics, grads, expected, spoiled = [], [], [], []
    rounding = geometries = None
    if places is not None:
        rounding, placed = STATISTIC_ROUNDING, PLACES[places] or whole
        geometries = [placed(math.prod(layout.shape)) for layout in LAYOUTS]
    scales = [torch.tensor(0.1 + 0.3 * i) for i in range(len(LAYOUTS))]
    for i, layout in enumerate(LAYOUTS):
        numel = int(np.prod(layout.shape))
        grad = (
            normal(rng, layout.shape, F64) * 10.0 ** torch.from_numpy(rng.integers(-3, 4, layout.shape))
        ).to(grad_dtype)
        if i % 3 == 0 and numel:
            grad.view(-1)[:: max(numel // 5, 1)] = float("nan")
            grad.view(-1)[numel // 2] = float("inf")
            grad.view(-1)[-1] = float("-inf")
        statistics.append(Buffer(normal(rng, layout.shape, statistic_dtype), layout.state))
        grads.append(Buffer(grad, layout.grad))
        value = grads[-1].values.float().numpy()
        if scaled:
            value = value * np.float32(scales[i].item())
        finite = np.isfinite(value)
        spoiled.append(not finite.all())
        value = np.where(finite, value, np.float32(0))
        value = {"squares": value * value, "signed": value, "absolute": abs(value)}[kind]
        assert value.dtype == np.float32
        total = np.asarray(statistics[-1].values.float().numpy() + value)
        if rounding is not None and statistic_dtype == BF16:
            entries = global_indices(numel, geometries[i])
            expected.append(rounded_by(total, words_of(*rounding[:2], rounding.keys[i], entries)))
        else:
            expected.append(torch.from_numpy(total).to(statistic_dtype))
    assert any(spoiled) and not all(spoiled)
    flags = [torch.tensor(i == 5) for i in range(len(LAYOUTS))]
    backend.accumulate_(
        [b.tensor for b in statistics],
        [b.tensor for b in grads],
        flags,
        kind=kind,
        grad_scales=scales if scaled else None,
        **({} if rounding is None else {"rounding": rounding}),
        **({} if places in (None, "whole") else {"geometries": geometries}),
    )
    for i in range(len(LAYOUTS)):
        assert_same_bits(statistics[i].values, expected[i], f"statistic {i} {LAYOUTS[i].shape}")
        assert bool(flags[i]) == (spoiled[i] or i == 5), f"flag {i}"
        assert torch.equal(grads[i].base, grads[i].before), "a gradient was written to"
        statistics[i].assert_guards_hold("statistic")


@pytest.mark.parametrize("kind", ["squares", "signed", "absolute"])
@pytest.mark.parametrize("statistic_dtype", named(float32=F32, bfloat16=BF16))
@pytest.mark.parametrize(
    "grad_dtype", named(float64_grads=F64, float32_grads=F32, bfloat16_grads=BF16, float16_grads=F16)
)
@pytest.mark.parametrize("scaled", named(unscaled=False, scaled=True))
def test_accumulate_is_multiply_then_add_bit_for_bit(backend, kind, statistic_dtype, grad_dtype, scaled):
    check_accumulate(backend, kind, statistic_dtype, grad_dtype, scaled)


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("grad_dtype", named(float32_grads=F32, bfloat16_grads=BF16))
def test_a_rounded_statistic_takes_the_words_of_its_own_entries_bit_for_bit(backend, grad_dtype, places):
    check_accumulate(backend, "squares", BF16, grad_dtype, True, places)


@pytest.mark.parametrize("kind", ["signed", "absolute"])
@pytest.mark.parametrize("grad_dtype", named(float64_grads=F64, float16_grads=F16))
def test_statistics_of_every_kind_are_rounded_alike(backend, kind, grad_dtype):
    check_accumulate(backend, kind, BF16, grad_dtype, False, "run_from_inside_a_tile")


@pytest.mark.parametrize("grad_dtype", named(float32_grads=F32, bfloat16_grads=BF16))
def test_rounding_leaves_float32_statistics_alone(backend, grad_dtype):
    check_accumulate(backend, "squares", F32, grad_dtype, True, "long_rows")


def test_statistics_of_two_dtypes_share_a_rounded_call(backend):
    rng, numels = np.random.default_rng(41), [5000, 4096, 1023, 8192, 100]
    dtypes, keys = [BF16, F32, BF16, BF16, F32], [9, 8, 7, 6, 5]
    rounding = STATISTIC_ROUNDING._replace(keys=keys)
    # each has a place of its own
    geometries = [(512 * i, n, n) for i, n in enumerate(numels)]
    statistics = [normal(rng, (n,), dtype) for n, dtype in zip(numels, dtypes, strict=True)]
    grads = [normal(rng, (n,), F32) for n in numels]
    totals = [s.float() + g for s, g in zip(statistics, grads, strict=True)]
    backend.accumulate_(
        statistics, grads, [torch.tensor(False) for _ in numels], kind="signed",
        rounding=rounding, geometries=geometries,
    )  # fmt: skip
    for i, (statistic, total) in enumerate(zip(statistics, totals, strict=True)):
        words = words_of(*rounding[:2], keys[i], global_indices(numels[i], geometries[i]))
        expected = rounded_by(total.numpy(), words) if dtypes[i] == BF16 else total
        assert_same_bits(statistic, expected, f"statistic {i}")


def test_sums_that_are_not_finite_are_rounded_to_nearest(backend):
    # the largest bfloat16 and its opposite overflow in float32 for some, and by the carry for others
    largest, n = torch.finfo(BF16).max, 4096
    start = torch.tensor([math.inf, -math.inf, math.nan, largest, -largest, largest, 0.0, -0.0])
    added = torch.tensor([1.0, 1.0, 1.0, 3e38, -3e38, largest / 300, 0.0, -0.0])
    statistic, grad = (values.repeat(n // 8 + 1) for values in (start, added))
    statistic, total = statistic.to(BF16), statistic.to(BF16).float() + grad
    backend.accumulate_(
        [statistic], [grad], [torch.tensor(False)], kind="signed",
        rounding=STATISTIC_ROUNDING._replace(keys=[3]),
    )  # fmt: skip
    words = words_of(*STATISTIC_ROUNDING[:2], 3, np.arange(statistic.numel()))
    expected = rounded_by(total.numpy(), words)
    # every NaN is as good as any other
    assert torch.equal(statistic.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert_same_bits(statistic[known], expected[known], "statistic")
    carried = statistic.view(-1, 8)[:, 5].isinf()
    assert carried.any() and not carried.all()


def check_unbiased(backend):
    """Additions of a quarter of the spacing, which rounding to nearest would lose one and all."""
    n, updates = 6000, 32
    statistic, grad, added = torch.ones(n, dtype=BF16), torch.full((n,), 2.0**-9), 2.0**-9
    for update in range(updates):
        rounding = Draws(3, purpose_draw(STATISTIC_ROUNDING_DRAWS, update), 0, [8])
        backend.accumulate_([statistic], [grad], [torch.tensor(False)], kind="signed", rounding=rounding)
    got = to_numpy(statistic, np.float64) - 1
    assert got.max() < 1, "the spacing grew"
    # each step is up by a whole spacing with a probability of 1/4: a binomial number of ups
    mean, variance = updates * added, updates * 3 / 16 * 2.0**-14
    assert abs(got.mean() - mean) < 5 * math.sqrt(variance / n), f"{got.mean()} for {mean}"
    assert abs(got.var() / variance - 1) < 5 * math.sqrt(2 / n), f"{got.var()} for {variance}"


def test_the_mean_of_many_rounded_accumulations_is_unbiased(backend):
    check_unbiased(backend)


SLICES = named(
    shard_0=[(slice(0, 37), slice(None)), (slice(37, 90), slice(None))],
    shard_1=[(slice(None), slice(0, 64)), (slice(None), slice(64, 131))],
    blocks=[(slice(a, b), slice(c, d)) for a, b in ((0, 23), (23, 90)) for c, d in ((0, 31), (31, 131))],
)


@pytest.mark.parametrize("blocks", SLICES)
def test_shards_round_statistics_as_the_whole_tensor_does(backend, blocks):
    rng, shape = np.random.default_rng(42), (90, 131)
    rounding = STATISTIC_ROUNDING._replace(keys=[4])
    start, grad = normal(rng, shape, BF16), normal(rng, shape, F32)
    full = start.clone()
    backend.accumulate_([full], [grad], [torch.tensor(False)], kind="squares", rounding=rounding)
    for block in blocks:
        _, geometry = block_geometry(shape, block)
        part = start[block].contiguous()
        backend.accumulate_(
            [part], [grad[block]], [torch.tensor(False)], kind="squares",
            rounding=rounding, geometries=[geometry],
        )  # fmt: skip
        assert_same_bits(part, full[block].contiguous(), f"block {block}")


def check_rounded_counts(backend, per_tensor=True, absolute=True, places="run_from_an_aligned_place"):
    """The first round counts the statistics as they were stored."""
    rng = np.random.default_rng(43)
    statistics = [normal(rng, layout.shape, BF16) for layout in LAYOUTS]
    grads = [normal(rng, layout.shape, (F32, BF16)[i % 2]) for i, layout in enumerate(LAYOUTS)]
    geometries = [PLACES[places](math.prod(layout.shape)) for layout in LAYOUTS]
    flags = [torch.tensor(False) for _ in LAYOUTS]
    apart, nearest = copies([statistics, statistics])
    how = {"kind": "signed"}
    rounded = {"rounding": STATISTIC_ROUNDING, "geometries": geometries}
    counts = torch.ones(len(LAYOUTS) if per_tensor else 1, 2048, dtype=torch.int64)
    backend.accumulate_(statistics, grads, flags, **how, **rounded, first_counts=counts, absolute=absolute)
    backend.accumulate_(apart, grads, flags, **how, **rounded)
    backend.accumulate_(nearest, grads, flags, **how)
    for a, b in zip(statistics, apart, strict=True):
        assert_same_bits(a, b, "statistic")
    first = {"shift": 16 - 11, "width": 11, "per_tensor": per_tensor, "absolute": absolute}
    first["prefixes"] = torch.zeros(len(LAYOUTS), dtype=torch.int64)
    assert torch.equal(counts, reference.histogram(apart, **first) + 1)
    assert not torch.equal(counts, reference.histogram(nearest, **first) + 1)


@pytest.mark.parametrize("per_tensor", named(summed=False, per_tensor=True))
@pytest.mark.parametrize("absolute", named(as_they_are=False, by_magnitude=True))
@pytest.mark.parametrize("places", ["run_from_an_aligned_place", "short_rows"])
def test_the_first_round_counts_rounded_statistics_as_they_are_stored(backend, per_tensor, absolute, places):
    check_rounded_counts(backend, per_tensor, absolute, places)


@pytest.mark.parametrize(
    "missing",
    named(keys={"keys": [1]}, all_keys={"keys": []}, geometries={"geometries": [(0, 5, 5)]}),
)
def test_rounding_without_a_key_or_a_place_for_every_statistic_is_refused(backend, missing):
    given = {"rounding": STATISTIC_ROUNDING._replace(keys=missing.get("keys", [1, 2]))}
    given |= {"geometries": missing["geometries"]} if "geometries" in missing else {}
    statistics, flags = [torch.ones(5, dtype=BF16) for _ in range(2)], [torch.tensor(False)] * 2
    with pytest.raises((IndexError, RuntimeError)):
        backend.accumulate_(statistics, [torch.ones(5)] * 2, flags, kind="squares", **given)


def test_a_gradient_that_its_scale_makes_infinite_adds_zero_and_raises_the_flag(backend):
    statistic, flag = torch.ones(3), torch.tensor(False)
    backend.accumulate_(
        [statistic],
        [torch.tensor([1e38, 1.0, -1e38])],
        [flag],
        kind="signed",
        grad_scales=[torch.tensor(1e3)],
    )
    assert statistic.tolist() == [1.0, 1001.0, 1.0] and bool(flag)


def dense_arguments(rng, dtype=F32):
    """Parameters, gradients, moments and steps of a ragged list."""
    shaped = [[normal(rng, layout.shape, dtype) for layout in LAYOUTS] for _ in range(3)]
    squares = [normal(rng, layout.shape, dtype).square() for layout in LAYOUTS]
    return shaped[0], shaped[1], shaped[2], squares, [], [torch.tensor(3.0) for _ in LAYOUTS]


def copies(arguments):
    return [[t.clone() for t in column] for column in arguments]


def check_observing(backend, arguments, statistics, flags, kind, scales, hyper):
    """A step that observes leaves what `accumulate_` and then the update leave, bit for bit."""
    apart, apart_statistics, apart_flags = copies(arguments), *copies([statistics, flags])
    backend.accumulate_(apart_statistics, apart[1], apart_flags, kind=kind, grad_scales=scales)
    backend.adamw_(*apart, **HYPER | hyper)
    backend.adamw_(
        *arguments, **HYPER | hyper,
        statistics=statistics, nonfinite=flags, kind=kind, statistic_scales=scales,
    )  # fmt: skip
    for together, alone in zip(
        [*arguments, statistics, flags], [*apart, apart_statistics, apart_flags], strict=True
    ):
        for i, (a, b) in enumerate(zip(together, alone, strict=True)):
            assert_same_bits(a, b, f"tensor {i}")


@pytest.mark.parametrize(
    "mask", [("everything", "frozen"), ("bits", "zero_grad"), ("seeded", "track")], ids=str
)
@pytest.mark.parametrize("scaled", named(unscaled=False, scaled=True))
def test_a_step_that_observes_is_accumulate_and_then_the_update_bit_for_bit(backend, mask, scaled):
    rng = np.random.default_rng(30)
    form, unselected = mask
    arguments = dense_arguments(rng, BF16)
    arguments[1][5][::7] = float("nan")
    selection, _ = make_selection(rng, form, [p.numel() for p in arguments[0]])
    statistics = [normal(rng, layout.shape, F32).square() for layout in LAYOUTS]
    flags = [torch.tensor(False) for _ in LAYOUTS]
    scales = [torch.tensor(0.3 + i) for i in range(len(LAYOUTS))] if scaled else None
    hyper = selection | {"weight_decay": 0.1, "grad_scale": torch.tensor(0.5), "unselected": unselected}
    check_observing(backend, arguments, statistics, flags, "squares", scales, hyper)
    assert [bool(flag) for flag in flags] == [i == 5 for i in range(len(LAYOUTS))]


@pytest.mark.parametrize("kind", ["squares", "signed", "absolute"])
@pytest.mark.parametrize("one_word", named(by_entry=False, by_tensor=True))
def test_a_step_observes_gradients_as_they_are_whatever_the_update_makes_of_them(backend, one_word, kind):
    """Neither negated, nor rescaled, nor masked; statistics of two dtypes share the call."""
    rng = np.random.default_rng(33)
    arguments = dense_arguments(rng)
    # one entry, in a full tile: nothing else may raise the flag of its tensor
    arguments[1][13][5] = float("inf")
    seeded = Draws(34, 35, 2**31, [int(key) for key in rng.integers(2**32, size=len(LAYOUTS))], one_word)
    statistics = [normal(rng, layout.shape, (F32, BF16)[i % 2]) for i, layout in enumerate(LAYOUTS)]
    flags = [torch.tensor(False) for _ in LAYOUTS]
    hyper = {"seeded": seeded, "rescale": 2.0, "maximize": True}
    check_observing(backend, arguments, statistics, flags, kind, None, hyper)
    assert [bool(flag) for flag in flags] == [i == 13 for i in range(len(LAYOUTS))]


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_found_inf_leaves_everything_as_it_was(backend, lr):
    rng = np.random.default_rng(31)
    hyper = HYPER | {"lr": lr}
    indices = make_indices(rng)
    compact = [[normal(rng, (where.numel(),), F32).abs() for where in indices] for _ in range(2)]
    for found in (1.0, 0.0):
        dense = dense_arguments(rng)
        listed = [dense[0], dense[1], indices, *compact, [], [], [], dense[5]]
        for verb, arguments in ((backend.adamw_, dense), (backend.adamw_indexed_, listed)):
            before = copies(arguments)
            verb(*arguments, **hyper, found_inf=torch.tensor(found))
            expected = copies(before)
            if not found:
                verb(*expected, **hyper)
            for now, want in zip(arguments, expected, strict=True):
                for i, (a, b) in enumerate(zip(now, want, strict=True)):
                    assert_same_bits(a, b, f"tensor {i} with found_inf {found}")


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_found_inf_observes_nothing(backend, lr):
    rng = np.random.default_rng(36)
    arguments = dense_arguments(rng)
    arguments[1][5][3] = float("nan")
    columns = [*arguments, [normal(rng, layout.shape, F32) for layout in LAYOUTS]]
    columns.append([torch.tensor(False) for _ in LAYOUTS])
    before = copies(columns)
    backend.adamw_(
        *arguments, **HYPER | {"lr": lr}, found_inf=torch.tensor(1.0),
        statistics=columns[-2], nonfinite=columns[-1], kind="signed",
    )  # fmt: skip
    for now, old in zip(columns, before, strict=True):
        for i, (a, b) in enumerate(zip(now, old, strict=True)):
            assert_same_bits(a, b, f"tensor {i}")


@pytest.mark.parametrize("dtype", named(float32=F32, bfloat16=BF16))
@pytest.mark.parametrize("per_tensor", named(summed=False, per_tensor=True))
@pytest.mark.parametrize("absolute", named(as_they_are=False, by_magnitude=True))
@pytest.mark.parametrize("other", named(grads_of_one_dtype=F32, of_two=BF16))
def test_the_first_round_rides_on_the_last_accumulation(backend, other, dtype, per_tensor, absolute):
    rng = np.random.default_rng(32)
    statistics = [normal(rng, layout.shape, dtype) for layout in LAYOUTS]
    grads = [normal(rng, layout.shape, (F32, other)[i % 2]) for i, layout in enumerate(LAYOUTS)]
    grads[13][5] = float("inf")
    flags = [torch.tensor(False) for _ in LAYOUTS]
    apart, apart_flags = copies([statistics, flags])
    counts = torch.ones(len(LAYOUTS) if per_tensor else 1, 2048, dtype=torch.int64)
    how = {"kind": "squares" if absolute else "signed"}
    how["grad_scales"] = [torch.tensor(0.3 + i) for i in range(len(LAYOUTS))]
    backend.accumulate_(statistics, grads, flags, **how, first_counts=counts, absolute=absolute)
    backend.accumulate_(apart, grads, apart_flags, **how)
    assert flags == apart_flags and bool(flags[13])
    expected = reference.histogram(
        apart, shift=(16 if dtype == BF16 else 32) - 11, width=11, per_tensor=per_tensor, absolute=absolute,
        prefixes=torch.zeros(len(LAYOUTS), dtype=torch.int64),
    )  # fmt: skip
    assert torch.equal(counts, expected + 1)
    for a, b in zip(statistics, apart, strict=True):
        assert_same_bits(a, b, "statistic")


# --- the seeded rule --------------------------------------------------------------------------------------

KNOWN_ANSWERS = named(
    zeros=((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ones=((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    pi=(
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize("answer", KNOWN_ANSWERS)
def test_the_oracle_gives_the_published_philox_answers(answer):
    counter, key, words = answer
    assert philox_exact(counter, key) == words


def drawn(backend, seeded, numel, geometry):
    """The mask that a backend draws, seen through what it trains."""
    param = torch.zeros(numel)
    backend.adamw_(
        [param], [torch.ones(numel)], [torch.zeros(numel)], [torch.zeros(numel)], [], [torch.zeros(())],
        **HYPER, seeded=seeded, geometries=[geometry],
    )  # fmt: skip
    return (param != 0).numpy()


def check_words(words):
    """Words against Python integers: any seed, draw and key, entries in and beyond the low counter word."""
    entries = [0, 256, 512, 768]
    assert words(0, 0, 0, np.array(entries)).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    rng = np.random.default_rng(10)
    ones = 2**32 - 1
    rows = [
        (2**63 - 1, ones, ones),
        (2**32, 0, 0),
        (ones, 2**31, 2**31),
        (0xA409382285A308D3 >> 1, 0x13198A2E, 0x03707344),
    ]
    rows += [
        (int(rng.integers(2**63)), int(rng.integers(2**32)), int(rng.integers(2**32))) for _ in range(20)
    ]
    for seed, draw, key in rows:
        entries = [
            0,
            1,
            255,
            256,
            1023,
            1024,
            1025,
            2**31,
            2**32 - 1,
            2**34 - 1,
            2**34,
            2**34 + 257,
            2**44 - 1,
            2**62 + 999,
        ]
        entries += [int(e) for e in rng.integers(2**40, size=10)]
        got = words(seed, draw, key, np.array(entries)).tolist()
        assert got == [word_exact(seed, draw, key, e) for e in entries], (seed, draw, key)


def test_the_array_oracle_agrees_with_python_integers():
    check_words(words_of)


def test_philox_words_are_those_of_python_integers():
    check_words(lambda seed, draw, key, e: reference.philox_words(seed, draw, key, torch.from_numpy(e)))


SEEDED_GEOMETRIES = [
    pytest.param(
        numel, (offset, inner or max(numel, 1), stride or max(numel, 1)), id=f"{numel}_entries_from_{name}"
    )
    for numel in (0, 1, 31, 1023, 1024, 1025, 5000)
    for name, offset, inner, stride in (
        ("start", 0, 0, 0),
        ("inside_a_quarter", 7, 0, 0),
        ("the_end_of_a_tile", 1023, 0, 0),
        ("a_later_tile", 3072, 0, 0),
        ("beyond_2_34", 2**34 + 1024, 0, 0),
        ("beyond_2_40_inside_a_tile", 2**40 + 300, 0, 0),
        ("columns", 2048, 13, 40),
        ("far_columns", 2**35 + 5, 300, 70_000),
    )
] + [
    pytest.param(262_144 + 3000, (1024, 300_000, 300_000), id="more_than_one_chunk_of_whole_tiles"),
    pytest.param(131_072 + 3000, (5, 300_000, 300_000), id="more_than_one_chunk_by_entry"),
    pytest.param(131_072 + 3000, (5, 1000, 4096), id="more_than_one_chunk_of_columns"),
]


@pytest.mark.parametrize("one_word", named(entries=False, whole_tensors=True))
def test_a_draw_that_a_clock_counts_is_that_of_its_number(backend, one_word):
    # more than a draw holds, which begins anew, and more than 16 bits of it
    lengths, number = (4096, 1000, 33, 1), (1 << 28) + 70001
    keys, rng = [3, 4, 5, 2**32 - 1], np.random.default_rng(3)
    grads = [torch.from_numpy(rng.standard_normal(n)).float() for n in lengths]
    clock = torch.tensor(number)

    def run(counted, number):
        def draws(purpose, one_word):
            base = Draws(9, purpose_draw(purpose, 0 if counted else number), 2**31, keys, one_word)
            return base._replace(clock=clock) if counted else base

        params = [torch.linspace(-1, 1, n).to(BF16) for n in lengths]
        state = [[torch.zeros(n) for n in lengths] for _ in range(2)]
        seeded = draws(MASK_DRAWS, one_word)
        steps = [torch.tensor(0.0) for _ in lengths]
        backend.adamw_(
            params, grads, *state, [], steps, **HYPER, seeded=seeded,
            rounding=draws(WEIGHT_ROUNDING_DRAWS, False),
        )  # fmt: skip
        return [*params, *state[0], *state[1], backend.norm(grads, seeded=seeded)]

    counted, told, next_one = run(True, 0), run(False, number), run(False, number + 1)
    assert all(map(torch.equal, counted, told))
    assert not all(map(torch.equal, counted, next_one))
    assert clock == number


def check_seeded(backend, numel, geometry):
    """A drawn mask is word < threshold of each entry's global index, wherever the entry lies."""
    seed, draw, threshold, key = (
        0x1F2E3D4C5B6A7988,
        purpose_draw(MASK_DRAWS, 77),
        int(0.37 * 2**32),
        0xFEDCBA98,
    )
    expected = words_of(seed, draw, key, global_indices(numel, geometry)) < threshold
    got = drawn(backend, Draws(seed, draw, threshold, [key]), numel, geometry)
    assert np.array_equal(got, expected), f"{(got != expected).sum()} of {numel} entries"


@pytest.mark.parametrize(("numel", "geometry"), SEEDED_GEOMETRIES)
def test_a_drawn_mask_depends_on_global_indices_alone(backend, numel, geometry):
    if numel > fewer(backend, numel, 10_000):
        pytest.skip("long for the interpreter, and about the chunks of the reference")
    check_seeded(backend, numel, geometry)
    seeded = Draws(5, 6, 2**31, [7])
    expected = reference.seeded_mask(seeded, 0, numel, geometry, CPU).numpy()
    assert np.array_equal(expected, drawn(backend, seeded, numel, geometry))


BLOCKS = named(
    shard_0=[(slice(0, 17), slice(None)), (slice(17, 40), slice(None))],
    shard_1=[(slice(None), slice(0, 65)), (slice(None), slice(65, 67))],
    blocks=[(slice(a, b), slice(c, d)) for a, b in ((0, 23), (23, 40)) for c, d in ((0, 31), (31, 67))],
)


def block_geometry(shape, block):
    """Shape and geometry of a block of a matrix."""
    (r0, r1, _), (c0, c1, _) = (s.indices(n) for s, n in zip(block, shape, strict=True))
    return (r1 - r0, c1 - c0), (r0 * shape[1] + c0, max(c1 - c0, 1), shape[1])


@pytest.mark.parametrize("blocks", BLOCKS)
def test_shards_draw_the_slices_of_the_whole_tensors_mask(backend, blocks):
    shape, seeded = (40, 67), Draws(11, 12, 2**31, [13])
    full = drawn(backend, seeded, 40 * 67, whole(40 * 67)).reshape(shape)
    assert 0 < full.sum() < full.size
    for block in blocks:
        local, geometry = block_geometry(shape, block)
        got = drawn(backend, seeded, local[0] * local[1], geometry).reshape(local)
        assert np.array_equal(got, full[block])


def test_a_middle_dimension_shard_draws_the_slice_too(backend):
    seeded = Draws(11, 12, 2**31, [13])
    full = drawn(backend, seeded, 4 * 30 * 11, whole(4 * 30 * 11)).reshape(4, 30, 11)
    got = drawn(backend, seeded, 4 * 12 * 11, (9 * 11, 12 * 11, 30 * 11)).reshape(4, 12, 11)
    assert np.array_equal(got, full[:, 9:21])


@pytest.mark.parametrize("keep", [0.001, 0.1, 0.3, 0.9])
def test_keep_is_the_frequency_within_five_sigma(backend, keep):
    n = 200_000
    mask = drawn(backend, Draws(21, 22, int(keep * 2**32), [23]), n, whole(n))
    assert abs(mask.sum() - keep * n) <= 5 * (n * keep * (1 - keep)) ** 0.5


@pytest.mark.parametrize(("threshold", "expected"), [(0, 0), (2**32, 3000)])
def test_extreme_thresholds_draw_nothing_and_everything(backend, threshold, expected):
    assert drawn(backend, Draws(1, 2, threshold, [3]), 3000, whole(3000)).sum() == expected


def test_seeds_draws_keys_and_purposes_give_unrelated_masks(backend):
    n, half = 20_000, 2**31
    draws = [
        Draws(1, purpose_draw(MASK_DRAWS, 0), half, [0]),
        Draws(2, purpose_draw(MASK_DRAWS, 0), half, [0]),
        Draws(1 + 2**32, purpose_draw(MASK_DRAWS, 0), half, [0]),
        Draws(1, purpose_draw(MASK_DRAWS, 1), half, [0]),
        Draws(1, purpose_draw(MASK_DRAWS, 0), half, [1]),
        Draws(1, purpose_draw(MASK_DRAWS, 0), half, [2**31]),
        Draws(1, purpose_draw(WEIGHT_ROUNDING_DRAWS, 0), half, [0]),
        Draws(1, purpose_draw(STATISTIC_ROUNDING_DRAWS, 0), half, [0]),
    ]
    masks = [drawn(backend, d, n, whole(n)) for d in draws]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            agreement = (first == second).sum()
            assert abs(agreement - n / 2) <= 5 * (n / 4) ** 0.5
    # the tensors of one call have a key each
    params = [torch.zeros(n), torch.zeros(n)]
    state = [[torch.zeros(n), torch.zeros(n)] for _ in range(2)]
    backend.adamw_(
        params, [torch.ones(n)] * 2, *state, [], [torch.zeros(()), torch.zeros(())],
        **HYPER, seeded=Draws(1, 0, half, [1, 0]),
    )  # fmt: skip
    assert np.array_equal((params[0] != 0).numpy(), masks[4]) and np.array_equal(
        (params[1] != 0).numpy(), masks[0]
    )


def test_purposes_never_share_a_draw():
    last = 2**28 - 1
    numbers = [purpose_draw(purpose, number) for purpose in range(4) for number in (0, 1, last)]
    assert len(set(numbers)) == 12 and max(numbers) < 2**32
    assert purpose_draw(3, 5) == 3 << 28 | 5 and purpose_draw(0, 7) == 7


def test_one_word_selects_all_or_nothing_by_the_word_of_entry_zero(backend):
    outcomes = set()
    for key in range(20):
        mask = drawn(backend, Draws(31, 32, 2**31, [key], one_word=True), 1500, whole(1500))
        expected = word_exact(31, 32, key, 0) < 2**31
        assert mask.all() == expected and mask.any() == expected
        outcomes.add(expected)
    assert outcomes == {True, False}


# --- packed bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 31, 32, 33, 1023, 1024, 1025])
def test_packed_bits_round_trip_and_are_padded_with_zeros(numel):
    mask = torch.from_numpy(np.random.default_rng(12).random(numel) < 0.5)
    bits = reference.pack_bits(mask)
    assert bits.dtype == torch.uint8 and bits.numel() == -(-numel // 32) * 4
    assert torch.equal(bits, packed(mask.numpy()))
    assert torch.equal(reference.unpack_bits(bits, numel), mask)
    everything = reference.pack_bits(torch.ones(numel, dtype=torch.bool))
    assert sum(int(byte).bit_count() for byte in everything) == numel


def test_the_lowest_bit_comes_first():
    mask = torch.zeros(40, dtype=torch.bool)
    mask[[0, 9, 31, 32]] = True
    assert reference.pack_bits(mask).tolist() == [1, 2, 0, 128, 1, 0, 0, 0]


# --- exact selection --------------------------------------------------------------------------------------


def select_by_sorting(scores, density, scope, absolute):
    """Masks of the k highest finite scores, ties to the lowest (tensor, index); None if an error."""
    values = [s.detach().double().reshape(-1).numpy() for s in scores]
    values = [abs(v) if absolute else v for v in values]
    masks = [np.zeros(v.size, dtype=bool) for v in values]
    rows = [range(len(values))] if scope == "global" else [[i] for i in range(len(values))]
    for row in rows:
        ranked = sorted((-v, i, j) for i in row for j, v in enumerate(values[i].tolist()) if np.isfinite(v))
        k = int(density * sum(values[i].size for i in row))
        if k > len(ranked) or (k == 0 and scope == "global"):
            return None
        for _, i, j in ranked[:k]:
            masks[i][j] = True
    return masks


def policy(density, scope="global", absolute=False, cut="exact"):
    statistic = SignedGradient() if absolute else SquaredGradient()
    return TopK(density, statistic=statistic, scope=scope, cut=cut)


def flat_masks(masks, numels):
    """Boolean arrays of Bits or Indexed masks."""
    result = []
    for mask, numel in zip(masks, numels, strict=True):
        if isinstance(mask, Bits):
            unpacked = np.unpackbits(mask.bits.numpy(), bitorder="little").astype(bool)
            assert unpacked.size == -(-numel // 32) * 32 and not unpacked[numel:].any()
            result.append(unpacked[:numel])
        else:
            assert isinstance(mask, Indexed) and mask.indices.dtype == torch.int32 and mask.indices.dim() == 1
            listed = mask.indices.numpy()
            assert (np.diff(listed) > 0).all(), "indices must ascend"
            flat = np.zeros(numel, dtype=bool)
            flat[listed] = True
            result.append(flat)
    return result


def check_selection(backend, scores, density, scope="global", absolute=False):
    """The set of `select_by_sorting`, as indices and as bits, from scores that nobody wrote to."""
    expected = select_by_sorting(scores, density, scope, absolute)
    before = [s.clone() for s in scores]
    for as_bits in (False, True):
        if expected is None:
            with pytest.raises(RuntimeError, match="density"):
                policy(density, scope, absolute).select(scores, backend, as_bits=as_bits)
            continue
        masks = policy(density, scope, absolute).select(scores, backend, as_bits=as_bits)
        got = flat_masks(masks, [s.numel() for s in scores])
        for i, (mine, right) in enumerate(zip(got, expected, strict=True)):
            assert np.array_equal(mine, right), f"tensor {i}: {np.flatnonzero(mine != right)[:5]} differ"
    for s, was in zip(scores, before, strict=True):
        assert_same_bits(s, was, "scores")


def scores_of(kind, dtype):
    rng = np.random.default_rng(13)
    shapes = [(31,), (), (0,), (20, 30), (1025,), (1,), (7, 5, 3), (2, 2100)]

    def each(make):
        return [torch.from_numpy(np.asarray(make(shape), dtype=np.float32)).to(dtype) for shape in shapes]

    def sprinkled(values):
        scores = each(lambda shape: rng.standard_normal(shape))
        for s in scores:
            if s.numel() > 1:
                s.view(-1)[:: s.numel() // 7 + 1] = torch.tensor(values, dtype=dtype)[
                    torch.randperm(len(values))[0]
                ]
                for offset, value in enumerate(values):
                    s.view(-1)[offset + 1 :: 13] = value
        return scores

    if kind == "random":
        return each(lambda shape: rng.standard_normal(shape) ** 2)
    if kind == "signed":
        return each(lambda shape: rng.standard_normal(shape))
    if kind == "all_equal":
        return each(lambda shape: np.full(shape, 3.25))
    if kind == "all_zero":
        return each(np.zeros)
    if kind == "negative":
        return each(lambda shape: -np.exp(rng.standard_normal(shape) * 20))
    if kind == "tied":
        return each(lambda shape: rng.integers(0, 4, shape))
    if kind == "few_ties":
        return each(lambda shape: np.round(rng.standard_normal(shape) * 30))
    if kind == "signed_zeros":
        return sprinkled([0.0, -0.0])
    if kind == "denormals":
        tiny = 2.0**-133  # a denormal of bfloat16 too
        return each(lambda shape: rng.integers(-5, 6, shape) * tiny)
    if kind == "not_finite":
        return sprinkled([float("nan"), float("inf"), float("-inf"), float("-nan")])
    if kind == "wide":
        return each(lambda shape: np.exp(rng.uniform(-80, 80, shape)) * rng.choice([-1, 1], shape))
    assert kind == "close"
    return each(lambda shape: 1 + rng.integers(0, 50, shape) * 2.0**-23)


SCORES = [
    "random",
    "signed",
    "all_equal",
    "all_zero",
    "negative",
    "tied",
    "few_ties",
    "signed_zeros",
    "denormals",
]
SCORES += ["not_finite", "wide", "close"]
DENSITIES = [0.0005, 0.003, 0.1, 0.29, 0.5, 0.77, 0.99, 1.0]


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("absolute", named(as_they_are=False, by_magnitude=True))
@pytest.mark.parametrize("dtype", named(float32=F32, bfloat16=BF16))
@pytest.mark.parametrize("kind", SCORES)
def test_selection_is_that_of_a_stable_sort(backend, kind, dtype, absolute, scope):
    scores = scores_of(kind, dtype)
    for density in fewer(backend, DENSITIES, [0.29]):
        check_selection(backend, scores, density, scope, absolute)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_ties_follow_the_logical_order_of_a_transposed_statistic(backend, scope):
    rng = np.random.default_rng(14)
    scores = [
        Buffer(torch.from_numpy(rng.integers(0, 3, (13, 29))).float(), "transposed").tensor for _ in range(2)
    ]
    for density in (0.1, 0.5, 0.9):
        check_selection(backend, scores, density, scope)


def test_density_counts_are_rounded_down_in_double_arithmetic(backend):
    (mask,) = policy(0.29).select([torch.rand(100)], backend, as_bits=False)
    assert mask.indices.numel() == 28  # 0.29 * 100 is 28.999999999999996


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_fewer_finite_scores_than_k_are_an_error(backend, scope):
    scores = torch.full((10,), float("nan"))
    scores[:4] = 1.0
    assert policy(0.4, scope).select([scores], backend, as_bits=False)[0].indices.tolist() == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="needs 5 finite scores, got 4 of 10"):
        policy(0.5, scope).select([scores], backend, as_bits=False)


def test_a_k_of_zero_is_an_error_for_the_model_and_nothing_for_a_tensor(backend):
    scores = [torch.rand(9), torch.rand(100)]
    with pytest.raises(RuntimeError, match="at least one of the 109"):
        policy(0.009).select(scores, backend, as_bits=False)
    masks = policy(0.05, "tensor").select(scores, backend, as_bits=False)
    assert [mask.indices.numel() for mask in masks] == [0, 5]
    bits = policy(0.05, "tensor").select(scores, backend, as_bits=True)
    assert not bits[0].bits.any() and bits[0].bits.numel() == 4


def test_no_tensors_select_nothing_per_tensor(backend):
    assert policy(0.5, "tensor").select([], backend, as_bits=False) == []
    with pytest.raises(RuntimeError, match="density"):
        policy(0.5).select([], backend, as_bits=False)


def check_percentile(backend, scores, density, scope):
    """Every entry at or above NumPy's linear percentile."""
    flat = [s.detach().double().reshape(-1).numpy() for s in scores]
    pools = [np.concatenate(flat)] * len(flat) if scope == "global" else flat
    masks = policy(density, scope, cut="percentile").select(scores, backend, as_bits=False)
    for got, values, pool in zip(flat_masks(masks, [v.size for v in flat]), flat, pools, strict=True):
        expected = values >= np.percentile(pool, (1 - density) * 100) if pool.size else values > 0
        assert np.array_equal(got, expected), (
            f"{got.sum()} of {values.size} entries instead of {expected.sum()}"
        )


PERCENTILE_DENSITIES = [0.001, 0.01, 0.1, 0.2, 0.29, 0.3, 0.35, 0.5, 0.6, 0.75, 0.9, 0.99]


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("kind", ["random", "tied", "all_equal", "few_ties"])
@pytest.mark.parametrize("dtype", named(float32=F32, bfloat16=BF16))
def test_the_percentile_cut_is_numpys(backend, kind, dtype, scope):
    for density in fewer(backend, PERCENTILE_DENSITIES, PERCENTILE_DENSITIES[::5]):
        check_percentile(backend, scores_of(kind, dtype), density, scope)


@pytest.mark.parametrize("numel", [1, 2, 11, 21, 101, 1001])
def test_the_percentile_cut_is_numpys_where_the_percentile_is_an_entry(backend, numel):
    # (numel - 1) * (1 - density) is a whole number in the reals and nearly one in double
    scores = [torch.from_numpy(1 + np.random.default_rng(15).random(numel)).float()]
    for density in fewer(backend, (*PERCENTILE_DENSITIES, 0.4, 0.7, 0.8), (0.1, 0.7)):
        check_percentile(backend, scores, density, "global")


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("kind", ["random", "tied", "all_equal", "negative"])
def test_the_ceil_cut_takes_everything_at_or_above_the_kth_highest(backend, kind, scope):
    scores = scores_of(kind, F32)
    flat = [s.double().view(-1).numpy() for s in scores]
    pools = [np.concatenate(flat)] * len(flat) if scope == "global" else flat
    for density in (0.0005, 0.1, 0.29, 0.5, 1.0):
        masks = policy(density, scope, cut="ceil").select(scores, backend, as_bits=False)
        for got, values, pool in zip(flat_masks(masks, [v.size for v in flat]), flat, pools, strict=True):
            k = math.ceil(density * pool.size)
            assert np.array_equal(got, values >= np.sort(pool)[-k] if pool.size else values > 0), density


def check_histogram(backend, dtype, absolute, per_tensor):
    """Counts by bits of the sort keys, and of the global indices among ties."""
    scores = scores_of("not_finite", dtype) + scores_of("tied", dtype) + scores_of("signed_zeros", dtype)
    geometries = [(3 + i, max(s.numel() // 3, 1), s.numel() + 5) for i, s in enumerate(scores)]
    # where tiles of 1024 entries stay whole
    geometries[7], geometries[15], geometries[-1] = (0, 4200, 4200), (1024, 2048, 4096), (2048, 5000, 5000)
    bits = 16 if dtype == BF16 else 32
    ranked = [sort_keys(s, absolute) for s in scores]
    tie = int(sort_keys(torch.ones(1, dtype=dtype))[0][0])
    for shift, width in ((bits - 11, 11), (bits - 4, 4), (3, 8), (0, 5)):
        prefixes = [int(keys[keys.size // 2]) >> shift + width if keys.size else 0 for keys, _ in ranked]
        got = backend.histogram(
            scores,
            shift=shift,
            width=width,
            prefixes=torch.tensor(prefixes),
            per_tensor=per_tensor,
            absolute=absolute,
        )
        rows = []
        for (keys, finite), prefix in zip(ranked, prefixes, strict=True):
            counted = keys[finite & (keys >> shift + width == prefix)]
            rows.append(np.bincount(counted >> shift & (1 << width) - 1, minlength=1 << width))
        expected = np.stack(rows) if per_tensor else np.sum(rows, axis=0)[None]
        assert got.dtype == torch.int64 and np.array_equal(got.numpy(), expected), (
            f"shift {shift}, width {width}"
        )
    for shift, width, prefix in ((44, 0, 0), (5, 6, 0), (0, 5, 1)):
        got = backend.histogram(
            scores,
            shift=shift,
            width=width,
            prefixes=torch.tensor([prefix] * len(scores)),
            per_tensor=per_tensor,
            absolute=absolute,
            ties=torch.tensor([tie] * len(scores)),
            geometries=geometries,
        )
        rows = []
        for (keys, finite), geometry in zip(ranked, geometries, strict=True):
            places = global_indices(keys.size, geometry)[finite & (keys == tie)]
            places = places[places >> shift + width == prefix]
            rows.append(np.bincount(places >> shift & (1 << width) - 1, minlength=1 << width))
        expected = np.stack(rows) if per_tensor else np.sum(rows, axis=0)[None]
        assert expected.sum() > 0
        assert np.array_equal(got.numpy(), expected), f"ties, shift {shift}, width {width}"


@pytest.mark.parametrize("dtype", named(float32=F32, bfloat16=BF16))
@pytest.mark.parametrize("absolute", named(as_they_are=False, by_magnitude=True))
@pytest.mark.parametrize("per_tensor", named(summed=False, per_tensor=True))
def test_histogram_counts_every_finite_key_once(backend, dtype, absolute, per_tensor):
    check_histogram(backend, dtype, absolute, per_tensor)


def check_compact(backend, dtype, absolute):
    scores = scores_of("not_finite", dtype) + scores_of("tied", dtype) + scores_of("signed_zeros", dtype)
    geometries = [(3 + i, max(s.numel() // 3, 1), s.numel() + 5) for i, s in enumerate(scores)]
    # where tiles of 1024 entries stay whole
    geometries[7], geometries[15], geometries[-1] = (0, 4200, 4200), (1024, 2048, 4096), (2048, 5000, 5000)
    zero, one = (int(sort_keys(torch.full((1,), x, dtype=dtype))[0][0]) for x in (0.0, 1.0))
    lasts = [EVERY_TIE, -1, 40, 3200]
    for key in (zero, one):
        cuts = [(BEYOND_ALL_KEYS, -1) if i == 3 else (key, lasts[i % 4]) for i in range(len(scores))]
        expected = [
            above(s.abs() if absolute else s, *row) for s, *row in zip(scores, cuts, geometries, strict=True)
        ]
        assert sum(mask.sum() for mask in expected) > 100
        for as_bits in (False, True):
            masks = backend.compact(
                scores, cuts=as_cuts(cuts), as_bits=as_bits, absolute=absolute, geometries=geometries
            )
            got = flat_masks([Bits(m) if as_bits else Indexed(m) for m in masks], [s.numel() for s in scores])
            for mine, right in zip(got, expected, strict=True):
                assert np.array_equal(mine, right)


@pytest.mark.parametrize("dtype", named(float32=F32, bfloat16=BF16))
@pytest.mark.parametrize("absolute", named(as_they_are=False, by_magnitude=True))
def test_compact_lists_what_lies_above_the_cut(backend, dtype, absolute):
    check_compact(backend, dtype, absolute)


class Ranks:
    """Threads that stand for the ranks of a process group: `reduce` sums the counts of all."""

    def __init__(self, number):
        self.barrier, self.slots = threading.Barrier(number, timeout=10), [None] * number
        self.results, self.errors = [None] * number, []

    def reduce(self, rank):
        def add_up(counts):
            self.slots[rank] = counts.clone()
            self.barrier.wait()
            slots = list(self.slots)
            if any(other is None or other.shape != counts.shape for other in slots):
                raise AssertionError("the ranks do not reduce the same things in the same order")
            self.barrier.wait()
            return sum(slots)

        return add_up

    def run(self, work):
        def body(rank):
            try:
                self.results[rank] = work(rank, self.reduce(rank))
                self.slots[rank] = None
                self.barrier.wait()
            except threading.BrokenBarrierError:
                pass
            except BaseException as error:
                self.errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(len(self.slots))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]
        return self.results


def check_sharded_selection(
    backend, matrices, blocks, density, scope, absolute=False, cut="exact", as_bits=False
):
    """The union of what the ranks select is what one process selects from the whole matrices."""
    if cut == "exact":
        expected = select_by_sorting(matrices, density, scope, absolute)
    else:
        alone = policy(density, scope, absolute, cut).select(matrices, backend, as_bits=False)
        expected = flat_masks(alone, [m.numel() for m in matrices])
    assert expected is not None

    def work(rank, reduce):
        local = [m[blocks[rank]].contiguous() for m in matrices]
        geometries = [block_geometry(m.shape, blocks[rank])[1] for m in matrices]
        masks = policy(density, scope, absolute, cut).select(
            local, backend, as_bits=as_bits, geometries=geometries, reduce=reduce
        )
        return [
            f.reshape(t.shape)
            for f, t in zip(flat_masks(masks, [t.numel() for t in local]), local, strict=True)
        ]

    ranks = Ranks(len(blocks))
    results = ranks.run(work)
    for i, matrix in enumerate(matrices):
        union = np.zeros(tuple(matrix.shape), dtype=bool)
        for block, masks in zip(blocks, results, strict=True):
            union[block] = masks[i]
        assert np.array_equal(union.ravel(), expected[i]), (
            f"tensor {i}: {union.sum()} entries instead of {expected[i].sum()}"
        )


SHARDS = named(
    equal_rows=[(slice(0, 20), slice(None)), (slice(20, 40), slice(None))],
    unequal_rows=[(slice(0, 27), slice(None)), (slice(27, 40), slice(None))],
    an_empty_rank=[(slice(0, 40), slice(None)), (slice(40, 40), slice(None))],
    columns=[(slice(None), slice(0, 20)), (slice(None), slice(20, 37))],
    blocks=[(slice(a, b), slice(c, d)) for a, b in ((0, 23), (23, 40)) for c, d in ((0, 16), (16, 37))],
)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("kind", ["random", "tied", "all_equal", "signed"])
@pytest.mark.parametrize("blocks", SHARDS)
def test_ranks_select_together_what_one_process_selects(backend, blocks, kind, scope):
    rng = np.random.default_rng(16)
    make = {
        "random": lambda: rng.random((40, 37)),
        "tied": lambda: rng.integers(0, 3, (40, 37)),
        "all_equal": lambda: np.ones((40, 37)),
        "signed": lambda: np.round(rng.standard_normal((40, 37)) * 4),
    }[kind]
    matrices = [torch.from_numpy(np.asarray(make(), dtype=np.float32)) for _ in range(3)]
    for density in fewer(backend, (0.003, 0.29, 0.6), ()):
        check_sharded_selection(backend, matrices, blocks, density, scope, absolute=kind == "signed")
    check_sharded_selection(backend, [m.to(BF16) for m in matrices], blocks, 0.1, scope, as_bits=True)
    check_sharded_selection(backend, matrices, blocks, 0.25, scope, cut="percentile")


# --- remap_, gather_, norm, apply_delta_ ------------------------------------------------------------------


def check_remap(backend, old, new):
    rng = np.random.default_rng(17)
    old, new = torch.tensor(old, dtype=torch.int32), torch.tensor(new, dtype=torch.int32)
    states = [normal(rng, (old.numel(),), dtype) for dtype in (F32, F64, BF16)]
    for state in states:
        plant(state, np.arange(0, old.numel(), 2))
    states.append(torch.arange(1, old.numel() + 1, dtype=torch.int32))
    before = [state.clone() for state in states]
    results, nothing = backend.remap_([old, old[:0]], [new, new[:0]], [states, []])
    assert nothing == []
    place = {entry: i for i, entry in enumerate(old.tolist())}
    for state, was, result in zip(states, before, results, strict=True):
        assert_same_bits(state, was, "old state")
        expected = torch.zeros(new.numel(), dtype=bits_of(state).dtype)
        for i, entry in enumerate(new.tolist()):
            if entry in place:
                expected[i] = bits_of(state)[place[entry]]
        assert result.dtype == state.dtype and torch.equal(bits_of(result), expected)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param([], [], id="nothing_to_nothing"),
        pytest.param([], [0, 5], id="only_newcomers"),
        pytest.param([0, 5], [], id="only_leavers"),
        pytest.param([3], [3], id="one_that_stays"),
        pytest.param(list(range(20)), list(range(20)), id="all_stay"),
        pytest.param(list(range(0, 40, 2)), list(range(1, 41, 2)), id="all_change"),
        pytest.param([2, 3, 5, 8, 13, 21], [0, 2, 4, 5, 8, 9, 21, 34], id="some_of_each"),
        pytest.param([100, 200], [1, 2, 300], id="new_ones_outside_the_old_range"),
        pytest.param(list(range(0, 3000, 3)), list(range(0, 3000, 5)), id="long_lists"),
    ],
)
def test_remap_carries_what_stays_and_starts_newcomers_at_zero(backend, old, new):
    check_remap(backend, old, new)


@pytest.mark.parametrize("dtype", INDEXED_DTYPES)
def test_gather_adds_the_listed_entries_to_the_buffers(backend, dtype):
    rng = np.random.default_rng(18)
    indices = make_indices(rng, offset=1)
    tensors = [Buffer(normal(rng, layout.shape, dtype), layout.grad) for layout in LAYOUTS]
    buffer_dtype = F64 if dtype == F64 else F32
    start = [normal(rng, (where.numel(),), buffer_dtype) for where in indices]
    buffers = [b.clone() for b in start]
    backend.gather_(buffers, [t.tensor for t in tensors], indices)
    for buffer, was, tensor, where in zip(buffers, start, tensors, indices, strict=True):
        listed = tensor.values.to(buffer_dtype).view(-1).numpy()[where.numpy()]
        assert_same_bits(buffer, torch.from_numpy(was.numpy() + listed), "buffer")
        assert torch.equal(tensor.base, tensor.before)


def check_norm(backend, form, dtype):
    rng = np.random.default_rng(19)
    grads = [Buffer(normal(rng, layout.shape, dtype), layout.grad) for layout in LAYOUTS]
    numels = [g.tensor.numel() for g in grads]
    if form == "indices":
        indices = make_indices(rng)
        arguments, masks = (
            {"indices": indices},
            [np.isin(np.arange(n), w) for n, w in zip(numels, indices, strict=True)],
        )
    else:
        arguments, masks = make_selection(rng, form, numels)
    got = backend.norm([g.tensor for g in grads], **arguments)
    assert got.dtype == F64 and got.shape == ()
    expected = 0.0
    for grad, mask in zip(grads, masks, strict=True):
        values = to_numpy(grad.tensor, np.float64)
        expected += np.square(values if mask is None else values[mask]).sum()
        assert torch.equal(grad.base, grad.before)
    assert abs(float(got) - expected) <= 1e-12 * expected


@pytest.mark.parametrize("form", ["everything", "bits", "seeded", "indices"])
@pytest.mark.parametrize("dtype", INDEXED_DTYPES)
def test_norm_is_the_sum_of_squares_of_selected_entries(backend, form, dtype):
    check_norm(backend, form, dtype)


LISTED = [0, 1, 1023, 1024, 1025, 4095, 4096, 4097, 10_000, 2048, 3]


@pytest.mark.parametrize("dtype", INDEXED_DTYPES)
@pytest.mark.parametrize("together", named(each_alone=False, together=True))
def test_gathered_gradients_have_the_norm_of_dense_ones_bit_for_bit(backend, dtype, together):
    """So that what was gathered before is clipped by the very same number."""
    rng, wide = np.random.default_rng(46), F64 if dtype == F64 else F32
    dense, gathered, indices = [], [], []
    for i, count in enumerate(LISTED):
        # of many magnitudes, so that the order of additions shows
        spread = 10.0 ** torch.from_numpy(rng.uniform(-2, 2, (53, 211)))
        layout = ("contiguous", "aligned", "transposed", "sliced")[i % 4]
        grad = Buffer((normal(rng, (53, 211), F64) * spread).to(dtype), layout)
        where = torch.from_numpy(np.sort(rng.permutation(53 * 211)[:count]))
        indices.append(where if i % 5 == 4 else where.int())
        dense.append(grad.tensor)
        compact = grad.values.view(-1)[where].to(wide)
        gathered.append(Buffer(compact, ("aligned", "contiguous", "sliced")[i % 3]).tensor)
    if together:
        assert_same_bits(backend.norm(gathered), backend.norm(dense, indices=indices), "norm of all")
        return
    for count, grad, where, compact in zip(LISTED, dense, indices, gathered, strict=True):
        norm = backend.norm([compact])
        assert_same_bits(norm, backend.norm([grad], indices=[where]), f"norm of {count}")
        assert_same_bits(norm, backend.norm([compact.contiguous().clone()]), f"norm of {count}, aligned")


def test_norm_of_nothing_is_zero(backend):
    total = backend.norm([])
    assert total.dtype == F64 and total.shape == () and float(total) == 0.0


def check_apply_delta(backend, dtype, mode):
    rng = np.random.default_rng(20)
    indices = make_indices(rng, offset=1)
    params, values, expected = [], [], []
    for layout, where in zip(LAYOUTS, indices, strict=True):
        old = normal(rng, layout.shape, dtype)
        plant(old, np.setdiff1d(np.arange(old.numel()), where.numpy()))
        value = normal(rng, (where.numel(),), dtype)
        new = old.clone()
        if mode == "add":
            # the exact sum, rounded once: float64 holds it for every narrower dtype
            listed = old.view(-1)[where.long()]
            new.view(-1)[where.long()] = (listed.double() + value.double()).to(dtype)
        else:
            plant(value, np.arange(0, value.numel(), 2))
            flat, bits = bits_of(new).view(-1), bits_of(value)
            flat[where.long()] = flat[where.long()] ^ bits if mode == "xor" else bits
        params.append(Buffer(old, layout.param))
        values.append(value)
        expected.append(new)
    start = [p.values for p in params]
    backend.apply_delta_([p.tensor for p in params], indices, values, mode=mode)
    for p, want in zip(params, expected, strict=True):
        assert_same_bits(p.values, want, f"parameter after {mode}")
        p.assert_guards_hold(mode)
    if mode == "xor":
        backend.apply_delta_([p.tensor for p in params], indices, values, mode=mode)
        for p, was in zip(params, start, strict=True):
            assert_same_bits(p.values, was, "parameter after xor, twice")


@pytest.mark.parametrize("mode", ["replace", "add", "xor"])
@pytest.mark.parametrize("dtype", INDEXED_DTYPES)
def test_apply_delta_writes_the_listed_entries_and_no_other(backend, dtype, mode):
    check_apply_delta(backend, dtype, mode)


# --- properties -------------------------------------------------------------------------------------------


def holds_for_all(backend, property_, examples=60, **strategies):
    """Run a property under Hypothesis, without a database and always on the same examples."""
    examples = fewer(backend, examples, examples // 6)
    hypothesis = pytest.importorskip("hypothesis")
    settings = hypothesis.settings(
        deadline=None, max_examples=examples, database=None, derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    settings(hypothesis.given(**strategies)(property_))()


def test_any_scores_are_selected_as_a_stable_sort_does(backend):
    st = pytest.importorskip("hypothesis.strategies")
    score = st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), float("-inf")]),
        st.floats(width=32),
    )

    def selection(tensors, density, scope, absolute, dtype):
        check_selection(backend, [torch.tensor(t, dtype=dtype) for t in tensors], density, scope, absolute)

    holds_for_all(
        backend,
        selection,
        examples=120,
        tensors=st.lists(st.lists(score, max_size=12), min_size=1, max_size=4),
        density=st.floats(0.01, 1.0),
        scope=st.sampled_from(["global", "tensor"]),
        absolute=st.booleans(),
        dtype=st.sampled_from([F32, BF16]),
    )


def test_any_block_of_any_matrix_draws_its_slice(backend):
    st = pytest.importorskip("hypothesis.strategies")

    def geometry(rows, columns, data, seed, key):
        r0, c0 = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
        block = (slice(r0, data.draw(st.integers(r0, rows))), slice(c0, data.draw(st.integers(c0, columns))))
        full = words_of(seed, 3, key, np.arange(rows * columns)).reshape(rows, columns) < 2**31
        local, geometry = block_geometry((rows, columns), block)
        got = drawn(backend, Draws(seed, 3, 2**31, [key]), local[0] * local[1], geometry)
        assert np.array_equal(got.reshape(local), full[block])

    holds_for_all(
        backend,
        geometry,
        rows=st.integers(1, 50),
        columns=st.integers(1, 60),
        data=st.data(),
        seed=st.integers(0, 2**63 - 1),
        key=st.integers(0, 2**32 - 1),
    )


def test_any_bits_of_unselected_entries_stay(backend):
    st = pytest.importorskip("hypothesis.strategies")

    def frozen(dtype, unselected, entries, weight_decay):
        width = torch.tensor([], dtype=dtype).element_size() * 8
        selected = np.array([e[0] for e in entries], dtype=bool)

        def tensor(column):
            signed = [
                (e[column] % 2**width + 2 ** (width - 1)) % 2**width - 2 ** (width - 1) for e in entries
            ]
            return torch.tensor(signed, dtype=INTEGER[width // 8]).view(dtype)

        param, exp_avg, exp_avg_sq = tensor(1), tensor(2), tensor(3)
        before = [t.clone() for t in (param, exp_avg, exp_avg_sq)]
        backend.adamw_(
            [param], [tensor(4)], [exp_avg], [exp_avg_sq], [], [torch.zeros(())],
            **HYPER | {"weight_decay": weight_decay}, bits=[packed(selected)], unselected=unselected,
        )  # fmt: skip
        rest = torch.from_numpy(~selected)
        kept = 3 if unselected == "frozen" else 1
        for was, now in list(zip(before, (param, exp_avg, exp_avg_sq), strict=True))[:kept]:
            assert_same_bits(now[rest], was[rest], f"unselected entries under {unselected}")

    word = st.integers(0, 2**64 - 1)
    holds_for_all(
        backend,
        frozen,
        dtype=st.sampled_from([F64, F32, BF16, F16]),
        unselected=st.sampled_from(["frozen", "track"]),
        entries=st.lists(st.tuples(st.booleans(), word, word, word, word), min_size=1, max_size=40),
        weight_decay=st.sampled_from([0.0, 0.1]),
    )


# --- the checks bite --------------------------------------------------------------------------------------


def copy_of_reference():
    """A module of its own, so that parts can be replaced."""
    spec = importlib.util.spec_from_file_location("wrong_backend", reference.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forgets_bias_correction(wrong):
    right = wrong._adamw_entries
    wrong._adamw_entries = lambda p, g, m, v, x, step, **hyper: right(p, g, m, v, x, 1e6, **hyper)


def decays_the_old_way(wrong):
    right = wrong._adamw_entries

    def entries(p, g, m, v, x, step, *, weight_decay, **hyper):
        right(p, g + weight_decay * p, m, v, x, step, weight_decay=0, **hyper)

    wrong._adamw_entries = entries


def computes_in_the_stored_dtype(wrong):
    wrong._arithmetic_dtype = lambda param: param.dtype


def moves_one_unselected_entry(wrong):
    right = wrong.adamw_

    def adamw_(params, *args, bits=None, **kwargs):
        right(params, *args, bits=bits, **kwargs)
        if bits is not None:
            free = wrong.unpack_bits(bits[5], params[5].numel()).logical_not().nonzero()
            place = free[len(free) // 2]
            params[5][place] = torch.nextafter(params[5][place], torch.tensor(9.0, dtype=params[5].dtype))

    wrong.adamw_ = adamw_


def adds_zero_to_unselected_entries(wrong):
    right = wrong.adamw_

    def adamw_(params, *args, **kwargs):
        right(params, *args, **kwargs)
        for param in params:
            param.add_(0.0)

    wrong.adamw_ = adamw_


def multiplies_gradients_by_the_mask(wrong):
    original = torch.where

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def where(self, condition, x, y):
            return (
                x * condition
                if isinstance(y, float) and x.dtype.is_floating_point
                else original(condition, x, y)
            )

    wrong.torch = Torch()


def writes_to_gradients(wrong):
    right = wrong._prepare_grad

    def prepare(grad, dtype, maximize, grad_scale):
        in_place = maximize and grad.is_contiguous()
        return right(grad.neg_() if in_place else grad, dtype, maximize and not in_place, grad_scale)

    wrong._prepare_grad = prepare


def counts_steps_twice(wrong):
    right = wrong.adamw_

    def adamw_(params, grads, m, v, x, steps, **kwargs):
        right(params, grads, m, v, x, steps, **kwargs)
        for step in steps[3:4]:
            step.add_(1)

    wrong.adamw_ = adamw_


def rounds_to_nearest(wrong):
    wrong.round_stochastically = lambda values, *args: values.to(BF16)


def rounds_by_the_mask_draw(wrong):
    right = wrong.round_stochastically
    wrong.round_stochastically = lambda values, seed, draw, *rest: right(
        values, seed, draw & 2**28 - 1, *rest
    )


def rounds_every_dtype(wrong):
    right = wrong.adamw_

    def adamw_(params, *args, rounding=None, **kwargs):
        right(params, *args, rounding=rounding, **kwargs)
        if rounding is not None:
            params[0].copy_(params[0].to(BF16))

    wrong.adamw_ = adamw_


def ignores_ages(wrong):
    right = wrong.adamw_indexed_

    def adamw_indexed_(p, g, i, m, v, x, masters, ages, steps, **hyper):
        right(p, g, i, m, v, x, masters, [], steps, **hyper)
        for age in ages:
            age.add_(1)

    wrong.adamw_indexed_ = adamw_indexed_


def trusts_stale_masters(wrong):
    right = wrong.adamw_indexed_

    def adamw_indexed_(p, g, indices, m, v, x, masters, *rest, **hyper):
        for param, where, master in zip(p, indices, masters, strict=bool(masters)):
            flat = param.reshape(-1)
            flat[where.long()] = master.to(param.dtype)
            param.copy_(flat.view(param.shape))
        right(p, g, indices, m, v, x, masters, *rest, **hyper)

    wrong.adamw_indexed_ = adamw_indexed_


def always_restarts_masters(wrong):
    right = wrong.adamw_indexed_

    def adamw_indexed_(p, g, indices, m, v, x, masters, *rest, **hyper):
        for param, where, master in zip(p, indices, masters, strict=bool(masters)):
            master.copy_(param.reshape(-1)[where.long()])
        right(p, g, indices, m, v, x, masters, *rest, **hyper)

    wrong.adamw_indexed_ = adamw_indexed_


def fuses_multiply_and_add(wrong):
    def accumulate_(statistics, grads, nonfinite, *, kind, grad_scales=None):
        for statistic, grad, flag in zip(statistics, grads, nonfinite, strict=True):
            finite = grad.isfinite()
            flag.logical_or_(finite.all().logical_not())
            value = torch.where(finite, grad, 0.0).double()
            statistic.copy_((statistic.double() + value * value).to(F32))

    wrong.accumulate_ = accumulate_


def forgets_the_flag(wrong):
    right = wrong.accumulate_
    wrong.accumulate_ = lambda s, g, flags, **kwargs: right(s, g, [flag.clone() for flag in flags], **kwargs)


def numbers_counters_in_the_usual_order(wrong):
    def words(seed, draw, key, entries):
        each = torch.stack(wrong._philox(entries // 4, seed, draw, key))
        return each.gather(0, (entries % 4).unsqueeze(0)).squeeze(0)

    wrong.philox_words = words


def draws_with_one_key(wrong):
    right = wrong._philox
    wrong._philox = lambda counter, seed, draw, key: right(counter, seed, draw, 0)


def forgets_the_high_counter_word(wrong):
    right = wrong._philox
    wrong._philox = lambda counter, *rest: right(counter & 2**32 - 1, *rest)


def ignores_geometry(wrong):
    wrong.global_index = lambda local, geometry: local


def breaks_ties_from_the_end(wrong):
    right = wrong.compact

    def compact(scores, *, cuts, **kwargs):
        flipped = [s.reshape(-1).flip(0) for s in scores]
        found = right(flipped, cuts=cuts, **{**kwargs, "as_bits": False})
        found = [(s.numel() - 1 - f).flip(0) for s, f in zip(scores, found, strict=True)]
        if not kwargs["as_bits"]:
            return found
        masks = [torch.zeros(s.numel(), dtype=torch.bool) for s in scores]
        for mask, where in zip(masks, found, strict=True):
            mask[where.long()] = True
        return [wrong.pack_bits(mask) for mask in masks]

    wrong.compact = compact


def ranks_negative_zero_below_zero(wrong):
    def keys(scores, absolute):
        values = scores.reshape(-1).float()
        raw = (values.abs() if absolute else values).view(torch.int32).long() & 2**32 - 1
        result = torch.where(raw < 2**31, raw + 2**31, 2**32 - 1 - raw)
        return result >> 32 - wrong.key_bits(scores), values.isfinite()

    wrong._sort_keys = keys


def selects_infinities(wrong):
    right = wrong._sort_keys

    def keys(scores, absolute):
        keys, _ = right(scores, absolute)
        return keys, scores.reshape(-1).isnan().logical_not()

    wrong._sort_keys = keys


def flushes_denormals(wrong):
    right = wrong._sort_keys
    wrong._sort_keys = lambda scores, absolute: right(
        torch.where(scores.abs() < 1e-37, 0.0, scores), absolute
    )


def forgets_the_magnitude(wrong):
    right = wrong.histogram
    wrong.histogram = lambda scores, absolute=False, **kwargs: right(scores, **kwargs)


def starts_newcomers_with_a_neighbours_value(wrong):
    def remap_(olds, news, states):
        places = [
            torch.searchsorted(old, new).clamp_(max=max(old.numel() - 1, 0))
            for old, new in zip(olds, news, strict=True)
        ]
        return [[s[place] for s in columns] for place, columns in zip(places, states, strict=True)]

    wrong.remap_ = remap_


def rounds_by_another_key(wrong):
    right = wrong.round_stochastically
    wrong.round_stochastically = lambda values, seed, draw, key, geometry: right(
        values, seed, draw, key ^ 1, geometry
    )


def rounds_by_the_next_entry(wrong):
    right = wrong._entry_words

    def words(seed, draw, key, numel, geometry, device):
        offset, inner, stride = geometry
        return right(seed, draw, key, numel, (offset + 1, inner, stride), device)

    wrong._entry_words = words


def counts_before_rounding(wrong):
    right = wrong.accumulate_

    def accumulate_(statistics, grads, flags, *, first_counts=None, **kwargs):
        if first_counts is not None:
            before = [s.clone() for s in statistics]
            right(before, grads, flags, first_counts=first_counts, **(kwargs | {"rounding": None}))
        right(statistics, grads, flags, **kwargs)

    wrong.accumulate_ = accumulate_


def rounds_float32_statistics(wrong):
    right = wrong.accumulate_

    def accumulate_(statistics, *args, rounding=None, **kwargs):
        right(statistics, *args, rounding=rounding, **kwargs)
        if rounding is not None:
            statistics[5].copy_(statistics[5].to(BF16))

    wrong.accumulate_ = accumulate_


def always_draws_the_same(wrong):
    right = wrong.round_stochastically
    wrong.round_stochastically = lambda values, seed, draw, *rest: right(values, seed, 0, *rest)


def sums_squares_in_float32(wrong):
    right = wrong.norm
    wrong.norm = lambda grads, **kwargs: right(grads, **kwargs).float().double()


def replaces_instead_of_adding(wrong):
    right = wrong.apply_delta_
    wrong.apply_delta_ = lambda p, i, v, mode="replace": right(
        p, i, v, mode="replace" if mode == "add" else mode
    )


BITS, SEEDED = ("bits", "frozen"), ("seeded", "frozen")
FLOAT, HALF = (F32, F32), (BF16, BF16)
DECAY = {"weight_decay": 0.1}
WRONG = [
    (forgets_bias_correction, check_adamw, (FLOAT, ("everything", "frozen"), {})),
    (forgets_bias_correction, check_adamw, (HALF, BITS, {})),
    (forgets_bias_correction, check_indexed, (F32, {})),
    (decays_the_old_way, check_adamw, (FLOAT, BITS, DECAY)),
    (decays_the_old_way, check_indexed, (F32, DECAY)),
    (computes_in_the_stored_dtype, check_adamw, (HALF, BITS, {})),
    (computes_in_the_stored_dtype, check_adamw, ((F16, F16), BITS, {})),
    (moves_one_unselected_entry, check_adamw, (FLOAT, BITS, {})),
    (moves_one_unselected_entry, check_adamw, (HALF, ("bits", "track"), {})),
    (adds_zero_to_unselected_entries, check_adamw, (FLOAT, SEEDED, {})),
    (multiplies_gradients_by_the_mask, check_adamw, (FLOAT, ("bits", "zero_grad"), {})),
    (writes_to_gradients, check_adamw, (FLOAT, BITS, EVERY_FLAG)),
    (writes_to_gradients, check_indexed_compact_grads, (F32, EVERY_FLAG)),
    (counts_steps_twice, check_adamw, (FLOAT, BITS, {})),
    (rounds_to_nearest, check_stochastic_rounding, ()),
    (rounds_by_the_mask_draw, check_stochastic_rounding, ()),
    (ignores_geometry, check_stochastic_rounding, ((7, 5000, 5000),)),
    (rounds_every_dtype, check_other_dtypes_ignore_rounding, ()),
    (ignores_ages, check_ages, (F32,)),
    (trusts_stale_masters, check_stale_masters, ()),
    (always_restarts_masters, check_stale_masters, ()),
    (fuses_multiply_and_add, check_accumulate, ("squares", F32, F32, False)),
    (forgets_the_flag, check_accumulate, ("squares", F32, F32, False)),
    (rounds_to_nearest, check_accumulate, ("squares", BF16, F32, True, "whole")),
    (rounds_by_the_mask_draw, check_accumulate, ("squares", BF16, F32, True, "whole")),
    (rounds_by_another_key, check_accumulate, ("squares", BF16, F32, True, "whole")),
    (rounds_by_the_next_entry, check_accumulate, ("squares", BF16, F32, True, "run_of_tiles")),
    (rounds_by_the_next_entry, check_accumulate, ("squares", BF16, F32, True, "short_rows")),
    (ignores_geometry, check_accumulate, ("squares", BF16, F32, True, "rows_of_tiles")),
    (rounds_float32_statistics, check_accumulate, ("squares", F32, F32, True, "whole")),
    (rounds_to_nearest, check_unbiased, ()),
    (always_draws_the_same, check_unbiased, ()),
    (counts_before_rounding, check_rounded_counts, ()),
    (numbers_counters_in_the_usual_order, check_seeded, (5000, (7, 5000, 5000))),
    (draws_with_one_key, check_seeded, (5000, whole(5000))),
    (forgets_the_high_counter_word, check_seeded, (5000, (2**34 + 1024, 5000, 5000))),
    (ignores_geometry, check_seeded, (5000, (2048, 13, 40))),
    (ignores_geometry, check_adamw, (FLOAT, ("scores", "frozen"), {})),
    (breaks_ties_from_the_end, check_selection, (scores_of("tied", F32), 0.5)),
    (breaks_ties_from_the_end, check_compact, (F32, False)),
    (ranks_negative_zero_below_zero, check_selection, (scores_of("signed_zeros", F32), 0.5)),
    (ranks_negative_zero_below_zero, check_histogram, (F32, False, False)),
    (selects_infinities, check_selection, (scores_of("not_finite", F32), 0.1)),
    (selects_infinities, check_histogram, (BF16, False, True)),
    (flushes_denormals, check_selection, (scores_of("denormals", F32), 0.3)),
    (forgets_the_magnitude, check_selection, (scores_of("signed", F32), 0.3, "global", True)),
    (starts_newcomers_with_a_neighbours_value, check_remap, ([2, 3, 5], [0, 2, 4, 5])),
    (sums_squares_in_float32, check_norm, ("bits", F32)),
    (replaces_instead_of_adding, check_apply_delta, (F32, "add")),
]


@pytest.mark.parametrize(
    ("spoil", "check", "arguments"),
    [pytest.param(*row, id=f"{row[0].__name__}_{i}") for i, row in enumerate(WRONG)],
)
def test_a_wrong_backend_is_caught(spoil, check, arguments):
    wrong = copy_of_reference()
    check(wrong, *arguments)
    spoil(wrong)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(wrong, *arguments)


def test_uninitialized_memory_of_the_package_is_poisoned_under_test():
    inside = {"__name__": "sparse_optim.somewhere", "torch": torch}
    assert eval("torch.empty(3)", inside).isnan().all()
    assert eval("torch.empty_like(torch.zeros(3, dtype=torch.int32))", inside).tolist() == [2**31 - 1] * 3
    assert eval("torch.zeros(1).new_empty(2, dtype=torch.bool)", inside).all()
