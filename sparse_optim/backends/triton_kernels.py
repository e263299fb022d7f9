"""Every verb as Triton kernels: one launch for a whole list of tensors. See reference.py for the equations.

How a launch finds its tensors. A *table* in device memory holds one row of int64 numbers per tensor: the
addresses of everything that belongs to it, its length and its geometry. A second, short list says for every
*tile* of 4096 entries which tensor it lies in, and one program updates one tile. Tables are remembered by
their content, and the addresses of gradients, which alone change from step to step, are a list of their own
that is copied again, asynchronously, when it differs. So a step costs no allocation, no synchronisation, and
no copy but that.

How a tile is read. Four tiles of the seeded rule (1024 entries each) make one tile here, and are taken as
four blocks of 4 x 256 entries, because one Philox call serves one entry of each block. A full tile whose
tensors are all aligned to 16 bytes goes through 128-bit accesses; any other takes the slower branch below
it, entry by entry and in bounds.

Arithmetic is float32 (float64 for float64 parameters), never contracted into fused multiply-adds, so that
compact and parameter-shaped state, and statistics on every backend, agree bit for bit.
"""

import contextlib
import copy
import functools
import math
import operator
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version
from triton import knobs

from .reference import FIRST_WIDTH, Cuts, Draws, Geometry, index_dtype, key_bits

# of 1024 entries; more makes the four blocks need more registers, fewer makes more programs. The interpreter
# takes few, so that small tensors have full tiles too
TILES = 2 if knobs.runtime.interpret else 4
TILE = TILES * 1024
LISTED = 1024  # entries of an index list per program: 8 gathers in flight per thread
WINDOW = 64  # bins of a histogram that are counted in shared memory, see _count_bins
COUNTING_PROGRAMS = 1024  # of a histogram: each keeps its counts over many tiles
WARPS = 4

_TILES, _TILE, _LISTED, _WINDOW = (tl.constexpr(n) for n in (TILES, TILE, LISTED, WINDOW))
# of one quarter of a tile
_LANES, _LANE_BITS = (tl.constexpr(n) for n in (TILES * 256, (TILES * 256).bit_length() - 1))

# columns of a table: addresses, then numbers
_PARAM, _EXP_AVG, _EXP_AVG_SQ, _MAX_EXP_AVG_SQ, _MASK, _STATISTIC, _NONFINITE, _STEP = (
    tl.constexpr(n) for n in range(8)
)
_NUMEL, _ALIGNED, _OFFSET, _INNER, _STRIDE, _KEY, _ROUNDING_KEY, _FIRST_TILE = (
    tl.constexpr(n) for n in range(8, 16)
)
# the same places under other names, for verbs on lists of entries
_INDICES, _MASTER, _AGE = _MASK, _STATISTIC, _NONFINITE
_COLUMNS = tl.constexpr(16)

_EVERYTHING, _BITS, _SEEDED, _SCORES, _ONE_WORD = (tl.constexpr(n) for n in range(5))
_FROZEN, _ZERO_GRAD, _TRACK = (tl.constexpr(n) for n in range(3))
_SQUARES, _SIGNED, _ABSOLUTE = (tl.constexpr(n) for n in range(3))
_REPLACE, _ADD, _XOR = (tl.constexpr(n) for n in range(3))
_UNSELECTED = {"frozen": _FROZEN, "zero_grad": _ZERO_GRAD, "track": _TRACK}
_KINDS = {"squares": _SQUARES, "signed": _SIGNED, "absolute": _ABSOLUTE}
_MODES = {"replace": _REPLACE, "add": _ADD, "xor": _XOR}

_INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
# numbers of an update, in this order, float64
_NUMBERS = tl.constexpr(7)

_TL = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int64: tl.int64,
    torch.int32: tl.int32,
    torch.uint8: tl.uint8,
}
_INTEGERS = {1: tl.uint8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


def why_not(device: torch.device | None) -> str:
    """Why these kernels cannot run on a device (None: on any); empty when they can."""
    if knobs.runtime.interpret:
        # the interpreter takes addresses in the table for addresses of this process
        return "" if device is None or device.type == "cpu" else "TRITON_INTERPRET=1 needs CPU tensors"
    if device is None:
        found = torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
        return (
            "" if found else "it needs a CUDA, ROCm or XPU device, or TRITON_INTERPRET=1 for tests on a CPU"
        )
    if device.type not in ("cuda", "xpu"):
        return f"it needs a CUDA, ROCm or XPU tensor, got {device.type}"
    return _lacking(device)


@functools.cache
def _lacking(device: torch.device) -> str:
    """What keeps Triton from compiling for a GPU."""
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (7, 0):
            return f"it needs a GPU of compute capability 7.0 or higher, got {capability[0]}.{capability[1]}"
    try:
        # the first launch compiles a small piece of C
        _ = triton.runtime.driver.active.utils
    except Exception as error:  # whatever a missing compiler, driver or header raises
        return f"Triton does not start ({type(error).__name__}: {error})"
    return ""


# --- tables -----------------------------------------------------------------------------------------------

_Columns = tuple[tuple[int, tuple[int, ...]], ...]


class _Table:
    """Rows of numbers on the device, the tensor of every tile, and the addresses that may change."""

    def __init__(
        self, device: torch.device, stream: int, columns: _Columns, lengths: tuple[int, ...], tile: int
    ) -> None:
        count = len(lengths)
        # whatever the default device is, numbers are put together on the host
        numels = torch.tensor(lengths, device="cpu")
        tiles = (numels + tile - 1) // tile
        self.device = device
        self.programs = int(tiles.sum())
        self.tiles = tiles.tolist()
        rows = torch.zeros(count, _COLUMNS.value, dtype=torch.int64, device="cpu")
        # of a tensor that is not sharded
        rows[:, _INNER.value] = rows[:, _STRIDE.value] = numels.clamp(min=1)
        for column, values in columns:
            rows[:, column] = _int64(values)
        rows[:, _NUMEL.value] = numels
        rows[:, _FIRST_TILE.value] = tiles.cumsum(0) - tiles
        addresses = rows[:, : _NONFINITE.value]
        geometry = (_OFFSET.value, _INNER.value, _STRIDE.value)
        offset, inner, stride = (rows[:, column] % 1024 == 0 for column in geometry)
        # then 1024 local entries that begin at a multiple of 1024 are one tile of the seeded rule
        whole_tiles = offset & ((rows[:, _INNER.value] >= rows[:, _NUMEL.value]) | (inner & stride))
        rows[:, _ALIGNED.value] = (addresses % 16 == 0).all(1) & whole_tiles
        self.rows = _to_device(rows, device)
        self.owner = _owners(device, stream, tuple(self.tiles))
        self.is_checked = False
        self._last: tuple[int, ...] = ()
        self._gradients = torch.zeros(count, dtype=torch.int64, device=device)
        self._numbers: Tensor | None = None
        # pinned memory, of which there may be no more once a capture has begun
        self._spare: list[Tensor] = []

    def gradients(self, grads: Sequence[Tensor]) -> Tensor:
        """The addresses of this step's gradients, on the device."""
        addresses = tuple(map(Tensor.data_ptr, grads))
        if _is_capturing(self.device):
            # replayed with the graph, since steps outside of it write others. The host's copy, which the
            # graph reads, belongs to this table, and nobody else uses it
            self._gradients.copy_(self._spare[0].copy_(_int64(addresses)), non_blocking=True)
        elif addresses != self._last:
            if not self._last:
                # later ones belong to the same parameters, and torch keeps them where those are
                _check_devices(self.device, grads)
            self._gradients.copy_(_pinned(_int64(addresses), self.device), non_blocking=True)
            self._last = addresses
        if not self._spare and _is_captured_later(self.device):
            self._spare = [_pinned(torch.zeros_like(_int64(addresses)), self.device) for _ in range(4)]
        return self._gradients

    def for_capture(self) -> "_Table":
        """The same rows, with memory of its own for what a graph writes when it is replayed."""
        if not self._spare:
            raise RuntimeError(
                "between captures of the same step there must be a step outside, got none; call step() once "
                "before each capture."
            )
        captured = copy.copy(self)
        captured._spare = [self._spare.pop()]
        captured._gradients = torch.zeros_like(self._gradients)
        captured._numbers = None
        return captured

    def numbers(self) -> Tensor:
        """Room for the numbers of every tensor's update: float64 [tensors, 7]."""
        if self._numbers is None:
            shape = (len(self.tiles), _NUMBERS.value)
            with torch.inference_mode(False):
                self._numbers = torch.zeros(shape, dtype=torch.float64, device=self.device)
        return self._numbers


def _int64(values: Sequence[int]) -> Tensor:
    """Numbers on the host. Addresses of some devices are above 2**63, and keep their bits."""
    return torch.tensor([v - (1 << 64) if v >> 63 > 0 else v for v in values], device="cpu")


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _is_captured_later(device: torch.device) -> bool:
    """Whether there are graphs on such a device."""
    return device.type == "cuda"


def _pinned(host: Tensor, device: torch.device) -> Tensor:
    return host if device.type == "cpu" else host.pin_memory()


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    return _pinned(host, device).to(device, non_blocking=True)


@functools.lru_cache(maxsize=64)
def _owners(device: torch.device, stream: int, tiles: tuple[int, ...]) -> Tensor:
    """The tensor of every tile, int32. Much longer than the rows, and the same for all verbs on these
    lengths.
    """
    del stream
    tensors = torch.arange(len(tiles), dtype=torch.int32, device="cpu")
    return _to_device(tensors.repeat_interleave(_int64(tiles)), device)


# tables by all but their stream, for captures, whose stream is one of their own
_on_any_stream: weakref.WeakValueDictionary[tuple[object, ...], _Table] = weakref.WeakValueDictionary()
# what graphs read whenever they are replayed; nothing says when they no longer are
_captured: list[_Table] = []


def _table_to_capture(device: torch.device, columns: _Columns, lengths: tuple[int, ...], tile: int) -> _Table:
    """A table that was made before: in a capture nothing can be copied from the host but what stays there."""
    table = _on_any_stream.get((device, columns, lengths, tile))
    if table is None:
        raise RuntimeError(
            "a captured step must have been made before with the same parameters and state, got one that was "
            "not; call step() at least once before the capture."
        )
    _captured.append(table.for_capture())
    return _captured[-1]


@functools.lru_cache(maxsize=1024)
def _remembered_table(
    device: torch.device, stream: int, columns: _Columns, lengths: tuple[int, ...], tile: int
) -> _Table:
    # of one stream: kernels of another may still read the rows while this one writes addresses
    # made in inference mode, it could not be written to outside
    with torch.inference_mode(False):
        table = _Table(device, stream, columns, lengths, tile)
    _on_any_stream[device, columns, lengths, tile] = table
    return table


def _table(
    device: torch.device,
    columns: dict[tl.constexpr, Any],
    lengths: Sequence[int],
    tile: int = TILE,
) -> _Table:
    if _is_capturing(device):
        return _table_to_capture(device, _as_numbers(columns), tuple(lengths), tile)
    stream = 0
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
    elif device.type == "xpu":
        stream = torch.xpu.current_stream(device).sycl_queue
    table = _remembered_table(device, stream, _as_numbers(columns), tuple(lengths), tile)
    # once for each table: an address belongs to one device for as long as the process lives
    if not table.is_checked:
        for values in columns.values():
            if values and isinstance(values[0], Tensor):
                _check_devices(device, values)
        table.is_checked = True
    return table


def _as_numbers(columns: dict[tl.constexpr, Any]) -> _Columns:
    """Columns of tensors as columns of their addresses; empty ones left out."""
    return tuple(
        (column.value, tuple(map(Tensor.data_ptr, values) if isinstance(values[0], Tensor) else values))
        for column, values in columns.items()
        if values
    )


_DTYPE, _DEVICE, _IS_CPU = map(operator.attrgetter, ("dtype", "device", "is_cpu"))


def _check_devices(device: torch.device, tensors: Sequence[Tensor]) -> None:
    """A kernel would follow the address of a tensor that lies elsewhere."""
    for elsewhere in set(map(_DEVICE, tensors)) - {device}:
        raise RuntimeError(
            f"everything that belongs to a parameter on {device} must be there too, got a tensor on "
            f"{elsewhere}; move it, or make it with device={str(device)!r}."
        )


def _share_a_device(tensors: Sequence[Tensor]) -> bool:
    if tensors[0].is_cpu:
        return all(map(_IS_CPU, tensors))
    # accelerators have numbers from 0 on, and a process has one type of them; devices take twice as long
    places = set(map(Tensor.get_device, tensors))
    return len(places) == 1 and min(places) >= 0


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    module = torch.get_device_module(device)
    if device.index is None or device.index == module.current_device():
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = module.device(device)
    return context


def _groups(*columns: Sequence[Tensor]) -> list[list[int]]:
    """Places of the tensors that can share a launch: those with the same device and dtypes."""
    filled = [column for column in columns if column]
    alike = all(len(set(map(_DTYPE, column))) == 1 for column in filled)
    if filled and alike and _share_a_device(filled[0]):
        return [list(range(len(filled[0])))]
    found: dict[tuple[object, ...], list[int]] = {}
    for i, tensors in enumerate(zip(*filled, strict=True)):
        kind = (tensors[0].device, *[t.dtype for t in tensors])
        found.setdefault(kind, []).append(i)
    return list(found.values())


def _pick(items: Sequence[Any], places: list[int]) -> list[Any]:
    return list(items) if len(places) == len(items) else [items[i] for i in places] if items else []


class _Flat:
    """Tensors as row-major memory: strided ones are copied, and written back at the end."""

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []

    def __call__(self, tensors: Sequence[Tensor], *, written: bool = True) -> list[Tensor]:
        if not written and any(map(Tensor.is_neg, tensors)):
            tensors = [t.resolve_neg() for t in tensors]
        if all(map(Tensor.is_contiguous, tensors)):
            return list(tensors)
        flat = [t if t.is_contiguous() else t.contiguous() for t in tensors]
        if written:
            self._copies += [(t, f) for t, f in zip(tensors, flat, strict=True) if t is not f]
        return flat

    def write_back(self, params: Sequence[Tensor] = ()) -> None:
        for original, copied in self._copies:
            original.copy_(copied)
        # autograd finds out, as after any operation in place, when a saved tensor has changed
        increment_version([p for p in params if not p.is_inference()])


def _places_columns(
    places: list[int], geometries: Sequence[Geometry] | None, **keys: Sequence[int] | None
) -> dict[tl.constexpr, Sequence[int]]:
    """The columns that say where entries lie in the full tensor, and which words are theirs."""
    columns: dict[tl.constexpr, Sequence[int]] = {}
    if geometries is not None:
        chosen = _pick(geometries, places)
        columns |= {
            column: [geometry[i] for geometry in chosen]
            for i, column in enumerate((_OFFSET, _INNER, _STRIDE))
        }
    for name, column in (("key", _KEY), ("rounding_key", _ROUNDING_KEY)):
        of_all = keys.get(name)
        if of_all is not None:
            # not `_pick`, for which an empty list stands for an argument that is not given
            everyone = len(of_all) == len(places)
            columns[column] = of_all if everyone else [of_all[i] for i in places]
    return columns


# --- what kernels share -----------------------------------------------------------------------------------


@triton.jit
def _load(ptr, offs, in_range, full: tl.constexpr):
    if full:
        value = tl.load(ptr + offs)
    else:
        value = tl.load(ptr + offs, mask=in_range, other=0)
    return value


@triton.jit
def _store(ptr, offs, value, in_range, full: tl.constexpr):
    if full:
        tl.store(ptr + offs, value)
    else:
        tl.store(ptr + offs, value, mask=in_range)


@triton.jit
def _global_index(local, numel, offset, inner, stride):
    """int64 global indices of int64 local ones; a division only where a shard needs one."""
    if inner >= numel:
        index = local + offset
    else:
        index = local // inner * stride + local % inner + offset
    return index


@triton.jit
def _counted(draw, clock_ptr):
    """A draw whose number is counted on the device. See `reference.Draws`."""
    return draw | (tl.load(clock_ptr) & 0xFFFFFFF).to(tl.uint32)


@triton.jit
def _word(index, seed, draw, key):
    """The random word of each entry, by a Philox call of its own. index: int64."""
    counter = index // 1024 * 256 + index % 256
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero + draw, zero + key)
    quarter = index % 1024 // 256
    return tl.where(quarter < 2, tl.where(quarter == 0, w0, w1), tl.where(quarter == 2, w2, w3))


@triton.jit
def _tile_words(start, seed, draw, key):
    """The words of whole tiles: four blocks, one for each quarter. start: int64 global index of each tile."""
    counter = start // 4
    zero = tl.zeros([_TILES, 256], dtype=tl.uint32)
    # 256 T has eight zero bits, into which the place within the quarter goes without a carry
    low = (counter & 0xFFFFFFFF).to(tl.uint32)[:, None] + tl.arange(0, 256).to(tl.uint32)[None, :]
    high = (counter >> 32).to(tl.uint32)[:, None] + zero
    return tl.philox(seed, low, high, zero + draw, zero + key)


@triton.jit
def _quarter(w0, w1, w2, w3, quarter: tl.constexpr):
    """One of the four blocks of `_tile_words`."""
    return w0 if quarter == 0 else w1 if quarter == 1 else w2 if quarter == 2 else w3


@triton.jit
def _one_word_selects(seed, draw, key, last_word, any_word):
    """Whether the word of entry 0, which decides for its whole tensor, selects it."""
    zero = tl.zeros([], tl.uint32)
    word, _, _, _ = tl.philox(seed, zero, zero, zero + draw, zero + key)
    return (word <= last_word) & (any_word != 0)


@triton.jit
def _sort_key(raw, absolute: tl.constexpr):
    """uint32 keys that order as float32 values do, from their bits (int32), and which are finite."""
    raw = raw & 0x7FFFFFFF if absolute else tl.where(raw == -0x80000000, 0, raw)
    finite = (raw & 0x7F800000) != 0x7F800000
    key = tl.where(raw < 0, ~raw, raw ^ -0x80000000).to(tl.uint32, bitcast=True)
    return key, finite


@triton.jit
def _load_keys(score_ptr, offs, in_range, absolute: tl.constexpr, bits: tl.constexpr, full: tl.constexpr):
    """Sort keys of `bits` bits. The pointer is to integers as wide as the scores."""
    raw = _load(score_ptr, offs, in_range, full)
    if bits == 16:
        key, finite = _sort_key(raw.to(tl.int32) << 16, absolute)
        key = key >> 16
    else:
        key, finite = _sort_key(raw, absolute)
    if not full:
        finite = finite & in_range
    return key, finite


@triton.jit
def _threshold(cut_key):
    """A cut's key as uint32, and whether entries equal to it may pass: beyond all keys, nothing does."""
    reachable = cut_key < (1 << 32)
    return tl.where(reachable, cut_key, 0xFFFFFFFF).to(tl.uint32), reachable


@triton.jit
def _ties_within(start, last_tie, reachable):
    """The last place, counted from the global index `start`, at which a tie passes: int32, -1 for none."""
    limit = tl.minimum(tl.maximum(last_tie - start, -1), 1 << 30).to(tl.int32)
    return tl.where(reachable, limit, -1)


@triton.jit
def _contribution(grad, kind: tl.constexpr):
    """What a gradient adds to a statistic, float32, and where it is finite."""
    finite = (grad.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000
    value = tl.where(finite, grad, 0.0)
    if kind == _SQUARES:
        value = value * value
    elif kind == _ABSOLUTE:
        value = tl.abs(value)
    return value, finite


@triton.jit
def _raise_flag(flag_ptr, spoiled):
    """Every program that finds something writes the same byte."""
    tl.store(flag_ptr, tl.full([], 1, tl.uint8), mask=tl.max(spoiled, 0) != 0)


@triton.jit
def _stored(value, dtype: tl.constexpr):
    """A value rounded to nearest, ties to even, into the dtype in which it is stored."""
    if _INTERPRETED and dtype == tl.bfloat16 and value.dtype != tl.bfloat16:
        # the interpreter would cut the low bits off
        value = value.to(tl.float32)
        raw = value.to(tl.int32, bitcast=True)
        nearest = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
        nearest = tl.where(value == value, nearest, (raw >> 16) | 0x40)
        result = nearest.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        # from float64 through float32, as torch does
        if value.dtype == tl.float64 and dtype.primitive_bitwidth == 16:
            value = value.to(tl.float32)
        result = value.to(dtype)
    return result


@triton.jit
def _divide(x, y):
    return x / y if y.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def _square_root(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def _power(base, exponent):
    """base ** exponent in float64, for whole exponents below 2**31: the very steps of `power` below."""
    result = tl.zeros_like(exponent).to(tl.float64) + 1.0
    for bit in tl.static_range(31):
        result = tl.where((exponent >> bit) & 1 != 0, result * base, result)
        base = base * base
    return result


def power(base: float, exponent: int) -> float:
    """base ** exponent by squaring, in the order in which kernels do it, so that both round alike."""
    result = 1.0
    for bit in range(31):
        result = result * base if exponent >> bit & 1 else result
        base = base * base
    return result


@triton.jit
def _load_numbers(numbers_ptr, tensor):
    """The numbers of one tensor's update, where they are not the same for all."""
    row_ptr = numbers_ptr + tensor * _NUMBERS
    decay, weight1 = tl.load(row_ptr), tl.load(row_ptr + 1)
    beta2, weight2 = tl.load(row_ptr + 2), tl.load(row_ptr + 3)
    eps, step_size, correction2 = tl.load(row_ptr + 4), tl.load(row_ptr + 5), tl.load(row_ptr + 6)
    return decay, weight1, beta2, weight2, eps, step_size, correction2


@triton.jit
def _adamw_entries(
    param, grad, exp_avg, exp_avg_sq, largest, decay, weight1, beta2, weight2, eps, step_size, correction2,
    amsgrad: tl.constexpr,
):  # fmt: skip
    """See reference._adamw_entries. Everything in the dtype of the arithmetic."""
    param = param * decay
    exp_avg = exp_avg + weight1 * (grad - exp_avg)
    exp_avg_sq = exp_avg_sq * beta2 + weight2 * (grad * grad)
    if amsgrad:
        # as torch.maximum: a NaN stays
        largest = tl.maximum(largest, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    else:
        largest = exp_avg_sq
    denom = _divide(_square_root(largest), correction2) + eps
    param = param - step_size * _divide(exp_avg, denom)
    return param, exp_avg, exp_avg_sq, largest


@triton.jit
def _round_stochastically(value, word):
    """float32 to bfloat16; see reference.round_stochastically."""
    raw = value.to(tl.int32, bitcast=True)
    carried = (raw + (word & 0xFFFF).to(tl.int32)) >> 16
    rounded = carried.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.where((raw & 0x7F800000) != 0x7F800000, rounded, _stored(value, tl.bfloat16))


# --- adamw_ -----------------------------------------------------------------------------------------------


@triton.jit
def _adamw_block(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, largest_ptr, statistic_ptr,
    offs, in_range, selected, word, sign, rescale, statistic_scale,
    decay, weight1, beta2, weight2, eps, step_size, correction2,
    ARITHMETIC: tl.constexpr, MASKED: tl.constexpr, UNSELECTED: tl.constexpr, RESCALED: tl.constexpr,
    AMSGRAD: tl.constexpr, ROUNDED: tl.constexpr, KIND: tl.constexpr, SCALED: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """One block of entries: everything is read once, updated, and written once. Returns nonzero where a
    gradient that a statistic observes is not finite.
    """
    spoiled = 0
    stored_grad, old_param = _load(grad_ptr, offs, in_range, FULL), _load(param_ptr, offs, in_range, FULL)
    old_exp_avg = _load(exp_avg_ptr, offs, in_range, FULL)
    old_exp_avg_sq = _load(exp_avg_sq_ptr, offs, in_range, FULL)
    old_largest = _load(largest_ptr, offs, in_range, FULL) if AMSGRAD else old_exp_avg_sq
    if KIND is not None:
        seen = stored_grad.to(tl.float32)
        if SCALED:
            seen = seen * statistic_scale
        seen, finite = _contribution(seen, KIND)
        spoiled = tl.where(finite, 0, 1)
        total = _load(statistic_ptr, offs, in_range, FULL).to(tl.float32) + seen
        _store(statistic_ptr, offs, _stored(total, statistic_ptr.dtype.element_ty), in_range, FULL)
    grad = stored_grad.to(ARITHMETIC) * sign
    if RESCALED:
        grad = tl.where(selected, grad * rescale, grad) if MASKED else grad * rescale
    if MASKED and UNSELECTED == _ZERO_GRAD:
        grad = tl.where(selected, grad, 0.0)
    param, exp_avg, exp_avg_sq, largest = _adamw_entries(
        old_param.to(ARITHMETIC), grad, old_exp_avg.to(ARITHMETIC), old_exp_avg_sq.to(ARITHMETIC),
        old_largest.to(ARITHMETIC), decay, weight1, beta2, weight2, eps, step_size, correction2, AMSGRAD,
    )  # fmt: skip
    new_param = _round_stochastically(param, word) if ROUNDED else _stored(param, old_param.dtype)
    new_exp_avg = _stored(exp_avg, old_exp_avg.dtype)
    new_exp_avg_sq = _stored(exp_avg_sq, old_exp_avg_sq.dtype)
    new_largest = _stored(largest, old_largest.dtype)
    # unselected entries are written back as they were read: a store with a mask could not be 128 bits wide
    if MASKED and UNSELECTED != _ZERO_GRAD:
        new_param = tl.where(selected, new_param, old_param)
        if UNSELECTED == _FROZEN:
            new_exp_avg = tl.where(selected, new_exp_avg, old_exp_avg)
            new_exp_avg_sq = tl.where(selected, new_exp_avg_sq, old_exp_avg_sq)
            new_largest = tl.where(selected, new_largest, old_largest)
    _store(param_ptr, offs, new_param, in_range, FULL)
    _store(exp_avg_ptr, offs, new_exp_avg, in_range, FULL)
    _store(exp_avg_sq_ptr, offs, new_exp_avg_sq, in_range, FULL)
    if AMSGRAD:
        _store(largest_ptr, offs, new_largest, in_range, FULL)
    return spoiled


@triton.jit(do_not_specialize=["draw", "rounding_draw", "last_word", "any_word", "seed", "rounding_seed"])
def _adamw_kernel(
    table_ptr, owner_ptr, grads_ptr, numbers_ptr, grad_scale_ptr, found_inf_ptr, statistic_scales_ptr,
    cut_keys_ptr, last_ties_ptr, clock_ptr,
    decay: tl.float64, weight1: tl.float64, beta2: tl.float64, weight2: tl.float64, eps: tl.float64,
    step_size: tl.float64, correction2: tl.float64, sign: tl.float64, rescale: tl.float64,
    seed: tl.uint64, draw: tl.uint32, last_word: tl.uint32, any_word: tl.int32,
    rounding_seed: tl.uint64, rounding_draw: tl.uint32,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
    MAX_EXP_AVG_SQ: tl.constexpr, STATISTIC: tl.constexpr, SCORE: tl.constexpr,
    ARITHMETIC: tl.constexpr, MASK: tl.constexpr, UNSELECTED: tl.constexpr, RESCALED: tl.constexpr,
    AMSGRAD: tl.constexpr, ROUNDED: tl.constexpr, KIND: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """One program updates one tile of one tensor."""
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0:
            return
    tensor = tl.load(owner_ptr + tl.program_id(0)).to(tl.int64)
    row_ptr = table_ptr + tensor * _COLUMNS
    start = (tl.program_id(0) - tl.load(row_ptr + _FIRST_TILE)) * _TILE
    numel = tl.load(row_ptr + _NUMEL)
    offset, inner, stride = tl.load(row_ptr + _OFFSET), tl.load(row_ptr + _INNER), tl.load(row_ptr + _STRIDE)
    key = tl.load(row_ptr + _KEY).to(tl.uint32)
    rounding_key = tl.load(row_ptr + _ROUNDING_KEY).to(tl.uint32)
    grad_address = tl.load(grads_ptr + tensor)
    param_address, exp_avg_address = tl.load(row_ptr + _PARAM), tl.load(row_ptr + _EXP_AVG)
    exp_avg_sq_address, largest_address = tl.load(row_ptr + _EXP_AVG_SQ), tl.load(row_ptr + _MAX_EXP_AVG_SQ)
    mask_address, statistic_address = tl.load(row_ptr + _MASK), tl.load(row_ptr + _STATISTIC)
    nonfinite_ptr = tl.load(row_ptr + _NONFINITE).to(tl.pointer_type(tl.uint8))

    if NUMBERS:
        decay, weight1, beta2, weight2, eps, step_size, correction2 = _load_numbers(numbers_ptr, tensor)
    # tl.full takes arguments, loaded values and the plain floats of the interpreter alike
    decay, weight1 = tl.full([], decay, ARITHMETIC), tl.full([], weight1, ARITHMETIC)
    beta2, weight2 = tl.full([], beta2, ARITHMETIC), tl.full([], weight2, ARITHMETIC)
    eps, step_size = tl.full([], eps, ARITHMETIC), tl.full([], step_size, ARITHMETIC)
    correction2, rescale = tl.full([], correction2, ARITHMETIC), tl.full([], rescale, ARITHMETIC)
    factor = tl.full([], sign, ARITHMETIC)
    seed, rounding_seed = tl.full([], seed, tl.uint64), tl.full([], rounding_seed, tl.uint64)
    draw, rounding_draw = tl.full([], draw, tl.uint32), tl.full([], rounding_draw, tl.uint32)
    if clock_ptr is not None:
        draw, rounding_draw = _counted(draw, clock_ptr), _counted(rounding_draw, clock_ptr)
    last_word = tl.full([], last_word, tl.uint32)
    if grad_scale_ptr is not None:
        factor = factor * tl.load(grad_scale_ptr).to(ARITHMETIC)
    statistic_scale = 1.0
    if statistic_scales_ptr is not None:
        statistic_scale = tl.load(statistic_scales_ptr + tensor)
    if MASK == _SCORES:
        cut_key, reachable = _threshold(tl.load(cut_keys_ptr + tensor))
        last_tie = tl.load(last_ties_ptr + tensor)

    drawn = True
    if MASK == _ONE_WORD:
        drawn = _one_word_selects(seed, draw, key, last_word, any_word)
        if UNSELECTED == _FROZEN and KIND is None:
            if drawn == 0:
                return

    MASKED: tl.constexpr = MASK != _EVERYTHING
    aligned = (tl.load(row_ptr + _ALIGNED) != 0) & (grad_address % 16 == 0)
    if aligned & (start + _TILE <= numel):
        # the hint belongs to the cast, which is why each branch has casts of its own
        begin = tl.multiple_of(start, _TILE)
        param_ptr = tl.multiple_of(param_address.to(tl.pointer_type(PARAM)), 16) + begin
        grad_ptr = tl.multiple_of(grad_address.to(tl.pointer_type(GRAD)), 16) + begin
        exp_avg_ptr = tl.multiple_of(exp_avg_address.to(tl.pointer_type(EXP_AVG)), 16) + begin
        exp_avg_sq_ptr = tl.multiple_of(exp_avg_sq_address.to(tl.pointer_type(EXP_AVG_SQ)), 16) + begin
        largest_ptr = tl.multiple_of(largest_address.to(tl.pointer_type(MAX_EXP_AVG_SQ)), 16) + begin
        statistic_ptr = tl.multiple_of(statistic_address.to(tl.pointer_type(STATISTIC)), 16) + begin
        mask_ptr = tl.multiple_of(mask_address.to(tl.pointer_type(SCORE)), 16)
        mask_ptr += begin // 8 if MASK == _BITS else begin
        tiles = tl.arange(0, _TILES)
        # of the first entry of each tile of 1024
        globals = _global_index(begin + tiles.to(tl.int64) * 1024, numel, offset, inner, stride)
        if MASK == _SEEDED:
            w0, w1, w2, w3 = _tile_words(globals, seed, draw, key)
        if MASK == _SCORES:
            limits = _ties_within(globals, last_tie, reachable)
        if ROUNDED:
            r0, r1, r2, r3 = _tile_words(globals, rounding_seed, rounding_draw, rounding_key)
        spoiled_tile = tl.zeros([_TILES, 256], tl.int32)
        for quarter in tl.static_range(4):
            within = tl.arange(0, 256) + quarter * 256
            offs = tiles[:, None] * 1024 + within[None, :]
            selected = True
            if MASK == _SEEDED:
                selected = (_quarter(w0, w1, w2, w3, quarter) <= last_word) & (any_word != 0)
            elif MASK == _BITS:
                selected = (tl.load(mask_ptr + offs // 8) >> (within % 8)[None, :].to(tl.uint8)) & 1 != 0
            elif MASK == _SCORES:
                score_key, finite = _load_keys(mask_ptr, offs, True, False, SCORE.primitive_bitwidth, True)
                tied = (score_key == cut_key) & (within[None, :] <= limits[:, None])
                selected = finite & ((score_key > cut_key) | tied)
            elif MASK == _ONE_WORD:
                selected = drawn
            rounding_word = 0
            if ROUNDED:
                rounding_word = _quarter(r0, r1, r2, r3, quarter)
            spoiled_tile |= _adamw_block(
                param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, largest_ptr, statistic_ptr,
                offs, True, selected, rounding_word, factor, rescale, statistic_scale,
                decay, weight1, beta2, weight2, eps, step_size, correction2,
                ARITHMETIC, MASKED, UNSELECTED, RESCALED, AMSGRAD, ROUNDED, KIND,
                statistic_scales_ptr is not None, True,
            )  # fmt: skip
        if KIND is not None:
            _raise_flag(nonfinite_ptr, tl.max(spoiled_tile, 1))
    else:
        param_ptr, grad_ptr = param_address.to(tl.pointer_type(PARAM)), grad_address.to(tl.pointer_type(GRAD))
        exp_avg_ptr = exp_avg_address.to(tl.pointer_type(EXP_AVG))
        exp_avg_sq_ptr = exp_avg_sq_address.to(tl.pointer_type(EXP_AVG_SQ))
        largest_ptr = largest_address.to(tl.pointer_type(MAX_EXP_AVG_SQ))
        statistic_ptr = statistic_address.to(tl.pointer_type(STATISTIC))
        mask_ptr = mask_address.to(tl.pointer_type(SCORE))
        spoiled_block = tl.zeros([1024], tl.int32)
        for block in range(_TILES):
            offs = start + block * 1024 + tl.arange(0, 1024)
            in_range = offs < numel
            index = _global_index(offs, numel, offset, inner, stride)
            selected = True
            if MASK == _SEEDED:
                selected = (_word(index, seed, draw, key) <= last_word) & (any_word != 0)
            elif MASK == _BITS:
                packed = tl.load(mask_ptr + offs // 8, mask=in_range, other=0)
                selected = (packed >> (offs % 8).to(tl.uint8)) & 1 != 0
            elif MASK == _SCORES:
                score_key, finite = _load_keys(
                    mask_ptr, offs, in_range, False, SCORE.primitive_bitwidth, False
                )
                tied = (score_key == cut_key) & (index <= last_tie) & reachable
                selected = finite & ((score_key > cut_key) | tied)
            elif MASK == _ONE_WORD:
                selected = drawn
            rounding_word = 0
            if ROUNDED:
                rounding_word = _word(index, rounding_seed, rounding_draw, rounding_key)
            spoiled_block |= _adamw_block(
                param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, largest_ptr, statistic_ptr,
                offs, in_range, selected, rounding_word, factor, rescale, statistic_scale,
                decay, weight1, beta2, weight2, eps, step_size, correction2,
                ARITHMETIC, MASKED, UNSELECTED, RESCALED, AMSGRAD, ROUNDED, KIND,
                statistic_scales_ptr is not None, False,
            )  # fmt: skip
        if KIND is not None:
            _raise_flag(nonfinite_ptr, spoiled_block)


@triton.jit
def _clock_kernel(
    table_ptr, numbers_ptr, found_inf_ptr, lr_ptr, beta1_ptr, beta2_ptr,
    lr: tl.float64, beta1: tl.float64, beta2: tl.float64, eps: tl.float64, weight_decay: tl.float64,
    STEP: tl.constexpr, AGES: tl.constexpr,
):  # fmt: skip
    """Counts a step that lives on the device, and derives the numbers of its update. One tensor a program."""
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0:
            return
    tensor = tl.program_id(0).to(tl.int64)
    step_ptr = tl.load(table_ptr + tensor * _COLUMNS + _STEP).to(tl.pointer_type(STEP))
    step = tl.load(step_ptr) + 1
    tl.store(step_ptr, step)
    lr = tl.full([], lr if lr_ptr is None else tl.load(lr_ptr), tl.float64)
    beta1 = tl.full([], beta1 if beta1_ptr is None else tl.load(beta1_ptr), tl.float64)
    beta2 = tl.full([], beta2 if beta2_ptr is None else tl.load(beta2_ptr), tl.float64)
    eps, weight_decay = tl.full([], eps, tl.float64), tl.full([], weight_decay, tl.float64)
    exponent = step.to(tl.int32)
    numbers_ptr += tensor * _NUMBERS
    tl.store(numbers_ptr, 1 - lr * weight_decay)
    tl.store(numbers_ptr + 1, 1 - beta1)
    tl.store(numbers_ptr + 2, beta2)
    tl.store(numbers_ptr + 3, 1 - beta2)
    tl.store(numbers_ptr + 4, eps)
    if AGES:
        tl.store(numbers_ptr + 5, lr)
        tl.store(numbers_ptr + 6, beta1)
    else:
        tl.store(numbers_ptr + 5, lr / (1 - _power(beta1, exponent)))
        tl.store(numbers_ptr + 6, tl.sqrt(1 - _power(beta2, exponent)))


_ONE = torch.ones((), device="cpu")


class _Clock:
    """Counts the steps of the tensors of a launch, and gives it the numbers of their updates.

    Steps on the host are read there; if all tensors agree, as they usually do, the numbers are arguments of
    the launch. Steps on the device stay there, with the learning rate and the betas where these are tensors.
    """

    def __init__(
        self,
        steps: Sequence[Tensor],
        device: torch.device,
        found_inf: Tensor | None,
        lr: float | Tensor,
        beta1: float | Tensor,
        beta2: float | Tensor,
        eps: float,
        weight_decay: float,
    ) -> None:
        self._steps, self._found_inf = steps, found_inf
        self._hyper = lr, beta1, beta2
        self._eps, self._weight_decay = eps, weight_decay
        self._on_host = all(map(_IS_CPU, steps))
        if device.type == "cpu":
            self.on_device = self._on_host and any(isinstance(x, Tensor) for x in self._hyper)
        else:
            self.on_device = not self._on_host and set(map(_DEVICE, steps)) == {device}

    @property
    def found_inf(self) -> Tensor | None:
        """What the launch has to look at itself."""
        return self._found_inf if self.on_device else None

    def _numbers_of(self, count: float, hyper: list[float], with_ages: bool) -> tuple[float, ...]:
        lr, beta1, beta2 = hyper
        decay = 1 - lr * self._weight_decay
        if with_ages:
            # every entry has a bias correction of its own
            return decay, 1 - beta1, beta2, 1 - beta2, self._eps, lr, beta1
        correction1, correction2 = 1 - power(beta1, int(count)), 1 - power(beta2, int(count))
        return decay, 1 - beta1, beta2, 1 - beta2, self._eps, lr / correction1, math.sqrt(correction2)

    def count(
        self, table: _Table, *, as_table: bool = False, with_ages: bool = False
    ) -> tuple[tuple[float, ...], Tensor | None] | None:
        """Counts one step, and returns the seven numbers of each tensor, as values or as a table; None where
        the host finds an infinity.
        """
        none = (0.0,) * _NUMBERS.value
        if self.on_device:
            pointers = [_scalar(x, table.device) if isinstance(x, Tensor) else None for x in self._hyper]
            values = [0.0 if isinstance(x, Tensor) else x for x in self._hyper]
            _clock_kernel[(len(self._steps),)](
                table.rows, table.numbers(), _scalar(self.found_inf, table.device), *pointers, *values,
                self._eps, self._weight_decay, _TL[self._steps[0].dtype], with_ages,
                num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
            return none, table.numbers()
        if _is_capturing(table.device):
            raise RuntimeError(
                "a captured step must count its steps on the device, got steps on the host; give the "
                "optimizer capturable=True."
            )
        if self._found_inf is not None and self._found_inf.item():
            return None
        # a tensor and not a number, which would be made into a tensor anew for every step
        if self._on_host and self._steps[0].is_floating_point():
            torch._foreach_add_(list(self._steps), _ONE, alpha=1.0)
        else:
            torch._foreach_add_(list(self._steps), 1)
        counts = list(map(Tensor.item, self._steps))
        hyper = [float(x.item() if isinstance(x, Tensor) else x) for x in self._hyper]
        if not as_table and counts.count(counts[0]) == len(counts):
            return self._numbers_of(counts[0], hyper, with_ages), None
        known = {count: self._numbers_of(count, hyper, with_ages) for count in set(counts)}
        host = torch.tensor([known[count] for count in counts], dtype=torch.float64, device="cpu")
        return none, table.numbers().copy_(_pinned(host, table.device), non_blocking=True)


def _drawn(draws: Draws | None) -> tuple[int, int, int, int]:
    """Seed, draw, the highest word that selects, and whether any does."""
    if draws is None:
        return 0, 0, 0, 0
    return draws.seed, draws.draw, max(draws.threshold - 1, 0), int(draws.threshold > 0)


def _clock(device: torch.device, *draws: Draws | None) -> Tensor | None:
    """What numbers these draws, where it is counted on the device."""
    return next((_scalar(d.clock, device) for d in draws if d is not None and d.clock is not None), None)


def _scalar(value: Tensor | None, device: torch.device) -> Tensor | None:
    """A 0-dim tensor that a kernel can read."""
    return None if value is None else value.to(device, non_blocking=True)


def _of(column: Tensor, places: list[int], device: torch.device) -> Tensor:
    """What a launch needs of a column with one number per tensor."""
    return (column if len(places) == len(column) else column[places]).to(device).contiguous()


def _ranked(scores: Sequence[Tensor]) -> list[Tensor]:
    """Scores as they are ranked: bfloat16 as it is, anything else as float32."""
    return [s if s.dtype in (torch.float32, torch.bfloat16) else s.to(torch.float32) for s in scores]


def _stacked(scales: Sequence[Tensor] | None, places: list[int], device: torch.device) -> Tensor | None:
    if scales is None:
        return None
    return torch.stack([scale.to(device=device, dtype=torch.float32) for scale in _pick(scales, places)])


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    geometries: Sequence[Geometry] | None = None,
    bits: Sequence[Tensor] | None = None,
    seeded: Draws | None = None,
    scores: Sequence[Tensor] | None = None,
    cuts: Cuts | None = None,
    unselected: str = "frozen",
    rescale: float = 1.0,
    rounding: Draws | None = None,
    found_inf: Tensor | None = None,
    statistics: Sequence[Tensor] = (),
    nonfinite: Sequence[Tensor] = (),
    kind: str = "squares",
    statistic_scales: Sequence[Tensor] | None = None,
    differentiable: bool = False,
) -> None:
    """See reference.adamw_. Launches: one per device and combination of dtypes, and one more where the steps
    are on the device. Steps on the host together with `found_inf` cost a synchronisation.
    """
    del differentiable
    mask = _EVERYTHING
    if bits is not None:
        mask = _BITS
    elif seeded is not None:
        mask = _ONE_WORD if seeded.one_word else _SEEDED
    elif scores is not None:
        mask = _SCORES
    masks = bits if bits is not None else _ranked(scores) if scores is not None else ()
    for places in _groups(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masks, statistics, steps):
        flat = _Flat()
        group = flat(_pick(params, places))
        group_grads = flat(_pick(grads, places), written=False)
        moments = [flat(_pick(column, places)) for column in (exp_avgs, exp_avg_sqs, max_exp_avg_sqs)]
        group_masks = flat(_pick(masks, places), written=False)
        group_statistics = flat(_pick(statistics, places))
        device, group_steps = group[0].device, _pick(steps, places)
        clock = _Clock(group_steps, device, found_inf, lr, beta1, beta2, eps, weight_decay)
        rounded = rounding is not None and group[0].dtype == torch.bfloat16
        columns: dict[tl.constexpr, Any] = {
            _PARAM: group,
            _EXP_AVG: moments[0],
            _EXP_AVG_SQ: moments[1],
            _MAX_EXP_AVG_SQ: moments[2],
            _MASK: group_masks,
            _STATISTIC: group_statistics,
            _NONFINITE: _pick(nonfinite, places),
            _STEP: group_steps if clock.on_device else (),
        } | _places_columns(
            places,
            geometries,
            key=None if seeded is None else seeded.keys,
            rounding_key=rounding.keys if rounding is not None and rounded else None,
        )
        with _on(device):
            # these may refuse, and a refused step is not counted
            table = _table(device, columns, list(map(Tensor.numel, group)))
            addresses = table.gradients(group_grads)
            counted = clock.count(table, as_table=group[0].dtype == torch.float64)
            if counted is None or not table.programs:
                continue
            numbers, numbers_table = counted
            cut_keys, last_ties = (None, None) if cuts is None else [_of(c, places, device) for c in cuts]
            rounding_seed, rounding_draw, _, _ = _drawn(rounding if rounded else None)
            dtypes = [_TL[column[0].dtype] for column in (group, group_grads, moments[0], moments[1])]
            _adamw_kernel[(table.programs,)](
                table.rows, table.owner, addresses, numbers_table,
                _scalar(grad_scale, device), _scalar(clock.found_inf, device),
                _stacked(statistic_scales, places, device), cut_keys, last_ties,
                _clock(device, seeded, rounding),
                *numbers, -1.0 if maximize else 1.0, rescale,
                *_drawn(seeded), rounding_seed, rounding_draw, *dtypes,
                MAX_EXP_AVG_SQ=_TL[moments[2][0].dtype] if moments[2] else tl.float32,
                STATISTIC=_TL[group_statistics[0].dtype] if group_statistics else tl.float32,
                SCORE=tl.uint8 if mask != _SCORES else _INTEGERS[group_masks[0].element_size()],
                ARITHMETIC=tl.float64 if group[0].dtype == torch.float64 else tl.float32,
                MASK=mask.value,
                UNSELECTED=_UNSELECTED[unselected].value,
                RESCALED=rescale != 1.0,
                AMSGRAD=bool(moments[2]),
                ROUNDED=rounded,
                KIND=_KINDS[kind].value if group_statistics else None,
                NUMBERS=numbers_table is not None,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )  # fmt: skip
        flat.write_back(group)


# --- adamw_indexed_ ---------------------------------------------------------------------------------------


@triton.jit
def _adamw_indexed_kernel(
    table_ptr, owner_ptr, grads_ptr, numbers_ptr, grad_scale_ptr, found_inf_ptr,
    decay: tl.float64, weight1: tl.float64, beta2: tl.float64, weight2: tl.float64, eps: tl.float64,
    step_size: tl.float64, correction2: tl.float64, sign: tl.float64,
    PARAM: tl.constexpr, GRAD: tl.constexpr, INDEX: tl.constexpr, EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr, MAX_EXP_AVG_SQ: tl.constexpr, MASTER: tl.constexpr, AGE: tl.constexpr,
    ARITHMETIC: tl.constexpr, COMPACT: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """One program updates 1024 listed entries of one tensor. The dtype of what it does not have is None."""
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0:
            return
    tensor = tl.load(owner_ptr + tl.program_id(0)).to(tl.int64)
    row_ptr = table_ptr + tensor * _COLUMNS
    start = (tl.program_id(0) - tl.load(row_ptr + _FIRST_TILE)) * _LISTED
    count = tl.load(row_ptr + _NUMEL)
    if NUMBERS:
        decay, weight1, beta2, weight2, eps, step_size, correction2 = _load_numbers(numbers_ptr, tensor)
    # where entries have ages, the last two numbers are the learning rate and the first beta
    lr, beta1 = tl.full([], step_size, tl.float64), tl.full([], correction2, tl.float64)
    beta2_double = tl.full([], beta2, tl.float64)
    decay, weight1 = tl.full([], decay, ARITHMETIC), tl.full([], weight1, ARITHMETIC)
    beta2, weight2 = tl.full([], beta2, ARITHMETIC), tl.full([], weight2, ARITHMETIC)
    eps, step_size = tl.full([], eps, ARITHMETIC), tl.full([], step_size, ARITHMETIC)
    correction2, factor = tl.full([], correction2, ARITHMETIC), tl.full([], sign, ARITHMETIC)
    if grad_scale_ptr is not None:
        factor = factor * tl.load(grad_scale_ptr).to(ARITHMETIC)
    param_ptr = tl.load(row_ptr + _PARAM).to(tl.pointer_type(PARAM))
    grad_ptr = tl.load(grads_ptr + tensor).to(tl.pointer_type(GRAD))
    index_ptr = tl.load(row_ptr + _INDICES).to(tl.pointer_type(INDEX)) + start
    exp_avg_ptr = tl.load(row_ptr + _EXP_AVG).to(tl.pointer_type(EXP_AVG)) + start
    exp_avg_sq_ptr = tl.load(row_ptr + _EXP_AVG_SQ).to(tl.pointer_type(EXP_AVG_SQ)) + start
    # no hint of alignment here: what is wide for the list would have to be exchanged between threads before
    # it can be gathered by
    offs = tl.arange(0, _LISTED)
    in_range = offs < count - start
    index = tl.load(index_ptr + offs, mask=in_range, other=0).to(tl.int64)
    old_param = tl.load(param_ptr + index, mask=in_range, other=0)
    if COMPACT:
        grad = tl.load(grad_ptr + start + offs, mask=in_range, other=0)
    else:
        grad = tl.load(grad_ptr + index, mask=in_range, other=0)
    exp_avg = tl.load(exp_avg_ptr + offs, mask=in_range, other=0).to(ARITHMETIC)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=in_range, other=0).to(ARITHMETIC)
    largest = exp_avg_sq
    if MAX_EXP_AVG_SQ is not None:
        largest_ptr = tl.load(row_ptr + _MAX_EXP_AVG_SQ).to(tl.pointer_type(MAX_EXP_AVG_SQ)) + start
        largest = tl.load(largest_ptr + offs, mask=in_range, other=0).to(ARITHMETIC)
    value = old_param.to(ARITHMETIC)
    if MASTER is not None:
        # somebody wrote to a parameter that is no longer its rounded master: the master restarts there
        master_ptr = tl.load(row_ptr + _MASTER).to(tl.pointer_type(MASTER)) + start
        master = tl.load(master_ptr + offs, mask=in_range, other=0)
        value = tl.where(_stored(master, PARAM).to(ARITHMETIC) == value, master.to(ARITHMETIC), value)
    if AGE is not None:
        age_ptr = tl.load(row_ptr + _AGE).to(tl.pointer_type(AGE)) + start
        age = tl.load(age_ptr + offs, mask=in_range, other=0) + 1
        tl.store(age_ptr + offs, age, mask=in_range)
        step_size = (lr / (1 - _power(beta1, age))).to(ARITHMETIC)
        correction2 = tl.sqrt(1 - _power(beta2_double, age)).to(ARITHMETIC)
    value, exp_avg, exp_avg_sq, largest = _adamw_entries(
        value, grad.to(ARITHMETIC) * factor, exp_avg, exp_avg_sq, largest, decay, weight1, beta2, weight2,
        eps, step_size, correction2, MAX_EXP_AVG_SQ is not None,
    )  # fmt: skip
    tl.store(param_ptr + index, _stored(value, PARAM), mask=in_range)
    tl.store(exp_avg_ptr + offs, _stored(exp_avg, EXP_AVG), mask=in_range)
    tl.store(exp_avg_sq_ptr + offs, _stored(exp_avg_sq, EXP_AVG_SQ), mask=in_range)
    if MAX_EXP_AVG_SQ is not None:
        tl.store(largest_ptr + offs, _stored(largest, MAX_EXP_AVG_SQ), mask=in_range)
    if MASTER is not None:
        tl.store(master_ptr + offs, _stored(value, MASTER), mask=in_range)


def adamw_indexed_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    ages: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    compact_grads: bool = False,
    found_inf: Tensor | None = None,
    differentiable: bool = False,
) -> None:
    """See reference.adamw_indexed_. Launches as `adamw_`."""
    del differentiable
    states = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, ages)
    for places in _groups(params, grads, indices, *states, steps):
        flat = _Flat()
        group, group_steps = flat(_pick(params, places)), _pick(steps, places)
        group_grads, device = flat(_pick(grads, places), written=False), group[0].device
        lists = flat(_pick(indices, places), written=False)
        group_states = [flat(_pick(column, places)) for column in states]
        exp_avg, exp_avg_sq, largest, group_masters, group_ages = group_states
        clock = _Clock(group_steps, device, found_inf, lr, beta1, beta2, eps, weight_decay)
        columns: dict[tl.constexpr, Any] = {
            _PARAM: group,
            _INDICES: lists,
            _EXP_AVG: exp_avg,
            _EXP_AVG_SQ: exp_avg_sq,
            _MAX_EXP_AVG_SQ: largest,
            _MASTER: group_masters,
            _AGE: group_ages,
            _STEP: group_steps if clock.on_device else (),
        }
        double = group[0].dtype == torch.float64
        with _on(device):
            # these may refuse, and a refused step is not counted
            table = _table(device, columns, list(map(Tensor.numel, lists)), LISTED)
            addresses = table.gradients(group_grads)
            counted = clock.count(table, as_table=double, with_ages=bool(ages))
            if counted is None or not table.programs:
                continue
            numbers, numbers_table = counted
            used = (group, group_grads, lists, *group_states)
            dtypes = [_TL[column[0].dtype] if column else None for column in used]
            _adamw_indexed_kernel[(table.programs,)](
                table.rows, table.owner, addresses, numbers_table,
                _scalar(grad_scale, device), _scalar(clock.found_inf, device),
                *numbers, -1.0 if maximize else 1.0,
                *dtypes,
                ARITHMETIC=tl.float64 if double else tl.float32,
                COMPACT=compact_grads,
                NUMBERS=numbers_table is not None,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )  # fmt: skip
        flat.write_back(group)


# --- statistics and exact selection -----------------------------------------------------------------------


@triton.jit
def _count_bins(counts_ptr, base, window, zeros, zero_bin, BINS: tl.constexpr):
    """Add what one program has counted of one row to memory."""
    SHARED: tl.constexpr = _WINDOW if BINS > _WINDOW else BINS
    bins = base + tl.arange(0, SHARED)
    tl.atomic_add(counts_ptr + bins, window.to(tl.int64), mask=window != 0, sem="relaxed")
    tl.atomic_add(counts_ptr + zero_bin, zeros.to(tl.int64), mask=zeros != 0, sem="relaxed")


@triton.jit(do_not_specialize=["tiles", "per_program"])
def _histogram_kernel(
    table_ptr, owner_ptr, grads_ptr, scales_ptr, counts_ptr, prefixes_ptr, ties_ptr, tiles, per_program,
    SCORE: tl.constexpr, STATISTIC: tl.constexpr, GRAD: tl.constexpr, KIND: tl.constexpr, SHIFT: tl.constexpr,
    WIDTH: tl.constexpr, PER_TENSOR: tl.constexpr, ABSOLUTE: tl.constexpr,
):  # fmt: skip
    """Each program counts the bins of a run of tiles, and adds them up in memory when the row changes.

    Counting every entry in memory would be bound by the bins that all entries fall into. So a program keeps
    counts of its own for a window of bins that ends at the highest bin of its first tile, where the mass of a
    sum of squares lies, and for exact zeros; only the rest is counted in memory entry by entry.
    With KIND, the scores are statistics, and take their gradients first.
    """
    BITS: tl.constexpr = SCORE.primitive_bitwidth
    BINS: tl.constexpr = 1 << WIDTH
    SHARED: tl.constexpr = _WINDOW if BINS > _WINDOW else BINS
    first = tl.program_id(0) * per_program
    current = tl.full([], -1, tl.int64)
    base = tl.full([], 0, tl.int32)
    zeros = tl.full([], 0, tl.int32)
    window = tl.zeros([SHARED], tl.int32)
    # the bin of a score of zero in this round, if its key has the prefix
    ZERO_BIN: tl.constexpr = ((1 << (BITS - 1)) >> SHIFT) & (BINS - 1) if ties_ptr is None else 0
    for tile in range(first, tl.minimum(first + per_program, tiles)):
        tensor = tl.load(owner_ptr + tile).to(tl.int64)
        row_ptr = table_ptr + tensor * _COLUMNS
        start = (tile - tl.load(row_ptr + _FIRST_TILE)) * _TILE
        numel = tl.load(row_ptr + _NUMEL)
        score_address = tl.load(row_ptr + _STATISTIC)
        full = (tl.load(row_ptr + _ALIGNED) != 0) & (start + _TILE <= numel)
        offs = tl.arange(0, _TILE)
        begin, in_range = tl.multiple_of(start, _TILE), offs < numel - start
        if KIND is not None:
            grad_address = tl.load(grads_ptr + tensor)
            scale = 1.0
            if scales_ptr is not None:
                scale = tl.load(scales_ptr + tensor)
            nonfinite_ptr = tl.load(row_ptr + _NONFINITE).to(tl.pointer_type(tl.uint8))
            if full & (grad_address % 16 == 0):
                total, spoiled = _accumulate_block(
                    tl.multiple_of(score_address.to(tl.pointer_type(STATISTIC)), 16) + begin,
                    tl.multiple_of(grad_address.to(tl.pointer_type(GRAD)), 16) + begin,
                    offs, True, 0, scale, KIND, scales_ptr is not None, False, True,
                )  # fmt: skip
            else:
                total, spoiled = _accumulate_block(
                    score_address.to(tl.pointer_type(STATISTIC)) + start,
                    grad_address.to(tl.pointer_type(GRAD)) + start,
                    offs, in_range, 0, scale, KIND, scales_ptr is not None, False, False,
                )  # fmt: skip
            _raise_flag(nonfinite_ptr, spoiled)
            if BITS == 16:
                key, finite = _sort_key(total.to(tl.int16, bitcast=True).to(tl.int32) << 16, ABSOLUTE)
                key = key >> 16
            else:
                key, finite = _sort_key(total.to(tl.int32, bitcast=True), ABSOLUTE)
            finite = finite & in_range
        elif full:
            score_ptr = tl.multiple_of(score_address.to(tl.pointer_type(SCORE)), 16) + begin
            key, finite = _load_keys(score_ptr, offs, True, ABSOLUTE, BITS, True)
        else:
            score_ptr = score_address.to(tl.pointer_type(SCORE)) + start
            key, finite = _load_keys(score_ptr, offs, in_range, ABSOLUTE, BITS, False)
        prefix = tl.load(prefixes_ptr + tensor)
        if ties_ptr is None:
            counted = finite
            # a shift by all bits has no meaning; then there is no prefix yet
            if SHIFT + WIDTH < BITS:
                counted = counted & ((key >> (SHIFT + WIDTH)) == prefix.to(tl.uint32))
            bins = ((key >> SHIFT) & (BINS - 1)).to(tl.int32)
        else:
            index = _global_index(
                start + offs, numel, tl.load(row_ptr + _OFFSET), tl.load(row_ptr + _INNER),
                tl.load(row_ptr + _STRIDE),
            )  # fmt: skip
            counted = finite & (key == tl.load(ties_ptr + tensor).to(tl.uint32))
            counted = counted & ((index >> (SHIFT + WIDTH)) == prefix)
            bins = ((index >> SHIFT) & (BINS - 1)).to(tl.int32)
        if BINS == 1:
            row = tensor if PER_TENSOR else tensor * 0
            found = tl.sum(counted.to(tl.int32), 0)
            tl.atomic_add(counts_ptr + row, found.to(tl.int64), mask=found != 0, sem="relaxed")
        else:
            row = tensor if PER_TENSOR else tensor * 0
            if row != current:
                if current >= 0:
                    _count_bins(counts_ptr + current * BINS, base, window, zeros, ZERO_BIN, BINS)
                highest = tl.max(tl.where(counted, bins, 0), 0)
                base = tl.maximum(highest - (SHARED - 1), 0)
                window = tl.zeros([SHARED], tl.int32)
                zeros = tl.full([], 0, tl.int32)
                current = row
            local = bins - base
            inside = counted & (local >= 0) & (local < SHARED)
            window += tl.histogram(tl.where(inside, local, 0), SHARED, mask=inside)
            outside = counted & (inside == 0)
            if BINS > SHARED:
                at_zero = outside & (bins == ZERO_BIN)
                zeros += tl.sum(at_zero.to(tl.int32), 0)
                outside = outside & (at_zero == 0)
                one = tl.full([_TILE], 1, tl.int64)
                tl.atomic_add(counts_ptr + row * BINS + bins, one, mask=outside, sem="relaxed")
    if BINS > 1:
        if current >= 0:
            _count_bins(counts_ptr + current * BINS, base, window, zeros, ZERO_BIN, BINS)


@triton.jit
def _accumulate_block(
    statistic_ptr, grad_ptr, offs, in_range, word, scale,
    KIND: tl.constexpr, SCALED: tl.constexpr, ROUNDED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Add gradients to statistics. Returns the new ones as stored, and 1 where a gradient is not finite."""
    grad = _load(grad_ptr, offs, in_range, FULL).to(tl.float32)
    if SCALED:
        grad = grad * scale
    # what lies beyond the end was read as zero
    value, finite = _contribution(grad, KIND)
    total = _load(statistic_ptr, offs, in_range, FULL).to(tl.float32) + value
    total = _round_stochastically(total, word) if ROUNDED else _stored(total, statistic_ptr.dtype.element_ty)
    _store(statistic_ptr, offs, total, in_range, FULL)
    return total, tl.where(finite, 0, 1)


@triton.jit(do_not_specialize=["rounding_seed", "rounding_draw"])
def _accumulate_kernel(
    table_ptr, owner_ptr, grads_ptr, scales_ptr, rounding_seed: tl.uint64, rounding_draw: tl.uint32,
    STATISTIC: tl.constexpr, GRAD: tl.constexpr, KIND: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """One program adds one tile of a gradient."""
    tensor = tl.load(owner_ptr + tl.program_id(0)).to(tl.int64)
    row_ptr = table_ptr + tensor * _COLUMNS
    start = (tl.program_id(0) - tl.load(row_ptr + _FIRST_TILE)) * _TILE
    numel, statistic_address = tl.load(row_ptr + _NUMEL), tl.load(row_ptr + _STATISTIC)
    nonfinite_ptr = tl.load(row_ptr + _NONFINITE).to(tl.pointer_type(tl.uint8))
    grad_address = tl.load(grads_ptr + tensor)
    scale = 1.0
    if scales_ptr is not None:
        scale = tl.load(scales_ptr + tensor)
    if ROUNDED:
        offset, inner = tl.load(row_ptr + _OFFSET), tl.load(row_ptr + _INNER)
        stride, key = tl.load(row_ptr + _STRIDE), tl.load(row_ptr + _ROUNDING_KEY).to(tl.uint32)
        rounding_seed = tl.full([], rounding_seed, tl.uint64)
        rounding_draw = tl.full([], rounding_draw, tl.uint32)
    aligned = (tl.load(row_ptr + _ALIGNED) != 0) & (grad_address % 16 == 0)
    # drawing the words of single entries takes many registers
    BLOCK: tl.constexpr = 512 if ROUNDED else 1024
    offs = tl.arange(0, BLOCK)
    spoiled = tl.zeros([BLOCK], tl.int32)
    if aligned & (start + _TILE <= numel):
        begin = tl.multiple_of(start, _TILE)
        statistic_ptr = tl.multiple_of(statistic_address.to(tl.pointer_type(STATISTIC)), 16) + begin
        grad_ptr = tl.multiple_of(grad_address.to(tl.pointer_type(GRAD)), 16) + begin
        if ROUNDED:
            tiles = tl.arange(0, _TILES)
            globals = _global_index(begin + tiles.to(tl.int64) * 1024, numel, offset, inner, stride)
            w0, w1, w2, w3 = _tile_words(globals, rounding_seed, rounding_draw, key)
            spoiled_tile = tl.zeros([_TILES, 256], tl.int32)
            for quarter in tl.static_range(4):
                within = tl.arange(0, 256) + quarter * 256
                _, found = _accumulate_block(
                    statistic_ptr, grad_ptr, tiles[:, None] * 1024 + within[None, :], True,
                    _quarter(w0, w1, w2, w3, quarter), scale, KIND, scales_ptr is not None, True, True,
                )  # fmt: skip
                spoiled_tile |= found
            _raise_flag(nonfinite_ptr, tl.max(spoiled_tile, 1))
        else:
            for block in tl.static_range(_TILES):
                _, found = _accumulate_block(
                    statistic_ptr + block * 1024, grad_ptr + block * 1024, offs, True, 0, scale,
                    KIND, scales_ptr is not None, False, True,
                )  # fmt: skip
                spoiled |= found
    else:
        for block in range(_TILE // BLOCK):
            begin = start + block * BLOCK
            word = 0
            if ROUNDED:
                index = _global_index(begin + offs, numel, offset, inner, stride)
                word = _word(index, rounding_seed, rounding_draw, key)
            _, found = _accumulate_block(
                statistic_address.to(tl.pointer_type(STATISTIC)) + begin,
                grad_address.to(tl.pointer_type(GRAD)) + begin,
                offs, offs < numel - begin, word, scale, KIND, scales_ptr is not None, ROUNDED, False,
            )  # fmt: skip
            spoiled |= found
    _raise_flag(nonfinite_ptr, spoiled)


def accumulate_(
    statistics: Sequence[Tensor],
    grads: Sequence[Tensor],
    nonfinite: Sequence[Tensor],
    *,
    kind: str,
    grad_scales: Sequence[Tensor] | None = None,
    first_counts: Tensor | None = None,
    absolute: bool = False,
    rounding: Draws | None = None,
    geometries: Sequence[Geometry] | None = None,
) -> None:
    """See reference.accumulate_. One launch per device and combination of dtypes; two where rounded
    statistics are counted as well.
    """
    for places in _groups(statistics, grads):
        flat = _Flat()
        group, group_grads = flat(_pick(statistics, places)), flat(_pick(grads, places), written=False)
        device, lengths = group[0].device, [s.numel() for s in group]
        columns: dict[tl.constexpr, Any] = {_STATISTIC: group, _NONFINITE: _pick(nonfinite, places)}
        rounded = rounding is not None and group[0].dtype == torch.bfloat16
        if rounding is not None and rounded:
            columns |= _places_columns(places, geometries, rounding_key=rounding.keys)
        with _on(device):
            table = _table(device, columns, lengths)
            if not table.programs:
                continue
            addresses = table.gradients(group_grads)
            scales = _stacked(grad_scales, places, device)
            dtypes = _TL[group[0].dtype], _TL[group_grads[0].dtype]
            # the words of a whole tile have no room in the registers of the kernel that counts
            rides = first_counts is not None and not rounded
            if not rides:
                rounding_seed, rounding_draw, _, _ = _drawn(rounding if rounded else None)
                _accumulate_kernel[(table.programs,)](
                    table.rows, table.owner, addresses, scales, rounding_seed, rounding_draw,
                    *dtypes, _KINDS[kind].value, rounded, num_warps=WARPS, enable_fp_fusion=False,
                )  # fmt: skip
            if first_counts is not None:
                per_tensor = first_counts.shape[0] == len(statistics)
                counts = first_counts
                if per_tensor and len(places) < len(statistics):
                    counts = torch.zeros_like(first_counts[places])
                _launch_histogram(
                    table, group, counts, torch.zeros(len(group), dtype=torch.int64, device=device), None,
                    shift=key_bits(group[0]) - FIRST_WIDTH, width=FIRST_WIDTH, per_tensor=per_tensor,
                    absolute=absolute, grads=addresses if rides else None, scales=scales if rides else None,
                    grad=dtypes[1], kind=kind if rides else None,
                )  # fmt: skip
                if counts is not first_counts:
                    first_counts[places] += counts
        flat.write_back()


def _launch_histogram(
    table: _Table,
    scores: Sequence[Tensor],
    counts: Tensor,
    prefixes: Tensor,
    ties: Tensor | None,
    *,
    shift: int,
    width: int,
    per_tensor: bool,
    absolute: bool,
    grads: Tensor | None = None,
    scales: Tensor | None = None,
    grad: tl.dtype = tl.float32,
    kind: str | None = None,
) -> None:
    per_program = max(1, -(-table.programs // COUNTING_PROGRAMS))
    _histogram_kernel[(-(-table.programs // per_program),)](
        table.rows, table.owner, grads, scales, counts, prefixes, ties, table.programs, per_program,
        SCORE=_INTEGERS[scores[0].element_size()],
        STATISTIC=_TL[scores[0].dtype],
        GRAD=grad,
        KIND=None if kind is None else _KINDS[kind].value,
        SHIFT=shift,
        WIDTH=width,
        PER_TENSOR=per_tensor,
        ABSOLUTE=absolute,
        num_warps=2 * WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip


def histogram(
    scores: Sequence[Tensor],
    *,
    shift: int,
    width: int,
    prefixes: Tensor,
    per_tensor: bool,
    absolute: bool = False,
    ties: Tensor | None = None,
    geometries: Sequence[Geometry] | None = None,
) -> Tensor:
    """See reference.histogram. One launch per device."""
    scores = _ranked(scores)
    device = scores[0].device if scores else torch.device("cpu")
    counts = torch.zeros(len(scores) if per_tensor else 1, 1 << width, dtype=torch.int64, device=device)
    for places in _groups(scores):
        group = _Flat()(_pick(scores, places), written=False)
        here, everyone = group[0].device, len(places) == len(scores)
        columns: dict[tl.constexpr, Any] = {_STATISTIC: group} | _places_columns(places, geometries)
        part = counts if everyone else torch.zeros(len(places), 1 << width, dtype=torch.int64, device=here)
        first = _of(prefixes, places, here)
        tied = None if ties is None else _of(ties, places, here)
        with _on(here):
            table = _table(here, columns, list(map(Tensor.numel, group)))
            if not table.programs:
                continue
            _launch_histogram(
                table, group, part, first, tied,
                shift=shift, width=width, per_tensor=per_tensor or not everyone, absolute=absolute,
            )  # fmt: skip
        if not everyone:
            part = part.to(device)
            counts = (
                counts.index_add_(0, torch.tensor(places, device=device), part)
                if per_tensor
                else (counts + part.sum(0, keepdim=True))
            )
    return counts


@triton.jit
def _compact_kernel(
    table_ptr, owner_ptr, cut_keys_ptr, last_ties_ptr, tile_counts_ptr, tile_ends_ptr, results_ptr,
    SCORE: tl.constexpr, ABSOLUTE: tl.constexpr, RESULT: tl.constexpr, LISTING: tl.constexpr,
):  # fmt: skip
    """Counts the selected entries of a tile (results_ptr None), or writes them: as a list behind those of
    the tiles before, or as bits.
    """
    BITS: tl.constexpr = SCORE.primitive_bitwidth
    tile = tl.program_id(0)
    tensor = tl.load(owner_ptr + tile).to(tl.int64)
    row_ptr = table_ptr + tensor * _COLUMNS
    first_tile = tl.load(row_ptr + _FIRST_TILE)
    start = (tile - first_tile) * _TILE
    numel, address = tl.load(row_ptr + _NUMEL), tl.load(row_ptr + _STATISTIC)
    cut_key, reachable = _threshold(tl.load(cut_keys_ptr + tensor))
    last_tie = tl.load(last_ties_ptr + tensor)
    offset, inner, stride = tl.load(row_ptr + _OFFSET), tl.load(row_ptr + _INNER), tl.load(row_ptr + _STRIDE)
    full = (tl.load(row_ptr + _ALIGNED) != 0) & (start + _TILE <= numel)
    offs = tl.arange(0, 1024)
    before = tl.full([], 0, tl.int64)
    if results_ptr is not None:
        result_ptr = tl.load(results_ptr + tensor).to(tl.pointer_type(RESULT))
        if LISTING:
            # the ends of tiles count through all tensors; a list begins behind the tensors before
            before = tl.load(tile_ends_ptr + tile) - tl.load(tile_counts_ptr + tile)
            before -= tl.load(tile_ends_ptr + first_tile) - tl.load(tile_counts_ptr + first_tile)
    for block in range(_TILES):
        begin = start + block * 1024
        if full:
            score_ptr = tl.multiple_of(address.to(tl.pointer_type(SCORE)), 16) + tl.multiple_of(begin, 1024)
            key, finite = _load_keys(score_ptr, offs, True, ABSOLUTE, BITS, True)
            first = _global_index(begin, numel, offset, inner, stride)
            passes = offs <= _ties_within(first, last_tie, reachable)
        else:
            score_ptr = address.to(tl.pointer_type(SCORE)) + begin
            key, finite = _load_keys(score_ptr, offs, offs < numel - begin, ABSOLUTE, BITS, False)
            passes = (_global_index(begin + offs, numel, offset, inner, stride) <= last_tie) & reachable
        selected = (finite & ((key > cut_key) | ((key == cut_key) & passes))).to(tl.int32)
        found = tl.sum(selected, 0)
        if LISTING and results_ptr is not None:
            places = tl.cumsum(selected, 0) - 1
            tl.store(result_ptr + before + places, (begin + offs).to(RESULT), mask=selected != 0)
        elif results_ptr is not None:
            words = tl.sum(tl.reshape(selected, [32, 32]) << tl.arange(0, 32)[None, :], 1)
            place = begin // 32 + tl.arange(0, 32)
            tl.store(result_ptr + place, words, mask=place < (numel + 31) // 32)
        before += found
    if results_ptr is None:
        tl.store(tile_counts_ptr + tile, before.to(tl.int32))


def _launch_compact(
    table: _Table,
    cut_keys: Tensor,
    last_ties: Tensor,
    score: tl.dtype,
    absolute: bool,
    *,
    counts: Tensor | None = None,
    ends: Tensor | None = None,
    results: Tensor | None = None,
    dtype: tl.dtype = tl.int32,
) -> None:
    if table.programs:
        _compact_kernel[(table.programs,)](
            table.rows, table.owner, cut_keys, last_ties, counts, ends, results,
            score, absolute, dtype, counts is not None, num_warps=WARPS,
        )  # fmt: skip


def compact(
    scores: Sequence[Tensor],
    *,
    cuts: Cuts,
    as_bits: bool,
    absolute: bool = False,
    geometries: Sequence[Geometry] | None = None,
) -> list[Tensor]:
    """See reference.compact. One launch per device for bits; two for lists, and one read of their lengths."""
    scores = _ranked(scores)
    results: list[Tensor] = [torch.empty(0)] * len(scores)
    for places in _groups(scores):
        group = _Flat()(_pick(scores, places), written=False)
        device, lengths = group[0].device, list(map(Tensor.numel, group))
        columns: dict[tl.constexpr, Any] = {_STATISTIC: group} | _places_columns(places, geometries)
        cut_keys, last_ties = (_of(column, places, device) for column in cuts)
        with _on(device):
            table = _table(device, columns, lengths)
            launch = functools.partial(
                _launch_compact, table, cut_keys, last_ties, _INTEGERS[group[0].element_size()], absolute
            )
            if as_bits:
                found = [torch.empty(-(-n // 32) * 4, dtype=torch.uint8, device=device) for n in lengths]
                launch(results=table.gradients(found))
            else:
                counts = torch.empty(table.programs, dtype=torch.int32, device=device)
                launch(counts=counts)
                ends = counts.cumsum(0)
                last_tiles = _to_device(_int64(table.tiles).cumsum(0), device)
                list_ends = torch.cat([ends.new_zeros(1), ends])[last_tiles].tolist()
                dtype = index_dtype(max(lengths))
                found = [
                    torch.empty(end - begin, dtype=dtype, device=device)
                    for begin, end in zip([0, *list_ends], list_ends, strict=False)
                ]
                launch(counts=counts, ends=ends, results=table.gradients(found), dtype=_TL[dtype])
                # a list is as wide as its own tensor needs
                found = [f.to(index_dtype(n)) for f, n in zip(found, lengths, strict=True)]
        for place, result in zip(places, found, strict=True):
            results[place] = result
    return results


# --- compact state, gradients and weights -----------------------------------------------------------------


@triton.jit
def _listed_places(table_ptr, owner_ptr):
    """The tensor of this program, its row, and 1024 places in its list: the last may be beyond its end."""
    tensor = tl.load(owner_ptr + tl.program_id(0)).to(tl.int64)
    row_ptr = table_ptr + tensor * _COLUMNS
    offs = (tl.program_id(0) - tl.load(row_ptr + _FIRST_TILE)) * _LISTED + tl.arange(0, _LISTED)
    return tensor, row_ptr, offs, offs < tl.load(row_ptr + _NUMEL)


@triton.jit(do_not_specialize=["searches"])
def _remap_kernel(
    table_ptr, owner_ptr, searches: tl.int32, INDEX: tl.constexpr, VALUE: tl.constexpr
):  # fmt: skip
    """Finds each entry of a new list in the old one, and copies its value, or zero."""
    _, row_ptr, offs, in_range = _listed_places(table_ptr, owner_ptr)
    new_ptr = tl.load(row_ptr + _INDICES).to(tl.pointer_type(INDEX))
    old_ptr = tl.load(row_ptr + _PARAM).to(tl.pointer_type(INDEX))
    old_count = tl.load(row_ptr + _OFFSET)
    wanted = tl.load(new_ptr + offs, mask=in_range, other=0)
    low = tl.zeros([_LISTED], tl.int64)
    high = low + old_count
    for _ in range(searches):
        middle = (low + high) // 2
        open = low < high
        below = tl.load(old_ptr + middle, mask=open, other=0) < wanted
        low = tl.where(open & below, middle + 1, low)
        high = tl.where(open & (below == 0), middle, high)
    found = in_range & (low < old_count)
    found = found & (tl.load(old_ptr + low, mask=found, other=0) == wanted)
    source_ptr = tl.load(row_ptr + _EXP_AVG).to(tl.pointer_type(VALUE))
    target_ptr = tl.load(row_ptr + _EXP_AVG_SQ).to(tl.pointer_type(VALUE))
    tl.store(target_ptr + offs, tl.load(source_ptr + low, mask=found, other=0), mask=in_range)


def remap_(
    olds: Sequence[Tensor], news: Sequence[Tensor], states: Sequence[Sequence[Tensor]]
) -> list[list[Tensor]]:
    """See reference.remap_. One launch per device, dtype of the lists and size of a state's entries."""
    flat = _Flat()
    olds, news = flat(olds, written=False), flat(news, written=False)
    states = [flat(columns, written=False) for columns in states]
    results = [
        [torch.empty(new.numel(), dtype=state.dtype, device=state.device) for state in columns]
        for new, columns in zip(news, states, strict=True)
    ]
    pairs = [(i, j) for i, columns in enumerate(states) for j in range(len(columns))]
    kinds: dict[tuple[object, ...], list[tuple[int, int]]] = {}
    for i, j in pairs:
        kinds.setdefault((news[i].device, news[i].dtype, states[i][j].element_size()), []).append((i, j))
    for chosen in kinds.values():
        first = news[chosen[0][0]]
        sizes = [olds[i].numel() for i, _ in chosen]
        columns: dict[tl.constexpr, Any] = {
            _PARAM: [olds[i] for i, _ in chosen],
            _INDICES: [news[i] for i, _ in chosen],
            _EXP_AVG: [states[i][j] for i, j in chosen],
            _EXP_AVG_SQ: [results[i][j] for i, j in chosen],
            _OFFSET: sizes,
        }
        with _on(first.device):
            table = _table(first.device, columns, [news[i].numel() for i, _ in chosen], LISTED)
            if table.programs:
                value = _INTEGERS[states[chosen[0][0]][chosen[0][1]].element_size()]
                _remap_kernel[(table.programs,)](
                    table.rows, table.owner, max(sizes).bit_length(), _TL[first.dtype], value, num_warps=WARPS
                )
    return results


@triton.jit
def _gather_kernel(
    table_ptr, owner_ptr, tensors_ptr, BUFFER: tl.constexpr, VALUE: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    """Adds the listed entries of a tensor to its buffer."""
    tensor, row_ptr, offs, in_range = _listed_places(table_ptr, owner_ptr)
    index_ptr = tl.load(row_ptr + _INDICES).to(tl.pointer_type(INDEX))
    buffer_ptr = tl.load(row_ptr + _EXP_AVG).to(tl.pointer_type(BUFFER))
    value_ptr = tl.load(tensors_ptr + tensor).to(tl.pointer_type(VALUE))
    index = tl.load(index_ptr + offs, mask=in_range, other=0).to(tl.int64)
    value = tl.load(value_ptr + index, mask=in_range, other=0).to(BUFFER)
    tl.store(buffer_ptr + offs, tl.load(buffer_ptr + offs, mask=in_range, other=0) + value, mask=in_range)


def gather_(buffers: Sequence[Tensor], tensors: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    """See reference.gather_. One launch per device and combination of dtypes."""
    for places in _groups(buffers, tensors, indices):
        flat = _Flat()
        lists = flat(_pick(indices, places), written=False)
        group, sources = flat(_pick(buffers, places)), flat(_pick(tensors, places), written=False)
        device = group[0].device
        with _on(device):
            table = _table(device, {_INDICES: lists, _EXP_AVG: group}, list(map(Tensor.numel, lists)), LISTED)
            if table.programs:
                _gather_kernel[(table.programs,)](
                    table.rows, table.owner, table.gradients(sources),
                    _TL[group[0].dtype], _TL[sources[0].dtype], _TL[lists[0].dtype], num_warps=WARPS,
                )  # fmt: skip
        flat.write_back()


@triton.jit
def _sum_in_pairs(values):
    """The sum of all lanes, a power of two of them, as a tree of pairs: an order that no layout of the values
    over threads changes.
    """
    for level in tl.static_range(1, _LANE_BITS):
        values = tl.sum(tl.reshape(values, [_LANES >> level, 2]), 1)
    return tl.sum(values, 0)


@triton.jit(do_not_specialize=["draw", "last_word", "any_word", "seed"])
def _norm_kernel(
    table_ptr, owner_ptr, grads_ptr, sums_ptr, clock_ptr,
    seed: tl.uint64, draw: tl.uint32, last_word: tl.uint32, any_word: tl.int32,
    GRAD: tl.constexpr, MASK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The sum of squares of one tile's selected entries, float64. With INDEX, a tile of the list. The order
    of the additions is always the same: the four quarters of a lane, then the lanes.
    """
    tile = tl.program_id(0)
    tensor = tl.load(owner_ptr + tile).to(tl.int64)
    row_ptr = table_ptr + tensor * _COLUMNS
    first_tile, numel = tl.load(row_ptr + _FIRST_TILE), tl.load(row_ptr + _NUMEL)
    mask_address, grad_address = tl.load(row_ptr + _MASK), tl.load(grads_ptr + tensor)
    start = (tile - first_tile) * _TILE
    squares = tl.zeros([_TILES, 256], tl.float64)
    if INDEX is not None:
        places = start + tl.arange(0, _TILES)[:, None] * 1024 + tl.arange(0, 256)[None, :]
        for quarter in tl.static_range(4):
            offs = places + quarter * 256
            in_range = offs < numel
            index = tl.load(mask_address.to(tl.pointer_type(INDEX)) + offs, mask=in_range, other=0)
            value = tl.load(
                grad_address.to(tl.pointer_type(GRAD)) + index.to(tl.int64), mask=in_range, other=0
            )
            value = value.to(tl.float64)
            squares += value * value
    else:
        offset, inner = tl.load(row_ptr + _OFFSET), tl.load(row_ptr + _INNER)
        stride, key = tl.load(row_ptr + _STRIDE), tl.load(row_ptr + _KEY).to(tl.uint32)
        seed, draw = tl.full([], seed, tl.uint64), tl.full([], draw, tl.uint32)
        if clock_ptr is not None:
            draw = _counted(draw, clock_ptr)
        last_word = tl.full([], last_word, tl.uint32)
        drawn = True
        if MASK == _ONE_WORD:
            drawn = _one_word_selects(seed, draw, key, last_word, any_word)
        aligned = (tl.load(row_ptr + _ALIGNED) != 0) & (grad_address % 16 == 0)
        if aligned & (start + _TILE <= numel):
            grad_ptr = tl.multiple_of(grad_address.to(tl.pointer_type(GRAD)), 16)
            locals = tl.multiple_of(start, _TILE) + tl.arange(0, _TILES).to(tl.int64) * 1024
            if MASK == _SEEDED:
                globals = _global_index(locals, numel, offset, inner, stride)
                w0, w1, w2, w3 = _tile_words(globals, seed, draw, key)
            for quarter in tl.static_range(4):
                within = tl.arange(0, 256) + quarter * 256
                offs = locals[:, None] + within[None, :]
                value = tl.load(grad_ptr + offs).to(tl.float64)
                if MASK == _SEEDED:
                    word = _quarter(w0, w1, w2, w3, quarter)
                    value = tl.where((word <= last_word) & (any_word != 0), value, 0.0)
                elif MASK == _BITS:
                    packed = tl.load(mask_address.to(tl.pointer_type(tl.uint8)) + offs // 8)
                    value = tl.where((packed >> (within % 8)[None, :].to(tl.uint8)) & 1 != 0, value, 0.0)
                elif MASK == _ONE_WORD:
                    value = tl.where(drawn, value, 0.0)
                squares += value * value
        else:
            places = start + tl.arange(0, _TILES)[:, None] * 1024 + tl.arange(0, 256)[None, :]
            for quarter in range(4):
                offs = places + quarter * 256
                in_range = offs < numel
                value = tl.load(grad_address.to(tl.pointer_type(GRAD)) + offs, mask=in_range, other=0)
                value = value.to(tl.float64)
                if MASK == _SEEDED:
                    word = _word(_global_index(offs, numel, offset, inner, stride), seed, draw, key)
                    value = tl.where((word <= last_word) & (any_word != 0), value, 0.0)
                elif MASK == _BITS:
                    packed = tl.load(
                        mask_address.to(tl.pointer_type(tl.uint8)) + offs // 8, mask=in_range, other=0
                    )
                    value = tl.where((packed >> (offs % 8).to(tl.uint8)) & 1 != 0, value, 0.0)
                elif MASK == _ONE_WORD:
                    value = tl.where(drawn, value, 0.0)
                squares += value * value
    tl.store(sums_ptr + tile, _sum_in_pairs(squares))


def norm(
    grads: Sequence[Tensor],
    *,
    indices: Sequence[Tensor] | None = None,
    geometries: Sequence[Geometry] | None = None,
    bits: Sequence[Tensor] | None = None,
    seeded: Draws | None = None,
) -> Tensor:
    """See reference.norm. One launch per device and combination of dtypes; tiles are added up in the order of
    the tensors, so that the result does not change from run to run.
    """
    total = torch.zeros((), dtype=torch.float64, device=grads[0].device if grads else None)
    masks = indices if indices is not None else bits if bits is not None else ()
    mask = _EVERYTHING if indices is not None or bits is None else _BITS
    if seeded is not None:
        mask = _ONE_WORD if seeded.one_word else _SEEDED
    sums_of: dict[int, Tensor] = {}
    for places in _groups(grads, masks):
        flat = _Flat()
        group, chosen = (flat(_pick(c, places), written=False) for c in (grads, masks))
        device, key = group[0].device, None if seeded is None else seeded.keys
        columns: dict[tl.constexpr, Any] = {_MASK: chosen} | _places_columns(places, geometries, key=key)
        lengths = [t.numel() for t in (group if indices is None else chosen)]
        with _on(device):
            table = _table(device, columns, lengths)
            if table.programs:
                sums = torch.empty(table.programs, dtype=torch.float64, device=device)
                _norm_kernel[(table.programs,)](
                    table.rows, table.owner, table.gradients(group), sums, _clock(device, seeded),
                    *_drawn(seeded),
                    GRAD=_TL[group[0].dtype],
                    MASK=mask.value,
                    INDEX=None if indices is None else _TL[chosen[0].dtype],
                    num_warps=WARPS,
                    # squares of narrower gradients are exact in float64, fused or not
                    enable_fp_fusion=group[0].dtype != torch.float64,
                )  # fmt: skip
                if len(places) == len(grads):
                    return sums.sum()
                sums_of |= zip(places, sums.to(total.device).split(table.tiles), strict=True)
    return torch.cat([sums_of[i] for i in sorted(sums_of)]).sum() if sums_of else total


@triton.jit
def _apply_delta_kernel(
    table_ptr, owner_ptr, VALUE: tl.constexpr, INDEX: tl.constexpr, MODE: tl.constexpr
):  # fmt: skip
    """Writes listed entries of one tensor."""
    _, row_ptr, offs, in_range = _listed_places(table_ptr, owner_ptr)
    index_ptr = tl.load(row_ptr + _INDICES).to(tl.pointer_type(INDEX))
    value_ptr = tl.load(row_ptr + _EXP_AVG).to(tl.pointer_type(VALUE))
    index = tl.load(index_ptr + offs, mask=in_range, other=0).to(tl.int64)
    param_ptr = tl.load(row_ptr + _PARAM).to(tl.pointer_type(VALUE)) + index
    value = tl.load(value_ptr + offs, mask=in_range, other=0)
    if MODE == _XOR:
        value = value ^ tl.load(param_ptr, mask=in_range, other=0)
    elif MODE == _ADD:
        old = tl.load(param_ptr, mask=in_range, other=0)
        if VALUE == tl.float64:
            value = old + value
        else:
            value = _stored(old.to(tl.float32) + value.to(tl.float32), VALUE)
    tl.store(param_ptr, value, mask=in_range)


def apply_delta_(
    params: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], *, mode: str = "replace"
) -> None:
    """See reference.apply_delta_. One launch per device and combination of dtypes."""
    for places in _groups(params, indices):
        flat = _Flat()
        lists = flat(_pick(indices, places), written=False)
        group, sources = flat(_pick(params, places)), flat(_pick(values, places), written=False)
        device = group[0].device
        # only an addition needs to know what the bits mean
        value = _TL[group[0].dtype] if mode == "add" else _INTEGERS[group[0].element_size()]
        columns = {_PARAM: group, _INDICES: lists, _EXP_AVG: sources}
        with _on(device):
            table = _table(device, columns, list(map(Tensor.numel, lists)), LISTED)
            if table.programs:
                _apply_delta_kernel[(table.programs,)](
                    table.rows, table.owner, value, _TL[lists[0].dtype], _MODES[mode].value, num_warps=WARPS
                )
        flat.write_back(group)
