"""Contract under test: the native library draws the words of the seeded rule, bit for bit, its results depend
neither on threads nor on the machine's vector instructions, and bad arguments end in an exception.

The rule is written a second time here in plain Python integers, which cannot overflow, and is itself held to
the published known answers of Philox-4x32-10. The C++ header and the reference backend are compared with it.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

import sparse_optim
from sparse_optim.backends import reference

LOW_32 = 2**32 - 1
LIBRARIES = sorted(Path(sparse_optim.__file__).parent.glob("_C*.so"))
needs_library = pytest.mark.skipif(
    not LIBRARIES,
    reason="sparse_optim/_C is not built; `python setup.py build_ext --inplace` builds it or says why not",
)

SEEDS = {
    "zero": 0,
    "small": 20240607,
    "48 bits": 0xBEEF_1234_5678,
    "63 bits": 2**63 - 1,
    "64 bits": 0x9E37_79B9_7F4A_7C15,
    "all ones": 2**64 - 1,
}
RANGES = {
    "nothing": (0, 0),
    "nothing, far out": (10**12, 0),
    "one": (0, 1),
    "one quarter": (0, 256),
    "one short of a tile": (0, 1023),
    "one tile": (0, 1024),
    "one beyond a tile": (0, 1025),
    "within a tile": (300, 31),
    "across a tile's end": (1000, 100),
    "from a quarter's end": (2303, 1500),
    "beyond 2**32 entries": (2**32 + 5, 300),
    "counter beyond 32 bits": (2**34 - 7, 300),
    "the last entries of all": (2**63 - 1 - 700, 700),
}


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10 as published."""
    for _ in range(10):
        product_0, product_2 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = (
            (product_2 >> 32) ^ counter[1] ^ key[0],
            product_2 & LOW_32,
            (product_0 >> 32) ^ counter[3] ^ key[1],
            product_0 & LOW_32,
        )
        key = (key[0] + 0x9E3779B9) & LOW_32, (key[1] + 0xBB67AE85) & LOW_32
    return counter


def expected_word(seed: int, draw: int, tensor_key: int, entry: int) -> int:
    """The seeded rule for one entry."""
    counter = 256 * (entry // 1024) + entry % 256
    words = philox((counter & LOW_32, counter >> 32, draw, tensor_key), (seed & LOW_32, seed >> 32))
    return words[entry % 1024 // 256]


def expected_words(seed: int, draw: int, tensor_key: int, start: int, count: int) -> list[int]:
    return [expected_word(seed, draw, tensor_key, entry) for entry in range(start, start + count)]


def native_words(seed: int, draw: int, tensor_key: int, start: int, count: int) -> list[int]:
    """The words of the native library, without the sign that int32 and a seed in int64 give them."""
    torch.ops.load_library(LIBRARIES[0])
    signed_seed = seed - 2**64 if seed >= 2**63 else seed
    words = torch.ops.sparse_optim.philox_words(signed_seed, draw, tensor_key, start, count)
    assert words.dtype == torch.int32
    assert words.shape == (count,)
    assert words.device.type == "cpu"
    return [word & LOW_32 for word in words.tolist()]


# the vectors that Random123 publishes for philox4x32 with ten rounds
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        pytest.param((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8), id="zeros"),
        pytest.param(
            (LOW_32, LOW_32, LOW_32, LOW_32),
            (LOW_32, LOW_32),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
            id="ones",
        ),
        pytest.param(
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
            id="digits of pi",
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert philox(counter, key) == answer


@needs_library
def test_native_words_give_the_published_answer_for_zeros():
    words = native_words(0, 0, 0, 0, 1024)
    assert words[::256] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@needs_library
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS.keys())
@pytest.mark.parametrize(("start", "count"), RANGES.values(), ids=RANGES.keys())
def test_native_words_are_those_of_the_rule(seed, start, count):
    draw, tensor_key = 7, 0xCAFE_F00D
    assert native_words(seed, draw, tensor_key, start, count) == expected_words(
        seed, draw, tensor_key, start, count
    )


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS.keys())
@pytest.mark.parametrize(("start", "count"), RANGES.values(), ids=RANGES.keys())
def test_reference_words_are_those_of_the_rule(seed, start, count):
    draw, tensor_key = 7, 0xCAFE_F00D
    entries = torch.arange(count, dtype=torch.int64) + start
    words = reference.philox_words(seed, draw, tensor_key, entries)
    assert words.dtype == torch.int64
    assert words.tolist() == expected_words(seed, draw, tensor_key, start, count)


@pytest.mark.parametrize(
    "words_of", [pytest.param(native_words, marks=needs_library), reference.philox_words]
)
@pytest.mark.parametrize(
    ("draw", "tensor_key"),
    [
        pytest.param(0, 0, id="first mask"),
        pytest.param(1 << 28, 1, id="weight rounding"),
        pytest.param(3 << 28 | 12345, 2**31, id="control masks, key above int32"),
        pytest.param(LOW_32, LOW_32, id="largest"),
    ],
)
def test_draw_and_key_use_all_their_32_bits(words_of, draw, tensor_key):
    if words_of is native_words:
        found = native_words(3, draw, tensor_key, 0, 600)
    else:
        found = reference.philox_words(3, draw, tensor_key, torch.arange(600)).tolist()
    assert found == expected_words(3, draw, tensor_key, 0, 600)


@needs_library
def test_native_and_reference_words_agree_on_many_tiles():
    # several threads' worth of counters, and a ragged start and end
    seed, draw, tensor_key, start, count = 0xBEEF_1234_5678, 2, 99, 777, 150_001
    entries = torch.arange(start, start + count)
    assert native_words(seed, draw, tensor_key, start, count) == (
        reference.philox_words(seed, draw, tensor_key, entries).tolist()
    )


@needs_library
def test_native_words_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = native_words(5, 0, 1, 123, 100_000)
        torch.set_num_threads(3)
        assert native_words(5, 0, 1, 123, 100_000) == alone
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((0, -1, 0, 0, 1), r"draw must be in \[0, 2\*\*32\), got -1;", id="negative draw"),
        pytest.param((0, 2**32, 0, 0, 1), r"draw must be in .* got 4294967296;", id="draw of 33 bits"),
        pytest.param((0, 0, -5, 0, 1), r"key must be in \[0, 2\*\*32\), got -5;", id="negative key"),
        pytest.param((0, 0, 0, -1, 1), "start must not be negative, got -1;", id="negative start"),
        pytest.param((0, 0, 0, 0, -1), "count must be at least 0 .* count=-1;", id="negative count"),
        pytest.param((0, 0, 0, 2**63 - 1, 1), r"start \+ count below 2\*\*63", id="beyond the last entry"),
    ],
)
def test_native_words_refuse_what_they_cannot_mean(arguments, message):
    torch.ops.load_library(LIBRARIES[0])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparse_optim.philox_words(*arguments)


# --- the verbs ---------------------------------------------------------------------------------------------


@pytest.fixture
def native():
    """The backend, on as many threads and the vector instructions that it had before."""
    module = pytest.importorskip("sparse_optim.backends.native")
    if module.why_not(None):
        pytest.skip(module.why_not(None))
    threads, level = torch.get_num_threads(), LEVELS()[-1]
    yield module
    torch.set_num_threads(threads)
    torch.ops.sparse_optim.use_vector_level(level)


def LEVELS() -> list[str]:
    return torch.ops.sparse_optim.vector_levels().split(",")


# more than one block each, more than one thread's worth in all, and ragged ends
NUMELS = [0, 1, 40_000, 31, 1025, 70_001, 5]
HYPER = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
GEOMETRIES = {
    "whole": lambda n: (0, max(n, 1), max(n, 1)),
    "a run from inside a tile": lambda n: (1023, max(n, 1), max(n, 1)),
    "short rows": lambda n: (77, 13, 40),
    "long rows": lambda n: (300, 1500, 4000),
}


def everything(native, geometry: str) -> list[torch.Tensor]:
    """Whatever the verbs compute from one set of arguments."""
    generator = torch.Generator().manual_seed(1)

    def normal(dtype):
        return [torch.randn(n, generator=generator).to(dtype) for n in NUMELS]

    results = []
    geometries = [GEOMETRIES[geometry](n) for n in NUMELS]
    masks = [torch.rand(n, generator=generator) < 0.3 for n in NUMELS]
    bits = [reference.pack_bits(mask) for mask in masks]
    indices = [mask.nonzero().view(-1).int() for mask in masks]
    keys = list(range(len(NUMELS)))
    draws = reference.Draws(0x9E37_79B9_7F4A_7C15, 3, int(0.3 * 2**32), keys)
    rounding = reference.Draws(5, 1 << 28, 0, keys)
    scores = normal(torch.float32)
    cuts = reference.Cuts(
        torch.full((len(NUMELS),), 0xBF00_0000), torch.full((len(NUMELS),), reference.EVERY_TIE)
    )
    selections = [{}, {"bits": bits}, {"seeded": draws}, {"scores": scores, "cuts": cuts}]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for selection in selections:
            for unselected in ("frozen", "zero_grad", "track") if selection else ("frozen",):
                params, exp_avgs = normal(dtype), normal(dtype)
                exp_avg_sqs = [t.abs() for t in normal(dtype)]
                largest = [t.abs() for t in normal(dtype)] if unselected == "frozen" else []
                statistics, flags = normal(torch.float32), [torch.tensor(False) for _ in NUMELS]
                native.adamw_(
                    params, normal(dtype), exp_avgs, exp_avg_sqs, largest, [torch.zeros(()) for _ in NUMELS],
                    **HYPER, **selection, geometries=geometries, unselected=unselected, rescale=2.5,
                    rounding=rounding, statistics=statistics, nonfinite=flags,
                )  # fmt: skip
                results += [*params, *exp_avgs, *exp_avg_sqs, *largest, *statistics]
        params, masters = normal(dtype), [torch.randn(i.numel(), generator=generator) for i in indices]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        compact = [
            [torch.rand(i.numel(), generator=generator, dtype=wide) for i in indices] for _ in range(3)
        ]
        ages = [torch.randint(0, 100, i.shape, generator=generator, dtype=torch.int32) for i in indices]
        native.adamw_indexed_(
            params, normal(dtype), indices, *compact, [] if dtype == torch.float64 else masters, ages,
            [torch.zeros(()) for _ in NUMELS], **HYPER,
        )  # fmt: skip
        results += [*params, *masters, *ages, *(t for state in compact for t in state)]
        grads = normal(dtype)
        results += [
            native.norm(grads),
            native.norm(grads, indices=indices),
            native.norm(grads, seeded=draws, geometries=geometries),
            native.norm(grads, bits=bits),
        ]
        buffers = [torch.zeros(i.numel(), dtype=wide) for i in indices]
        native.gather_(buffers, grads, indices)
        native.apply_delta_(grads, indices, [t.to(dtype) for t in buffers], mode="add")
        results += [*buffers, *grads]
    for absolute in (False, True):
        statistics, counts = normal(torch.bfloat16), torch.zeros(len(NUMELS), 2048, dtype=torch.int64)
        native.accumulate_(
            statistics, normal(torch.float32), [torch.tensor(False) for _ in NUMELS], kind="signed",
            first_counts=counts, absolute=absolute,
        )  # fmt: skip
        rounded, rounded_counts = normal(torch.bfloat16), torch.zeros(1, 2048, dtype=torch.int64)
        for grad_dtype in (torch.float32, torch.bfloat16):
            native.accumulate_(
                rounded, normal(grad_dtype), [torch.tensor(False) for _ in NUMELS], kind="squares",
                first_counts=rounded_counts, absolute=absolute,
                rounding=reference.Draws(2**63 + 5, 2 << 28, 0, keys), geometries=geometries,
            )  # fmt: skip
        prefixes = torch.full((len(NUMELS),), 0xBF00_0000 >> 21)
        results += [*statistics, counts, *rounded, rounded_counts]
        for per_tensor in (False, True):
            results.append(
                native.histogram(
                    scores, shift=10, width=11, prefixes=prefixes, per_tensor=per_tensor, absolute=absolute
                )
            )
        for as_bits in (False, True):
            results += native.compact(
                scores, cuts=cuts, as_bits=as_bits, absolute=absolute, geometries=geometries
            )
    return results


CLOSE = {  # relative and absolute
    torch.float64: (1e-12, 1e-10),
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (2**-6, 1e-2),
    torch.float16: (2**-9, 1e-2),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_results_are_those_of_the_reference(native, geometry):
    results, expected = everything(native, geometry), everything(reference, geometry)
    for i, (got, want) in enumerate(zip(results, expected, strict=True)):
        assert got.dtype == want.dtype and got.shape == want.shape
        rtol, atol = CLOSE.get(got.dtype, (0, 0))
        torch.testing.assert_close(
            got, want, rtol=rtol, atol=atol, msg=lambda text, i=i: f"result {i}: {text}"
        )


def raw(tensors: list[torch.Tensor]) -> list[bytes]:
    return [tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_results_do_not_depend_on_the_number_of_threads(native, geometry):
    torch.set_num_threads(1)
    alone = raw(everything(native, geometry))
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert raw(everything(native, geometry)) == alone, f"{threads} threads"


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_results_do_not_depend_on_the_vector_instructions(native, geometry):
    if len(LEVELS()) == 1:
        pytest.skip("this machine has one level of vector instructions only")
    torch.set_num_threads(1)
    torch.ops.sparse_optim.use_vector_level("baseline")
    narrow = raw(everything(native, geometry))
    for level in LEVELS()[1:]:
        torch.ops.sparse_optim.use_vector_level(level)
        assert raw(everything(native, geometry)) == narrow, level


def test_an_unknown_level_of_vector_instructions_is_refused(native):
    with pytest.raises(RuntimeError, match=r"level must be one of baseline.*, got 'abacus'"):
        torch.ops.sparse_optim.use_vector_level("abacus")


HALVES = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_read_as_torch_reads_it(native, dtype):
    values = HALVES.view(dtype)
    buffer = torch.zeros(values.numel())
    native.gather_([buffer], [values], [torch.arange(values.numel(), dtype=torch.int32)])
    # adding to zero makes -0.0 positive on both sides
    assert torch.equal(buffer.nan_to_num(7.5), (values.float() + 0.0).nan_to_num(7.5))
    assert torch.equal(buffer.isnan(), values.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_is_rounded_to_16_bits_as_torch_rounds_it(native, dtype):
    # every stored value, its neighbours, and the ties between it and the next, on both sides of zero
    low_bits = 16 if dtype == torch.bfloat16 else 13
    exact = HALVES.view(dtype).float()
    exact = exact[exact.isfinite()].view(torch.int32)
    offsets = torch.tensor([0, 1, -1, 1 << low_bits - 1, (1 << low_bits - 1) + 1, (1 << low_bits - 1) - 1])
    values = (exact[:, None] + offsets.int()).view(-1).view(torch.float32)
    values = torch.cat(
        [values, torch.tensor([65519.0, 65520.0, 1e6, 3e38, float("inf"), float("nan"), 1e-9])]
    )
    values = torch.cat([values, -values])
    rounded = torch.zeros(values.numel(), dtype=dtype)
    masters = values.clone()
    # a master that the parameter agrees with is stored again; the update itself moves nothing
    rounded.copy_(values)
    expected = rounded.clone()
    zeros = [torch.zeros(values.numel())]
    native.adamw_indexed_(
        [rounded], zeros, [torch.arange(values.numel(), dtype=torch.int32)],
        [torch.zeros(values.numel())], [torch.ones(values.numel())], [], [masters], [], [torch.zeros(())],
        **HYPER | {"lr": 0.0},
    )  # fmt: skip
    finite = ~values.isnan()
    assert torch.equal(masters[finite], values[finite]), "a rounded master was taken for a stale one"
    assert torch.equal(rounded[finite], expected[finite])
    assert rounded[~finite].isnan().all()


def test_the_scores_of_a_statistic_are_those_after_this_gradient(native):
    # the statistic is read, added to and compared in one pass; the reference does one after the other
    grad, cut = torch.randn(3000), reference.Cuts(torch.tensor([0xBF80_0000]), torch.tensor([-1]))
    for backend in (native, reference):
        statistic, param = torch.linspace(0, 1, 6000)[::2], torch.zeros(3000)
        backend.adamw_(
            [param], [grad], [torch.zeros(3000)], [torch.zeros(3000)], [], [torch.zeros(())], **HYPER,
            scores=[statistic], cuts=cut, statistics=[statistic], nonfinite=[torch.tensor(False)],
        )  # fmt: skip
        assert torch.equal(param != 0, torch.linspace(0, 1, 6000)[::2] + grad**2 > 1)


def test_a_step_that_found_infinities_writes_and_counts_nothing(native):
    param, step, statistic = torch.ones(5), torch.zeros(()), torch.zeros(5)
    arguments = ([param], [torch.ones(5)], [torch.zeros(5)], [torch.zeros(5)])
    where = [torch.arange(5, dtype=torch.int32)]
    native.adamw_(
        *arguments, [], [step], **HYPER, found_inf=torch.tensor(1.0), statistics=[statistic],
        nonfinite=[torch.tensor(False)],
    )  # fmt: skip
    native.adamw_indexed_(
        *arguments[:2], where, *arguments[2:], [], [], [], [step], **HYPER, found_inf=torch.tensor(1.0)
    )
    assert param.eq(1).all() and step == 0 and not statistic.any()
    native.adamw_(*arguments, [], [step], **HYPER, found_inf=torch.tensor(0.0))
    assert step == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_steps_of_any_dtype_count_as_torch_counts_in_it(native, dtype):
    for start in (0, 7, 255, 256, 2047, 2048):
        step, expected = torch.tensor(start, dtype=dtype), torch.tensor(start, dtype=dtype).add_(1)
        native.adamw_(
            [torch.zeros(2)], [torch.ones(2)], [torch.zeros(2)], [torch.zeros(2)], [], [step], **HYPER
        )
        assert torch.equal(step, expected)


def test_autograd_notices_that_a_parameter_was_updated(native):
    param = torch.nn.Parameter(torch.ones(3))
    loss = (param * param).sum()
    with torch.no_grad():
        native.adamw_(
            [param], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], [], [torch.zeros(())], **HYPER
        )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors_are_updated_too(native):
    with torch.inference_mode():
        param = torch.zeros(3)
        native.adamw_(
            [param], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], [], [torch.zeros(())], **HYPER
        )
    assert param.ne(0).all()


def test_why_not_names_what_is_missing(native):
    assert native.why_not(None) == native.why_not(torch.device("cpu")) == ""
    if torch.version.cuda is None:
        assert native.why_not(torch.device("cuda", 0)) == "this torch is not a CUDA build"
    elif not torch.cuda.is_available():
        assert native.why_not(torch.device("cuda", 0)) in ("torch finds no GPU", native._load("_cuda"))
    assert native.why_not(torch.device("meta")) == "it has no verbs for meta tensors"


def dense(**changes):
    """Arguments of `adamw_` for two tensors, some of them changed."""
    given = {
        name: [torch.ones(4), torch.ones(3, 40)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")
    }
    given |= {"max_exp_avg_sqs": [], "steps": [torch.zeros(()), torch.zeros(())]}
    return given | HYPER | changes


def indexed(**changes):
    """Arguments of `adamw_indexed_` for one tensor, some of them changed."""
    given = {"params": [torch.ones(9)], "grads": [torch.ones(9)], "indices": [torch.tensor([1, 8]).int()]}
    given |= {name: [torch.ones(2)] for name in ("exp_avgs", "exp_avg_sqs")}
    given |= {"max_exp_avg_sqs": [], "masters": [], "ages": [], "steps": [torch.zeros(())]}
    return given | HYPER | changes


TWO = [torch.ones(4), torch.ones(3, 40)]
BAD_DENSE = {
    "too few grads": ({"grads": TWO[:1]}, "grads must have one item per tensor, got 1 for 2"),
    "too many moments": ({"exp_avgs": [*TWO, TWO[0]]}, "exp_avgs must have one item per tensor, got 3"),
    "too few squares": ({"exp_avg_sqs": []}, "exp_avg_sqs must have one item per tensor, got 0"),
    "too few largest": ({"max_exp_avg_sqs": TWO[:1]}, "max_exp_avg_sqs must have one item per tensor"),
    "too few steps": ({"steps": []}, "steps must have one item per tensor, got 0"),
    "long step": ({"steps": [torch.zeros(2), torch.zeros(())]}, "steps must have 1 entries, got 2"),
    "expanded": ({"exp_avgs": [TWO[0], torch.ones(3, 1).expand(3, 40)]}, "exp_avgs must not be an expanded"),
    "integer step": ({"steps": [torch.tensor(0), torch.tensor(0)]}, "steps must be float64, float32"),
    "integer parameter": ({"params": [torch.ones(4).int(), TWO[1]]}, "params must be float64, float32"),
    "complex gradient": ({"grads": [torch.ones(4) * 1j, TWO[1]]}, "grads must be float64, float32"),
    "shorter gradient": ({"grads": [torch.ones(3), TWO[1]]}, "grads must have the shape of its parameter"),
    "other shape": ({"grads": [TWO[0], torch.ones(40, 3)]}, "grads must have the shape of its parameter"),
    "short moments": ({"exp_avgs": [TWO[0], torch.ones(119)]}, "exp_avgs must have the shape"),
    "meta gradient": ({"grads": [TWO[0], torch.ones(3, 40, device="meta")]}, "Meta tensors"),
    "short bits": (
        {"bits": [torch.zeros(4).byte(), torch.zeros(15).byte()]},
        "bits must have 16 bytes for 120 entries, got 15",
    ),
    "wide bits": ({"bits": [torch.zeros(4).int(), torch.zeros(16).int()]}, "bits must be uint8"),
    "one mask": ({"bits": [torch.zeros(4).byte()]}, "bits must have one item per tensor, got 1 for 2"),
    "one key": ({"seeded": reference.Draws(1, 2, 3, [4])}, "seeded must have one key per tensor, got 1"),
    "negative key": ({"seeded": reference.Draws(1, 2, 3, [4, -1])}, r"seeded.keys must be in \[0, 2\*\*32\)"),
    "threshold": ({"seeded": reference.Draws(1, 2, 2**32 + 1, [4, 5])}, "seeded.threshold must be in"),
    "draw": ({"rounding": reference.Draws(1, 2**32, 3, [4, 5])}, "rounding.draw must be in"),
    "one geometry": ({"geometries": [(0, 4, 4)]}, "geometries must have three numbers per tensor, got 3"),
    "far out": ({"geometries": [(2**62, 1, 2**62), (0, 1, 1)]}, r"must give indices below 2\*\*63"),
    "no width": ({"geometries": [(0, 0, 4), (0, 1, 1)]}, "geometries must have .* got 0, 0 and 4"),
    "unselected": ({"unselected": "thawed"}, "unselected must be 'frozen', 'zero_grad' or 'track', got"),
    "kind": ({"kind": "cubes"}, "kind must be 'squares', 'signed' or 'absolute', got 'cubes'"),
    "no flags": ({"statistics": TWO}, "nonfinite must have one item per tensor, got 0 for 2"),
    "float cuts": (
        {"scores": TWO, "cuts": reference.Cuts(torch.zeros(2), torch.zeros(2))},
        "cuts.keys must be int64",
    ),
    "one cut": (
        {"scores": TWO, "cuts": reference.Cuts(torch.tensor([0]), torch.tensor([0]))},
        "cuts.keys must have 2 entries, got 1",
    ),
    "short scores": (
        {"scores": [torch.ones(4)] * 2, "cuts": reference.Cuts(torch.tensor([0, 0]), torch.tensor([0, 0]))},
        "scores must have 120 entries, got 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_DENSE.values(), ids=BAD_DENSE.keys())
def test_bad_arguments_are_refused_before_anything_is_written(native, changes, message):
    arguments = dense(**changes)
    given = [t for v in arguments.values() if isinstance(v, list) for t in v if isinstance(t, torch.Tensor)]
    before = [tensor.clone() for tensor in given]
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        native.adamw_(**arguments)
    for was, now in zip(before, given, strict=True):
        assert was.is_meta or torch.equal(was, now)


BAD_INDEXED = {
    "float indices": ({"indices": [torch.ones(2)]}, "indices must be int32 or int64"),
    "short indices": ({"indices": [torch.ones(2).short()]}, "indices must be int32 or int64"),
    "matrix": ({"indices": [torch.ones(1, 2).int()]}, "indices must have one dimension, got 2"),
    "beyond the end": ({"indices": [torch.tensor([1, 9]).int()]}, r"indices must be in \[0, 9\), got 1 to 9"),
    "negative": ({"indices": [torch.tensor([-1, 8])]}, r"indices must be in \[0, 9\), got -1 to 8"),
    "short moments": ({"exp_avgs": [torch.ones(1)]}, "exp_avgs must have 2 entries, got 1"),
    "dense moments": ({"exp_avg_sqs": [torch.ones(9)]}, "exp_avg_sqs must have 2 entries, got 9"),
    "short gradient": ({"grads": [torch.ones(8)]}, "grads must have 9 entries, got 8"),
    "compact gradient": (
        {"compact_grads": True, "grads": [torch.ones(9)]},
        "grads must have 2 entries, got 9",
    ),
    "narrow masters": ({"masters": [torch.ones(2).bfloat16()]}, "masters must be float32"),
    "long ages": ({"ages": [torch.ones(2).long()]}, "ages must be int32"),
    "short ages": ({"ages": [torch.ones(1).int()]}, "ages must have 2 entries, got 1"),
    "two masters": ({"masters": [torch.ones(2)] * 2}, "masters must have one item per tensor, got 2 for 1"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_INDEXED.values(), ids=BAD_INDEXED.keys())
def test_bad_compact_arguments_are_refused(native, changes, message):
    with pytest.raises(RuntimeError, match=message):
        native.adamw_indexed_(**indexed(**changes))


def test_indices_that_an_update_would_overwrite_are_refused(native):
    numbers = torch.tensor([1, 8], dtype=torch.int32)
    overwritten = [numbers.view(torch.float32)]
    message = "indices must not share memory with a tensor that is written"
    for name in ("exp_avgs", "exp_avg_sqs"):
        with pytest.raises(RuntimeError, match=message):
            native.adamw_indexed_(**indexed(indices=[numbers], **{name: overwritten}))
    with pytest.raises(RuntimeError, match=message):
        native.adamw_indexed_(**indexed(indices=[numbers], ages=[numbers]))
    with pytest.raises(RuntimeError, match=message):
        native.gather_(overwritten, [torch.ones(9)], [numbers])
    with pytest.raises(RuntimeError, match=message):
        native.apply_delta_(overwritten, [numbers[:1]], [torch.ones(1)])
    assert numbers.tolist() == [1, 8]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [-1, 9, 2**31 - 1, -(2**31)])
def test_a_bad_index_amid_good_ones_is_an_error_and_no_crash(native, dtype, bad):
    where = [torch.tensor([1, bad, 8], dtype=dtype)]
    three = [[torch.ones(3)] for _ in range(3)]
    message = "indices must ascend and lie inside"
    with pytest.raises(RuntimeError, match=message):
        native.adamw_indexed_(**indexed(indices=where, exp_avgs=three[0], exp_avg_sqs=three[1]))
    with pytest.raises(RuntimeError, match=message):
        native.gather_(three[0], [torch.ones(9)], where)
    with pytest.raises(RuntimeError, match=message):
        native.norm([torch.ones(9)], indices=where)
    for mode in ("replace", "add", "xor"):
        with pytest.raises(RuntimeError, match=message):
            native.apply_delta_([torch.ones(9)], where, three[0], mode=mode)


def rounded(native, draw=0, keys=(1,), geometries=None):
    """One rounded accumulation; nothing may be written where an argument is refused."""
    statistic = torch.ones(3, dtype=torch.bfloat16)
    try:
        native.accumulate_(
            [statistic], [torch.ones(3)], [torch.tensor(False)], kind="signed",
            rounding=reference.Draws(5, draw, 0, keys), geometries=geometries,
        )  # fmt: skip
    finally:
        assert statistic.tolist() == [1, 1, 1]


ONE = torch.tensor([0])
BAD_OTHERS = {
    "statistic shape": (
        lambda n: n.accumulate_([torch.ones(3)], [torch.ones(4)], [torch.tensor(False)], kind="signed"),
        "grads must have the shape",
    ),
    "flag dtype": (
        lambda n: n.accumulate_([torch.ones(3)], [torch.ones(3)], [torch.tensor(0.0)], kind="signed"),
        "nonfinite must be bool",
    ),
    "first counts": (
        lambda n: n.accumulate_(
            [torch.ones(3)], [torch.ones(3)], [torch.tensor(False)], kind="signed",
            first_counts=torch.zeros(1, 2047, dtype=torch.int64),
        ),
        r"first_counts must be \[1, 2048\]",
    ),
    "rounding keys": (
        lambda n: rounded(n, keys=[1, 2]),
        "rounding must have one key per tensor, got 2 for 1 tensors",
    ),
    "no rounding keys": (
        lambda n: rounded(n, keys=[]),
        "rounding must have one key per tensor, got 0 for 1 tensors",
    ),
    "rounding key": (lambda n: rounded(n, keys=[1 << 32]), r"rounding.keys must be in \[0, 2\*\*32\)"),
    "rounding draw": (lambda n: rounded(n, draw=-1), r"rounding.draw must be in \[0, 2\*\*32\), got -1"),
    "rounding places": (
        lambda n: rounded(n, geometries=[(0, 3, 3)] * 2),
        "geometries must have three numbers per tensor, got 6 for 1 tensors",
    ),
    "rounding stride": (
        lambda n: rounded(n, geometries=[(0, 3, 0)]),
        "geometries must have offset >= 0, inner >= 1 and stride >= 1, got 0, 3 and 0",
    ),
    "width": (
        lambda n: n.histogram([torch.ones(3)], shift=0, width=12, prefixes=ONE, per_tensor=True),
        r"width must be in \[0, 11\], got 12",
    ),
    "shift": (
        lambda n: n.histogram([torch.ones(3)], shift=-1, width=4, prefixes=ONE, per_tensor=True),
        "shift must be in .* got -1",
    ),
    "prefixes": (
        lambda n: n.histogram([torch.ones(3)] * 2, shift=0, width=4, prefixes=ONE, per_tensor=True),
        "prefixes must have 2 entries, got 1",
    ),
    "scores": (
        lambda n: n.compact([torch.ones(3).int()], cuts=reference.Cuts(ONE, ONE), as_bits=True),
        "scores must be float64, float32",
    ),
    "half buffer": (
        lambda n: n.gather_([torch.ones(1).half()], [torch.ones(3)], [ONE]),
        "buffers must be float32 or float64",
    ),
    "long buffer": (lambda n: n.gather_([torch.ones(2)], [torch.ones(3)], [ONE]), "buffers must have 1"),
    "delta dtype": (
        lambda n: n.apply_delta_([torch.ones(3)], [ONE], [torch.ones(1).half()]),
        "values must have the dtype of their parameter",
    ),
    "delta mode": (
        lambda n: n.apply_delta_([torch.ones(3)], [ONE], [torch.ones(1)], mode="swap"),
        "mode must be 'replace', 'add' or 'xor', got 'swap'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD_OTHERS.values(), ids=BAD_OTHERS.keys())
def test_other_verbs_refuse_what_they_cannot_mean(native, call, message):
    with pytest.raises(RuntimeError, match=message):
        call(native)


# --- any arguments -----------------------------------------------------------------------------------------

CALLS = 1300  # for each of 16 seeds: 20,800
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OTHERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64]
OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SIZES = [0, 1, 1, 2, 5, 31, 32, 33, 64, 65, 127, 128, 129, 300, 1023, 1024, 1025, 2100]
EXTREMES = [0, 1, -1, 7, 64, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**62, 2**63 - 1, -(2**63)]
NUMBERS = [0.0, 1.0, -1.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"), None, "much", 10**400]
WRITTEN = {
    "params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps", "statistics", "nonfinite", "masters",
    "ages", "buffers", "first_counts",
}  # fmt: skip


class Arguments:
    """Random arguments of one call. All tensors lie in one storage of random bytes, with gaps, or each ends
    where its own storage does.
    """

    def __init__(self, choose: random.Random, noise: torch.Tensor) -> None:
        self.choose, self.noise = choose, noise
        self.together = choose.random() < 0.6
        self.room, self.used = noise.clone() if self.together else noise[:0], 0

    def tensor(self, dtype, shape):
        numel, step = math.prod(shape), self.choose.choice([1, 1, 1, 2, 3])
        strides = [step * math.prod(shape[i + 1 :]) for i in range(len(shape))]
        if len(shape) == 2 and self.choose.random() < 0.3:
            strides = [step, step * shape[0]]
        entries = max(numel - 1, 0) * step + min(numel, 1)
        offset = -(-self.used // dtype.itemsize) + self.choose.choice([0, 1, 3, 16])
        end = (offset + entries) * dtype.itemsize
        if self.together and end + 4096 <= self.room.numel():
            room, self.used = self.room, end
        else:
            offset = self.choose.choice([0, 1, 3])
            room = self.noise[: (offset + entries) * dtype.itemsize].clone()
        made = torch.empty(0, dtype=dtype).set_(room.untyped_storage(), offset, shape, strides)
        return made.zero_() if dtype == torch.bool else made

    def tensors(self, dtypes, shapes):
        return [self.tensor(self.choose.choice(dtypes), shape) for shape in shapes]

    def filled(self, dtype, values):
        made = self.tensor(dtype, (len(values),))
        made.copy_(torch.tensor(values, dtype=dtype))
        return made

    def shape(self):
        numel = self.choose.choice(SIZES)
        rows = self.choose.choice([1, 2, 3, 5])
        return self.choose.choice(
            [(numel,), (rows, numel // rows), (1, numel, 1), () if numel == 1 else (2, 3)]
        )

    def shapes(self):
        return [self.shape() for _ in range(self.choose.choice([0, 1, 1, 1, 2, 3]))]

    def maybe(self, made, chance=0.4):
        return made if self.choose.random() < chance else None

    def geometries(self, shapes):
        rows = []
        for shape in shapes:
            inner = self.choose.choice([1, 2, 13, 100, 1500, max(math.prod(shape), 1)])
            offset = self.choose.choice([0, 1, 77, 1023, 1024, 2**32 + 5, 2**50])
            rows.append((offset, inner, inner + self.choose.choice([0, 1, 1000, 2**40])))
        return self.maybe(rows)

    def draws(self, shapes):
        threshold = self.choose.choice([0, 1, 2**30, 2**31, 2**32 - 1, 2**32])
        keys = [self.choose.randrange(2**32) for _ in shapes]
        seed, draw = self.choose.randrange(2**64), self.choose.randrange(2**32)
        return reference.Draws(seed, draw, threshold, keys, self.choose.random() < 0.2)

    def cuts(self, shapes):
        keys = [self.choose.choice([*EXTREMES, self.choose.randrange(2**32)]) for _ in shapes]
        ties = [self.choose.choice([*EXTREMES, self.choose.randrange(3000)]) for _ in shapes]
        return reference.Cuts(self.filled(torch.int64, keys), self.filled(torch.int64, ties))

    def bits(self, shapes):
        return self.tensors([torch.uint8], [((math.prod(s) + 31) // 32 * 4,) for s in shapes])

    def indices(self, shapes):
        lists = []
        for shape in shapes:
            numel = math.prod(shape)
            count = self.choose.choice([0, 1, numel // 50, numel // 3, numel])
            listed = sorted(self.choose.sample(range(numel), min(count, numel)))
            lists.append(self.filled(self.choose.choice([torch.int32, torch.int64]), listed))
        return lists

    def adamw_(self):
        shapes = self.shapes()
        given = {
            name: self.tensors(FLOATS, shapes) for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")
        }
        given |= {"max_exp_avg_sqs": self.maybe(self.tensors(FLOATS, shapes)) or []}
        given |= {"steps": self.tensors(FLOATS, [()] * len(shapes)), **HYPER, "rescale": 2.0}
        given |= {"geometries": self.geometries(shapes), "rounding": self.maybe(self.draws(shapes))}
        match self.choose.randrange(4):
            case 0:
                given |= {"bits": self.bits(shapes)}
            case 1:
                given |= {"seeded": self.draws(shapes)}
            case 2:
                given |= {"scores": self.tensors(FLOATS, shapes), "cuts": self.cuts(shapes)}
        if self.choose.random() < 0.4:
            given |= {"statistics": self.tensors(FLOATS, shapes), "kind": "absolute"}
            given |= {"nonfinite": self.tensors([torch.bool], [()] * len(shapes))}
            given |= {"statistic_scales": self.maybe(self.tensors(FLOATS, [()] * len(shapes)))}
        return given | {"unselected": self.choose.choice(["frozen", "zero_grad", "track"])}

    def adamw_indexed_(self):
        shapes = self.shapes()
        indices, dtypes = self.indices(shapes), self.choose.choices(FLOATS, k=len(shapes))
        listed = [index.shape for index in indices]
        wide = [torch.float64 if dtype == torch.float64 else torch.float32 for dtype in dtypes]
        given = {"params": [self.tensor(*what) for what in zip(dtypes, shapes, strict=True)]}
        given |= {name: self.tensors(FLOATS, listed) for name in ("exp_avgs", "exp_avg_sqs")}
        given |= {"max_exp_avg_sqs": self.maybe(self.tensors(FLOATS, listed)) or []}
        given |= {
            "masters": self.maybe([self.tensor(*what) for what in zip(wide, listed, strict=True)]) or []
        }
        given |= {"ages": self.maybe(self.tensors([torch.int32], listed)) or []}
        for ages in given["ages"]:
            ages.remainder_(50).sub_(3)
            ages[:1] = self.choose.choice([2**31 - 1, -1, -(2**31)])
        compact = self.choose.random() < 0.3
        given |= {"compact_grads": compact, "grads": self.tensors(FLOATS, listed if compact else shapes)}
        return given | {"indices": indices, "steps": self.tensors(FLOATS, [()] * len(shapes)), **HYPER}

    def accumulate_(self):
        shapes = self.shapes()
        rows = self.choose.choice([1, len(shapes)])
        return {
            "statistics": self.tensors(FLOATS, shapes), "grads": self.tensors(FLOATS, shapes),
            "nonfinite": self.tensors([torch.bool], [()] * len(shapes)),
            "kind": self.choose.choice(["squares", "signed", "absolute"]),
            "grad_scales": self.maybe(self.tensors(FLOATS, [()] * len(shapes))),
            "first_counts": self.maybe(self.tensor(torch.int64, (rows, 2048))),
            "absolute": self.choose.random() < 0.5,
            "rounding": self.maybe(self.draws(shapes)), "geometries": self.geometries(shapes),
        }  # fmt: skip

    def histogram(self):
        shapes = self.shapes()
        numbers = [*EXTREMES, self.choose.randrange(2**11)]
        width = self.choose.choice([0, 1, 10, 11])
        given = {"scores": self.tensors(FLOATS, shapes), "geometries": self.geometries(shapes)}
        given |= {"width": width, "shift": self.choose.choice([0, 5, 10, 21, 32, 40, 63 - width])}
        given["prefixes"] = self.filled(torch.int64, self.choose.choices(numbers, k=len(shapes)))
        given["ties"] = self.maybe(self.filled(torch.int64, self.choose.choices(numbers, k=len(shapes))))
        return given | {"per_tensor": self.choose.random() < 0.5, "absolute": self.choose.random() < 0.5}

    def compact(self):
        shapes = self.shapes()
        given = {"scores": self.tensors(FLOATS, shapes), "cuts": self.cuts(shapes)}
        given |= {"geometries": self.geometries(shapes), "as_bits": self.choose.random() < 0.5}
        return given | {"absolute": self.choose.random() < 0.5}

    def gather_(self):
        shapes = self.shapes()
        indices = self.indices(shapes)
        buffers = self.tensors([torch.float32, torch.float64], [index.shape for index in indices])
        return {"buffers": buffers, "tensors": self.tensors(FLOATS, shapes), "indices": indices}

    def norm(self):
        shapes = self.shapes()
        given = {"grads": self.tensors(FLOATS, shapes), "geometries": self.geometries(shapes)}
        masks = [
            {"indices": self.indices(shapes)},
            {"bits": self.bits(shapes)},
            {"seeded": self.draws(shapes)},
        ]
        return given | self.choose.choice([{}, *masks])

    def apply_delta_(self):
        shapes = self.shapes()
        indices, dtypes = self.indices(shapes), self.choose.choices(FLOATS, k=len(shapes))
        return {
            "params": [self.tensor(*what) for what in zip(dtypes, shapes, strict=True)],
            "values": [self.tensor(dtype, index.shape) for dtype, index in zip(dtypes, indices, strict=True)],
            "indices": indices, "mode": self.choose.choice(["replace", "add", "xor"]),
        }  # fmt: skip

    def spoil(self, given):
        """One argument becomes another: of the wrong kind, or the memory of another one."""
        name = self.choose.choice(list(given))
        value, number = given[name], self.choose.choice(EXTREMES)
        if isinstance(value, reference.Draws):
            field = self.choose.choice(["draw", "threshold", "seed", "keys"])
            changed = [number, *value.keys[1:]] if field == "keys" else number
            given[name] = value._replace(**{field: changed})
        elif isinstance(value, reference.Cuts):
            given[name] = reference.Cuts(value.last_ties, self.another(given, value.keys))
        elif isinstance(value, torch.Tensor):
            given[name] = self.another(given, value)
        elif isinstance(value, list) and (not value or self.choose.random() < 0.2):
            given[name] = self.choose.choice([value[1:], [*value, *value], [None], [*value, torch.ones(3)]])
        elif name == "geometries" and value and isinstance(value[-1], tuple):
            value[-1] = tuple(self.choose.choice([old, old, number]) for old in value[-1])
        elif isinstance(value, list):
            place = self.choose.randrange(len(value))
            listed = value[place]
            if name == "indices" and self.choose.random() < 0.7 and self.is_list_of_indices(listed):
                fits = number if -(2**31) <= number < 2**31 else listed.numel()
                listed[self.choose.randrange(listed.numel())] = fits
            else:
                value[place] = self.another(given, listed)
        elif isinstance(value, float):
            given[name] = self.choose.choice(NUMBERS)
        elif isinstance(value, str):
            given[name] = self.choose.choice(["", value + "s", "signed", "track", None])
        elif value is not None:
            given[name] = self.choose.choice([number, 2**64, None, 0.5])

    @staticmethod
    def is_list_of_indices(tensor):
        ints = (torch.int32, torch.int64)
        return isinstance(tensor, torch.Tensor) and tensor.dim() == 1 and len(tensor) and tensor.dtype in ints

    def another(self, given, tensor):
        if not isinstance(tensor, torch.Tensor):
            return tensor
        known = [t for value in given.values() if isinstance(value, list) for t in value]
        known = [t for t in known if isinstance(t, torch.Tensor) and not t.is_meta] or [tensor]
        other, size = self.choose.choice(known), tensor.dtype.itemsize
        match self.choose.randrange(8):
            case 0:
                return self.tensor(self.choose.choice(FLOATS + OTHERS), tuple(tensor.shape))
            case 1:
                return tensor.to("meta")
            case 2:
                return self.tensor(tensor.dtype, (max(tensor.numel() + self.choose.choice([-1, 1]), 0),))
            case 3:
                return tensor.reshape(-1)[:1].expand(tensor.numel())
            case 4:
                return tensor.reshape(1, -1, 1)
            case 5:
                return self.choose.choice([None, 1.0, [tensor]])
            case 6:
                return other
        # as many entries of the same dtype in the memory of another argument
        first = -(-other.storage_offset() * other.dtype.itemsize // size) + self.choose.randrange(3)
        last = other.untyped_storage().nbytes() // size - max(tensor.numel(), 1)
        if last < 0:
            return other
        shape = tensor.shape
        inside = torch.empty(0, dtype=tensor.dtype)
        return inside.set_(other.untyped_storage(), min(first, last), shape, tensor.new_empty(shape).stride())

    def may_change(self, given):
        """A byte each for those of `room`: whether a written argument has it."""
        marks = torch.zeros_like(self.room)
        for name in WRITTEN & given.keys():
            for tensor in given[name] if isinstance(given[name], list) else [given[name]]:
                if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                    continue
                if tensor.untyped_storage().data_ptr() == self.room.data_ptr():
                    sizes = [
                        1 if stride == 0 else size
                        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
                    ]
                    mark = torch.empty(0, dtype=OF_SIZE[tensor.dtype.itemsize])
                    offset = tensor.storage_offset()
                    mark.set_(marks.untyped_storage(), offset, sizes, tensor.stride()).fill_(
                        255 if mark.dtype == torch.uint8 else -1
                    )
        return marks


VERBS = [
    "accumulate_", "adamw_", "adamw_indexed_", "apply_delta_", "compact", "gather_", "histogram", "norm",
]  # fmt: skip


@pytest.mark.one_in(4)
@pytest.mark.parametrize("seed", range(16))
def test_any_arguments_end_in_a_result_or_an_exception_and_touch_nothing_else(native, seed):
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (1 << 18,), dtype=torch.uint8, generator=generator)
    torch.set_num_threads(1 + seed % 2)
    torch.ops.sparse_optim.use_vector_level(LEVELS()[seed // 2 % len(LEVELS())])
    refused = 0
    for call in range(CALLS):
        arguments = Arguments(choose, noise)
        verb = choose.choice(VERBS)
        given = getattr(arguments, verb)()
        spoiled = choose.choice([0, 0, 1, 1, 2])
        for _ in range(spoiled):
            arguments.spoil(given)
        may_change, before = arguments.may_change(given), arguments.room.clone()
        try:
            getattr(native, verb)(**given)
        except (ValueError, TypeError, RuntimeError, IndexError):
            if not spoiled:
                raise
            refused += 1
        changed = (arguments.room ^ before) & ~may_change
        assert not changed.any(), f"call {call}, {verb}: wrote where no written argument lies"
    assert CALLS / 5 < refused < CALLS / 2
