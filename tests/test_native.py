"""Contract under test: the native library draws the words of the seeded rule, bit for bit.

The rule is written a second time here in plain Python integers, which cannot overflow, and is itself held to
the published known answers of Philox-4x32-10. The C++ header and the reference backend are compared with it.
"""

from __future__ import annotations

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
