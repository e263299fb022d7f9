"""Contract under test: a delta's file is read as it was written or refused in one sentence, whatever somebody
made of it; checkpoints are read without running anything; and a file that is written is the old one or the
new one, whenever the writer dies.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from sparse_optim import (
    Delta,
    apply_delta,
    checkpoints,
    extract_delta,
    load_delta,
    patch_checkpoint,
    save_delta,
)
from sparse_optim.deltas import TensorDelta, decode_indices, encode_indices, index_dtype, value_dtype

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

ROOT = Path(__file__).parent.parent
DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
# what newer Pythons say of every fork; children here touch nothing that another thread may hold
quiet_fork = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
# argument, need, what there is instead, remedy
SENTENCE = re.compile(r"\S.* must .+, got .+; [a-z].*\w\W?\.")


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Entries of any bits: NaNs of all kinds, infinities, both zeros."""
    if not (size := math.prod(shape) * dtype.itemsize):
        return torch.zeros(shape, dtype=dtype)
    values = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, size, np.uint8)
    return torch.from_numpy(values).view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def fingerprint(tensors: dict[str, torch.Tensor]) -> list[Any]:
    return [(name, str(t.dtype), tuple(t.shape), bits(t)) for name, t in tensors.items()]


def told(delta: Delta) -> Any:
    """All that a delta says, for comparing."""

    def of(tensor: torch.Tensor | None) -> Any:
        return None if tensor is None else (tensor.dtype, tuple(tensor.shape), bits(tensor))

    parts = [
        (name, part.shape, part.dtype, of(part.indices), of(part.values), part.base, part.tuned)
        for name, part in delta.tensors.items()
    ]
    about = delta.mode, delta.base_model, delta.prefix, dict(delta.aliases), delta.config, delta.conflicts
    return parts, about


def small_model() -> dict[str, torch.Tensor]:
    return {
        "w": random_bits(torch.bfloat16, (12, 10), 1),
        "b": random_bits(torch.float32, (7,), 2),
        "n": random_bits(torch.int64, (5,), 3),
        "flag": torch.tensor(True),
        "none": torch.zeros(0, 3),
    }


def small_delta(mode: str = "xor") -> Delta:
    base = small_model()
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["w"].view(-1).view(torch.int16)[torch.arange(3, 115, 6)] ^= 77
    tuned["b"].view(torch.int32)[[0, 4]] ^= 5
    if mode != "add":
        tuned["flag"].logical_not_()
    tuned["head"] = random_bits(torch.float16, (2, 2), 4)
    made = extract_delta(base, tuned, mode=mode, base_model="a model")
    config = {"base": {"labels": [], "x": None}, "tuned": {"labels": ["no", "yes"], "x": 0.5}}
    return Delta(made.tensors, made.mode, "a model", "m.", {"tied": "w"}, config, 3)


def saved(delta: Delta, path: Path) -> bytes:
    save_delta(delta, path)
    return path.read_bytes()


def contents_of(data: bytes) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The manifest without its checksum, and of each tensor of the payload [dtype, shape, bytes]."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    manifest = json.loads(header.pop("__metadata__")["sparse_delta"])
    del manifest["checksum"]
    payload = {
        name: [
            each["dtype"],
            each["shape"],
            data[end + each["data_offsets"][0] : end + each["data_offsets"][1]],
        ]
        for name, each in header.items()
    }
    return manifest, payload


def file_of(manifest: Any, payload: dict[str, list[Any]]) -> bytes:
    """A file as whoever knows the format would forge it: its checksum fits. A manifest may be text."""
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    try:
        digest = hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode())
    except (ValueError, RecursionError):
        digest = hashlib.sha256()
    header: dict[str, Any] = {}
    body = b""
    for name in sorted(payload):
        digest.update(json.dumps([name, *payload[name][:2]]).encode() + payload[name][2])
    for name, (dtype, shape, data) in payload.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    if text.endswith("}"):
        text = f'{text[:-1]}{", " * (text != "{}")}"checksum": "{digest.hexdigest()}"}}'
    header["__metadata__"] = {"sparse_delta": text}
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + body


def check_sentence(error: ValueError, about: str = "") -> None:
    text = str(error)
    assert text.startswith(about), text
    assert type(error) is ValueError, repr(error)
    assert text.isprintable() and len(text) < 500 and SENTENCE.fullmatch(text) and ".;" not in text, text


class Reader:
    """`load_delta` of bytes, and what came of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # held open: making a file takes longer than reading it
        self.file = os.open(path, os.O_RDWR | os.O_CREAT)

    def __call__(self, data: bytes) -> Delta | None:
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, data, 0)
        try:
            return load_delta(self.path)
        except ValueError as error:
            check_sentence(error, self.path.name)
            return None


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path / "changed.safetensors")
    yield reader
    os.close(reader.file)


# --- damaged files ----------------------------------------------------------------------------------------


def shortened(data: bytes, random_: random.Random) -> Iterator[bytes]:
    for length in range(len(data)):
        yield data[:length]


def flipped(data: bytes, random_: random.Random) -> Iterator[bytes]:
    for place in range(8 * len(data)):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        yield bytes(changed)


def overwritten(data: bytes, random_: random.Random) -> Iterator[bytes]:
    for _ in range(12_000):
        changed = bytearray(data)
        for _ in range(random_.choice((1, 1, 2, 8))):
            at = random_.randrange(len(data))
            changed[at] = random_.choice((0, 32, 34, 44, 49, 57, 91, 125, 127, 255, random_.randrange(256)))
        yield bytes(changed)


def spliced(data: bytes, random_: random.Random) -> Iterator[bytes]:
    """Parts of a file in other places of it, twice, or not at all; and bytes after its end."""
    for _ in range(12_000):
        start, stop, at = sorted(random_.randrange(len(data) + 1) for _ in range(3))
        one, other, third = data[:start], data[start:stop], data[stop:at]
        yield random_.choice(
            (
                one + data[stop:],
                one + other + other + data[stop:],
                one + third + other + data[at:],
                one + bytes(random_.randrange(1, 9)) + data[start:],
                data + bytes(random_.randrange(1, 9)),
            )
        )


def rearranged(data: bytes, random_: random.Random) -> Iterator[bytes]:
    """Headers that safetensors takes, of tensors that have changed places, names and shapes, and are gone."""
    end = 8 + int.from_bytes(data[:8], "little")
    payload = contents_of(data)[1]
    metadata = json.loads(data[8:end])["__metadata__"]
    for _ in range(12_000):
        parts = [[name, *each] for name, each in payload.items()]
        for _ in range(random_.choice((1, 1, 2))):
            i, j = (random_.randrange(len(parts)) for _ in range(2))
            how = random_.randrange(6)
            if how == 0:
                parts[i][0], parts[j][0] = parts[j][0], parts[i][0]
            elif how == 1:
                parts[i][3], parts[j][3] = parts[j][3], parts[i][3]
            elif how == 2 and len(parts) > 1:
                del parts[i]
            elif how == 3:
                parts.append([random_.choice(("x", "w.indices.values", "head")), *parts[i][1:]])
            elif how == 4:
                parts[i][1] = random_.choice(("U8", "I8", "I16", "BF16", "F32", "F4", "BOOL"))
            else:
                parts[i][2] = random_.choice(([], [1], [0], [2, 2], [4], [1, *parts[i][2]]))
        random_.shuffle(parts)
        entries, body = [f'"__metadata__": {json.dumps(metadata)}'], b""
        for name, dtype, shape, each in parts:
            about = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(each)]}
            entries.append(f"{json.dumps(name)}: {json.dumps(about)}")
            body += each
        head = ("{" + ", ".join(entries) + "}").encode()
        yield len(head).to_bytes(8, "little") + head + body


@pytest.mark.parametrize("mode", ["xor", "add"])
@pytest.mark.parametrize(
    "damage", [shortened, flipped, overwritten, spliced, rearranged], ids=lambda damage: damage.__name__
)
def test_a_damaged_file_is_refused_in_one_sentence_or_read_as_it_was(
    damage: Callable[..., Iterator[bytes]], mode: str, reader: Reader, every_case: bool
) -> None:
    """Ten runs: 3,000 files, or all of them: above 100,000."""
    data = saved(small_delta(mode), reader.path.with_name("delta.safetensors"))
    original = reader(data)
    assert original is not None
    whole = told(original)
    files = list(damage(data, random.Random(0)))
    if not every_case:
        # those of the beginning, where lengths and braces are, and as many of the rest
        files = [*files[:150], *random.Random(1).sample(files[150:], 150)]
    outcomes: Counter[str] = Counter()
    for changed in files:
        got = reader(changed)
        outcomes["refused" if got is None else "same"] += 1
        assert got is None or told(got) == whole
    assert outcomes["refused"] > 0.7 * len(files), outcomes
    if damage in (shortened, flipped):
        assert outcomes["refused"] == len(files), outcomes


# --- forged files -----------------------------------------------------------------------------------------

HUGE = 2**63
VALUES: list[Any] = [
    0, 1, -1, 2, 7, 19, 20, 21, 40, 41, 120, 121, 2**31, 2**32 + 20, 2**62, HUGE, -HUGE, 2**64, 10**400,
    True, False, None, 0.0, 1.0, 20.0, 1e308, float("nan"), float("inf"),
    "", "1", "x", "\0", "a/../b", "\ud800", "\x1b[31m\n", "y" * 3000, "w", "xor", "add", "replace",
    "F32", "F16", "BF16", "I16", "U8", "BOOL", "C64", "F4",
    [], [0], [120], [10, 12], [-1], [True], [12.0, 10], ["12"], [2**62, 2], [0, 2**61, 2**61], [1] * 70,
    {}, {"w": "w"}, {"a": "b", "b": "a"}, {"a": 1}, {"": {}}, {"base": {}, "tuned": {}}, {"base": 1},
]  # fmt: skip


def places_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places_of(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield from places_of(value[i], (*path, i))


def edited(manifest: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value in one place; `...` as the value: without that place."""
    if not path:
        return value
    copy = dict(manifest) if isinstance(manifest, dict) else list(manifest)
    if len(path) == 1 and value is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = edited(manifest[path[0]] if len(path) > 1 else None, path[1:], value)
    return copy


def forgeries(data: bytes, random_: random.Random, pairs: int) -> Iterator[bytes]:
    manifest, payload = contents_of(data)
    places = list(places_of(manifest))
    for path in places:
        for value in VALUES:
            yield file_of(edited(manifest, path, value), payload)
        if path:
            yield file_of(edited(manifest, path, ...), payload)
            for name in ("", "a/b", "\0", "\ud800", "__metadata__", "w", "x" * 70_000):
                renamed = (
                    edited(manifest, (*path[:-1], name), None) if isinstance(path[-1], str) else manifest
                )
                yield file_of(renamed, payload)
    # two lies that may fit each other
    for _ in range(pairs):
        first, second = random_.choice(places), random_.choice(places)
        try:
            both = edited(edited(manifest, first, random_.choice(VALUES)), second, random_.choice(VALUES))
        except (KeyError, TypeError, IndexError):
            continue
        yield file_of(both, payload)


@pytest.mark.parametrize("mode", ["xor", "replace", "add"])
def test_a_forged_file_is_refused_or_its_delta_is_valid_and_changes_all_or_nothing(
    mode: str, reader: Reader, every_case: bool
) -> None:
    """Of each mode: 250 files, or about 8,000."""
    data = saved(small_delta(mode), reader.path.with_name("delta.safetensors"))
    base = small_model() | {"head": torch.zeros(2, 2, dtype=torch.float16)}
    untouched = fingerprint(base)
    checkpoint, output = (reader.path.with_name(name) for name in ("base.safetensors", "out.safetensors"))
    safetensors.torch.save_file(base, checkpoint)
    files = list(forgeries(data, random.Random(0), 3000))
    if not every_case:
        files = random.Random(1).sample(files, 250)
    outcomes: Counter[str] = Counter()
    for forged in files:
        delta = reader(forged)
        if delta is None:
            outcomes["refused"] += 1
            continue
        for verify in (True, False):
            model = {name: tensor.clone() for name, tensor in base.items()}
            try:
                apply_delta(model, delta, verify=verify)
                outcomes["applied"] += 1
            except ValueError:
                outcomes["not applied"] += 1
                assert fingerprint(model) == untouched
        if outcomes["applied"] % 8 == 0:
            output.unlink(missing_ok=True)
            try:
                patch_checkpoint(checkpoint, delta, output)
                safetensors.torch.load_file(output)
            except ValueError:
                assert not output.exists()
    assert min(outcomes[each] for each in ("refused", "applied", "not applied")) > 8, outcomes
    assert {path.name for path in reader.path.parent.iterdir()} <= {
        "delta.safetensors", "base.safetensors", "out.safetensors", "changed.safetensors"
    }  # fmt: skip


def of_w(**changes: Any) -> Callable[[Any, Any], None]:
    def forge(manifest: dict[str, Any], payload: dict[str, list[Any]]) -> None:
        manifest["tensors"]["w"] |= changes

    return forge


def of_all(**changes: Any) -> Callable[[Any, Any], None]:
    def forge(manifest: dict[str, Any], payload: dict[str, list[Any]]) -> None:
        manifest |= changes

    return forge


def of_code(change: Callable[[bytearray], object]) -> Callable[[Any, Any], None]:
    def forge(manifest: dict[str, Any], payload: dict[str, list[Any]]) -> None:
        code = bytearray(payload["w.indices"][2])
        change(code)
        payload["w.indices"][1:] = [len(code)], bytes(code)

    return forge


def recoded(code: bytes, rice: int, count: int, shape: list[int]) -> Callable[[Any, Any], None]:
    def forge(manifest: dict[str, Any], payload: dict[str, list[Any]]) -> None:
        manifest["tensors"]["w"] |= {"rice": rice, "changed": count, "shape": shape}
        payload["w.indices"] = ["U8", [len(code)], code]
        payload["w.values"] = ["I16", [count], bytes(2 * count)]

    return forge


def unnamed(manifest: dict[str, Any], payload: dict[str, list[Any]]) -> None:
    payload["x"] = ["U8", [1], b"x"]


def without_indices(manifest: dict[str, Any], payload: dict[str, list[Any]]) -> None:
    del payload["w.indices"]


def whole_of_another_shape(manifest: dict[str, Any], payload: dict[str, list[Any]]) -> None:
    manifest["tensors"]["head"]["shape"] = [4]


def whole_of_another_dtype(manifest: dict[str, Any], payload: dict[str, list[Any]]) -> None:
    manifest["tensors"]["head"]["dtype"] = "BF16"


def differences_of_integers(manifest: dict[str, Any], payload: dict[str, list[Any]]) -> None:
    manifest["mode"] = "add"
    manifest["tensors"] = {"n": {"dtype": "I64", "shape": [5], "changed": 1, "rice": 0}}
    payload.clear()
    payload |= {"n.indices": ["U8", [1], b"\1"], "n.values": ["F32", [1], bytes(4)]}


def empty_of_endless_strides(manifest: dict[str, Any], payload: dict[str, list[Any]]) -> None:
    shape = [0, 2**61, 2**61]
    manifest["tensors"]["e"] = {"dtype": "F32", "shape": shape}
    payload["e.values"] = ["F32", shape, b""]


def sum_that_wraps_around(manifest: dict[str, Any], payload: dict[str, list[Any]]) -> None:
    """16 gaps of 2**60 are 2**64; each of them fits into the tensor."""
    ones = np.zeros(16 * (2**20 + 1), bool)
    ones[2**20 :: 2**20 + 1] = True
    code = np.packbits(ones, bitorder="little").tobytes() + bytes(40 * 2)
    recoded(code, 40, 16, [2**61])(manifest, payload)


LIES = {
    "one entry more": of_w(changed=20),
    "one entry less": of_w(changed=18),
    "no entry": of_w(changed=0),
    "a negative count": of_w(changed=-1),
    "a count beyond all": of_w(changed=HUGE),
    "a boolean count": of_w(changed=True),
    "a count with a point": of_w(changed=19.0),
    "a count in quotes": of_w(changed="19"),
    "a shape that ends before the last index": of_w(shape=[111]),
    "a negative size": of_w(shape=[-12, -10]),
    "a boolean size": of_w(shape=[True, 120]),
    "a size with a point": of_w(shape=[12.0, 10]),
    "a size beyond all": of_w(shape=[HUGE]),
    "a product beyond all": of_w(shape=[2**40, 2**40]),
    "seventy dimensions": of_w(shape=[120] + [1] * 69),
    "an empty tensor of endless strides": empty_of_endless_strides,
    "another parameter": of_w(rice=3),
    "a negative parameter": of_w(rice=-1),
    "a parameter beyond all": of_w(rice=HUGE),
    "a boolean parameter": of_w(rice=True),
    "an unknown dtype": of_w(dtype="F12"),
    "a dtype of less than a byte": of_w(dtype="F4"),
    "a dtype of another width": of_w(dtype="F32"),
    "a hash that is a number": of_w(base=0),
    "an unknown field": of_w(more=1),
    "an unknown field above": of_all(more=1),
    "a later format": of_all(format=2),
    "a boolean format": of_all(format=True),
    "an unknown mode": of_all(mode="or"),
    "a mode that is a list": of_all(mode=["xor"]),
    "aliases that are a list": of_all(aliases=["w"]),
    "an alias that is a number": of_all(aliases={"a": 1}),
    "a prefix that is null": of_all(prefix=None),
    "a config of half": of_all(config={"base": {}}),
    "a config that is a list": of_all(config=[]),
    "negative conflicts": of_all(conflicts=-1),
    "conflicts beyond all": of_all(conflicts=HUGE),
    "tensors that are a list": of_all(tensors=[]),
    "a tensor without fields": of_all(tensors={"w": None}),
    "differences of integers": differences_of_integers,
    "a tensor that nobody names": unnamed,
    "no indices": without_indices,
    "a whole tensor of another shape": whole_of_another_shape,
    "a whole tensor of another dtype": whole_of_another_dtype,
    "a byte more": of_code(lambda code: code.append(1)),
    "a zero byte more": of_code(lambda code: code.append(0)),
    "a byte less": of_code(lambda code: code.pop()),
    "a zero byte amid": of_code(lambda code: code.insert(len(code) - 6, 0)),
    "bits beyond the last entry": of_code(lambda code: code.__setitem__(-1, code[-1] | 0x80)),
    "trailing zero bytes": recoded(b"\x01\x00", 0, 1, [120]),
    "more ones than entries": recoded(b"\xff", 0, 3, [120]),
    # 2**24 << 40 is 2**64, which is 0 in 64 bits
    "a gap that wraps around to nothing": recoded(bytes(2**21) + b"\1" + bytes(40), 40, 1, [120]),
    "a gap that wraps around to less": recoded(b"\1" + bytes(2**20) + b"\1" + bytes(40), 40, 2, [2**61]),
    "gaps whose sum wraps around": sum_that_wraps_around,
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_with_a_checksum_that_fits_is_refused(lie: str, reader: Reader) -> None:
    data = saved(small_delta(), reader.path.with_name("delta.safetensors"))
    manifest, payload = contents_of(data)
    assert reader(file_of(manifest, payload)) is not None
    LIES[lie](manifest, payload)
    assert reader(file_of(manifest, payload)) is None


def test_a_file_says_the_same_in_another_order_and_spelling(reader: Reader) -> None:
    """And once more under a key that it repeats: what is said last counts, in the checksum as well."""
    data = saved(small_delta(), reader.path.with_name("delta.safetensors"))
    whole = told(reader(data))  # type: ignore[arg-type]
    manifest, payload = contents_of(data)
    spelled = json.dumps(manifest, indent=3)
    for text in (spelled, spelled.replace('"mode"', '"mode": "add", "mod\\u0065"', 1)):
        got = reader(file_of(text, dict(reversed(payload.items()))))
        assert got is not None and told(got) == whole


@pytest.mark.parametrize("text", [
    "", "null", "[]", "{}", "1", '"x"', "{", "nan", "{" + " " * 9, '{"format": NaN}',
    '{"format": ' + "9" * 5000 + "}",
    "[" * 100_000, '{"a":' * 100_000, "[" * 300 + "]" * 300, "\x1b[31m", '"\\ud800"', '{"format": 1}',
], ids=lambda text: text[:12] + "..." * (len(text) > 12))  # fmt: skip
def test_a_manifest_that_is_none_is_refused(text: str, reader: Reader) -> None:
    assert reader(file_of(text, {})) is None


@pytest.mark.parametrize("levels", [40, 300, 900])
def test_a_config_that_is_read_can_be_written_again(levels: int, reader: Reader, tmp_path: Path) -> None:
    """Lists in lists: what Python reads and compares, it cannot always write."""
    manifest, payload = contents_of(saved(small_delta(), tmp_path / "delta.safetensors"))
    manifest["config"]["tuned"]["x"] = json.loads("[" * levels + "]" * levels)
    (tmp_path / "base").mkdir()
    safetensors.torch.save_file(small_model(), tmp_path / "base" / "model.safetensors")
    delta = reader(file_of(manifest, payload))
    assert (delta is None) == (levels > 40)
    if delta is not None:
        patch_checkpoint(tmp_path / "base", delta, tmp_path / "tuned")
        assert json.loads((tmp_path / "tuned" / "config.json").read_text()) == manifest["config"]["tuned"]


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"], ids=["reserved", "surrogate"])
def test_a_name_that_would_spoil_a_file_is_refused_before_it_is_written(name: str, tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.zeros(3)}, tmp_path / "base.safetensors")
    whole = TensorDelta((2,), torch.float32, None, torch.ones(2))
    with pytest.raises(ValueError) as refused:
        patch_checkpoint(
            tmp_path / "base.safetensors", Delta({name: whole}, "xor"), tmp_path / "new.safetensors"
        )
    check_sentence(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


def test_a_dtype_that_safetensors_does_not_know_is_refused(tmp_path: Path) -> None:
    whole = TensorDelta((2,), torch.complex32, None, torch.zeros(2, dtype=torch.int32).view(torch.complex32))
    with pytest.raises(ValueError, match=r"'w' must have a dtype of safetensors, got torch\.complex32"):
        save_delta(Delta({"w": whole}, "xor"), tmp_path / "delta.safetensors")
    assert not list(tmp_path.iterdir())


# --- memory -----------------------------------------------------------------------------------------------


def dense(dtype: torch.dtype, step: int) -> Delta:
    indices = torch.arange(0, 400_000, step, dtype=torch.int32)
    return Delta(
        {"w": TensorDelta((400_000,), dtype, indices, torch.zeros(indices.numel(), dtype=dtype))}, "replace"
    )


def whole(count: int) -> Delta:
    return Delta({"w": TensorDelta((count,), torch.float32, None, torch.zeros(count))}, "xor")


def unchanged(count: int) -> Delta:
    none = torch.zeros(0, dtype=torch.int32)
    return Delta({str(i): TensorDelta((1,), torch.float32, none, none) for i in range(count)}, "xor")


def with_config(value: Any) -> Delta:
    return Delta({}, "xor", config={"base": {}, "tuned": {"x": value}})


# bytes held while a file is read, at most, per byte of it
HELD = {
    "all of a tensor of bytes": (lambda: dense(torch.uint8, 1), 17),
    "a hundredth of a bfloat16 tensor": (lambda: dense(torch.bfloat16, 100), 10),
    "a whole tensor": (lambda: whole(200_000), 3),
    "many names": (lambda: unchanged(3000), 18),
    # what Python makes of JSON: the dearest that can be said in as many bytes is twice of this
    "a config of empty tables": (lambda: with_config([{}] * 60_000), 25),
    "a config of names": (lambda: with_config({str(i): 0 for i in range(20_000)}), 24),
}  # fmt: skip


@pytest.mark.parametrize("what", HELD)
def test_reading_holds_a_multiple_of_the_file(what: str, tmp_path: Path) -> None:
    make, most = HELD[what]
    path = tmp_path / "delta.safetensors"
    # what the first load of a process imports
    saved(small_delta(), path)
    load_delta(path)
    size = len(saved(make(), path))
    tracemalloc.start()
    try:
        load_delta(path)
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert held < most * size + 100_000, f"{held / size:.1f} times the file's {size} bytes"


@needs_fork
@quiet_fork
def test_a_small_file_that_claims_to_be_huge_is_refused_within_its_means(tmp_path: Path) -> None:
    """All memory of the process counts here, torch's and that of Rust as well."""
    resource = pytest.importorskip("resource")
    manifest, payload = contents_of(saved(small_delta(), tmp_path / "delta.safetensors"))
    forged = []
    for claim in (2**28, 2**33, 2**40, 2**61):
        for about in (
            {"changed": claim},
            {"shape": [claim]},
            {"changed": claim, "shape": [claim]},
            {"rice": claim},
        ):
            forged.append(
                file_of(edited(manifest, ("tensors", "w"), manifest["tensors"]["w"] | about), payload)
            )
            part = {"dtype": "F32", "shape": [claim]}
            forged.append(file_of(edited(manifest, ("tensors",), {"w": part | about}), payload))
    sparse = {"tensors": {"w": {"dtype": "U8", "shape": [claim], "changed": 0}}}
    forged.append(file_of(manifest | sparse, {}))
    for length in (2**26, 2**40, 2**63, 2**64 - 1):
        forged.append(length.to_bytes(8, "little") + forged[0][8:])

    def work() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + 64 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        reader = Reader(tmp_path / "forged.safetensors")
        for data in forged:
            # a tensor may be as large as it likes, where nothing of it is in the file
            reader(data)
        try:
            bytearray(2**27)
        except MemoryError:
            os._exit(7)

    assert os.waitstatus_to_exitcode(in_child(work)) == 7


# --- checkpoints ------------------------------------------------------------------------------------------


class Bomb:
    """A pickle of it makes a file when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def sharded(folder: Path) -> dict[str, Any]:
    """A checkpoint of two shards; its index."""
    tensors = list(small_model().items())
    names = {}
    for number, part in enumerate((tensors[:2], tensors[2:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        safetensors.torch.save_file(dict(part), folder / file)
        names |= dict.fromkeys(dict(part), file)
    index = {"metadata": {}, "weight_map": names}
    (folder / checkpoints.INDEX).write_text(json.dumps(index))
    return index


FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


def index_with(**names: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        index = sharded(folder)
        index["weight_map"] |= names
        (folder / checkpoints.INDEX).write_text(json.dumps(index))

    return spoil


def index_of(text: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        sharded(folder)
        (folder / checkpoints.INDEX).write_bytes(text)

    return spoil


def elsewhere(folder: Path, path: str) -> None:
    """All that the index says is true, and of a file that nobody is to read."""
    names = dict.fromkeys(small_model(), path)
    (folder / checkpoints.INDEX).write_text(json.dumps({"weight_map": names}))


def shard_of(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        sharded(folder)
        (folder / SECOND).unlink()
        make(folder / SECOND)

    return spoil


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(path.parent.parent / "exploded")))


def overlapping(folder: Path) -> None:
    sharded(folder)
    tensors = safetensors.torch.load_file(folder / SECOND) | {"w": small_model()["w"]}
    safetensors.torch.save_file(tensors, folder / SECOND)


def only_pickles(folder: Path) -> None:
    pickled(folder / "pytorch_model.bin")


def pickle_by_another_name(folder: Path) -> None:
    pickled(folder / "model.safetensors")


def pickle_behind_a_link(folder: Path) -> None:
    pickled(folder / "pytorch_model.bin")
    (folder / "model.safetensors").symlink_to("pytorch_model.bin")


def link_in_a_circle(path: Path) -> None:
    path.symlink_to(path.name)


def two_files(folder: Path) -> None:
    sharded(folder)
    (folder / checkpoints.INDEX).unlink()


def truncated(path: Path) -> None:
    safetensors.torch.save_file(small_model(), path)
    path.write_bytes(path.read_bytes()[:-9])


def nested_config(folder: Path) -> None:
    sharded(folder)
    (folder / "config.json").write_text('{"a":' * 900 + "1" + "}" * 900)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "a path out of the folder": lambda folder: elsewhere(folder, "../base.safetensors"),
    "an absolute path that exists": lambda folder: elsewhere(folder, str(folder.parent / "base.safetensors")),
    "the folder above": index_with(w=".."),
    "the folder": index_with(w="."),
    "an absolute path": index_with(w="/etc/passwd"),
    "a folder below": index_with(w=f"./{FIRST}"),
    "no name": index_with(w=""),
    "a name with a zero byte": index_with(w="a\0b"),
    "half a surrogate": index_with(w="\ud800"),
    "a name that is too long": index_with(w="x" * 300),
    "a name of megabytes": index_with(w="x" * 2**21),
    "a name that is a number": index_with(w=1),
    "a name that is a list": index_with(w=[FIRST]),
    "a name of a pickle": lambda folder: (pickled(folder / "a.bin"), index_with(w="a.bin")(folder)),
    "no map": index_of(b"{}"),
    "a map that is a list": index_of(b'{"weight_map": []}'),
    "an index that is a list": index_of(b"[]"),
    "an index without end": index_of(b'{"weight_map":' * 100_000),
    "an index of no text": index_of(b"\xff\xfe\x00\xd8" * 100),
    "an empty index": index_of(b""),
    "a missing shard": shard_of(lambda path: None),
    "a folder for a shard": shard_of(Path.mkdir),
    "a pipe for a shard": shard_of(os.mkfifo),
    "a link that leads nowhere": shard_of(lambda path: path.symlink_to("gone")),
    "a link that leads to itself": shard_of(link_in_a_circle),
    "a pickle for a shard": shard_of(pickled),
    "a truncated shard": shard_of(truncated),
    "a shard of no bytes": shard_of(Path.touch),
    "a shard of zeros": shard_of(lambda path: path.write_bytes(bytes(100))),
    "a shard with letters that terminals obey": shard_of(
        lambda path: path.write_bytes(
            b'\x43\0\0\0\0\0\0\0{"a":{"dtype":"\\u001b[31m\\n","shape":[0],"data_offsets":[0,0]}}      '
        )
    ),
    "one name in two shards": overlapping,
    "files and no index": two_files,
    "pickles alone": only_pickles,
    "a pickle by another name": pickle_by_another_name,
    "a pickle behind a link": pickle_behind_a_link,
    "a pipe for a file": lambda folder: os.mkfifo(folder / "model.safetensors"),
    "a folder for a file": lambda folder: (folder / "model.safetensors").mkdir(),
    "nothing": lambda folder: None,
    "a config without end": nested_config,
}


@pytest.fixture
def no_waiting(tmp_path: Path) -> Iterator[None]:
    """Whoever opens a pipe waits for its other end, where nothing interrupts it: after a while it comes."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        time.sleep(15)
        for path in tmp_path.rglob("*"):
            if path.is_fifo():
                os.open(path, os.O_RDWR)
        time.sleep(600)
        os._exit(0)
    yield
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert time.monotonic() - start < 15


@needs_fork
@quiet_fork
@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_checkpoint_is_refused_and_nothing_of_it_is_run(what: str, tmp_path: Path) -> None:
    folder, good = tmp_path / "hostile", tmp_path / "good"
    folder.mkdir()
    good.mkdir()
    safetensors.torch.save_file(small_model(), tmp_path / "base.safetensors")
    sharded(good)
    (good / "config.json").write_text('{"a": {}}')
    HOSTILE[what](folder)
    delta = small_delta()
    attempts: list[Callable[[], object]] = [
        lambda: extract_delta(folder, good),
        lambda: extract_delta(good, folder),
        lambda: patch_checkpoint(folder, delta, tmp_path / "new"),
        lambda: patch_checkpoint(folder, delta, tmp_path / "new", revert=True),
    ]
    if what == "a config without end":
        # where it is replaced, it is not read
        del attempts[2:]
    # the file by itself
    singles = [folder / name for name in ("a.bin", "pytorch_model.bin", "model.safetensors")]
    attempts += [partial(extract_delta, single, good) for single in singles if os.path.lexists(single)]
    for attempt in attempts:
        with pytest.raises(ValueError) as refused:
            attempt()
        check_sentence(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"hostile", "good", "base.safetensors"}


def test_the_planted_pickles_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    pickled(tmp_path / "model" / "pytorch_model.bin")
    pickle.loads((tmp_path / "model" / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "exploded").is_dir()


def test_a_checkpoint_with_an_index_of_one_shard_keeps_it(tmp_path: Path) -> None:
    """Loaders look for a file of that name in the index alone."""
    (tmp_path / "base").mkdir()
    model = small_model()
    safetensors.torch.save_file(model, tmp_path / "base" / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(model, "model-00001-of-00001.safetensors")}
    (tmp_path / "base" / checkpoints.INDEX).write_text(json.dumps(index))
    patch_checkpoint(tmp_path / "base", small_delta(), tmp_path / "tuned")
    written = json.loads((tmp_path / "tuned" / checkpoints.INDEX).read_text())["weight_map"]
    assert written == dict.fromkeys([*model, "head"], "model-00001-of-00001.safetensors")


# --- writers that die -------------------------------------------------------------------------------------


def in_child(work: Callable[[], object]) -> int:
    """How a copy of this process ended which did that."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Job:
    """Something that is written over something, or beside it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.folder = folder
        base = folder / "base"
        base.mkdir()
        sharded(base)
        (base / "config.json").write_text('{"labels": []}')
        (base / "vocabulary.txt").write_text("a b c")
        safetensors.torch.save_file(small_model(), folder / "base.safetensors")
        self.delta, self.target = small_delta(), folder / "target.safetensors"
        save_delta(small_delta("replace"), self.target)
        self.work: Callable[[], object] = lambda: save_delta(self.delta, self.target)
        if kind == "a patched file":
            self.work = lambda: patch_checkpoint(folder / "base.safetensors", self.delta, self.target)
        elif kind == "a patched folder":
            self.target.unlink()
            self.work = lambda: patch_checkpoint(base, self.delta, self.target)
        self.old = self.state()
        self.work()
        self.new = self.state()
        assert self.old != self.new
        self.reset()

    def state(self) -> Any:
        if self.target.is_dir():
            return {path.name: path.read_bytes() for path in self.target.iterdir()}
        return self.target.read_bytes() if self.target.exists() else None

    def reset(self) -> None:
        if self.target.is_dir():
            shutil.rmtree(self.target)
        if self.old is not None:
            self.target.write_bytes(self.old)

    def others(self) -> list[str]:
        known = {"base", "base.safetensors", self.target.name}
        return [path.name for path in self.folder.iterdir() if path.name not in known]

    def check(self) -> bool:
        """That there is the old or the new, and no name that anyone might read; whether it is the new.

        And that the next writer gets it done.
        """
        found = self.state()
        assert found in (self.old, self.new)
        assert all(re.fullmatch(r"\.target\.safetensors\.\w+\.tmp", name) for name in self.others())
        if found == self.old:
            self.work()
            assert self.state() == self.new
        self.reset()
        return bool(found == self.new)


KINDS = ("a delta", "a patched file", "a patched folder")


def at_line(count: int, then: Callable[[], object]) -> tuple[list[int], Callable[[], object]]:
    """How many lines of the package's files have run; and what starts counting, up to the given one."""
    seen = [0]

    def trace(frame: Any, event: str, _: Any) -> Any:
        if Path(frame.f_code.co_filename).name not in ("checkpoints.py", "deltas.py", "patching.py"):
            return None
        if event == "line":
            seen[0] += 1
            if seen[0] == count:
                then()
        return trace

    return seen, lambda: sys.settrace(trace)


@needs_fork
@quiet_fork
@pytest.mark.parametrize("kind", KINDS)
def test_a_writer_killed_at_any_line_leaves_the_old_or_the_new(
    kind: str, tmp_path: Path, every_case: bool
) -> None:
    job = Job(kind, tmp_path)
    seen, start = at_line(-1, die)
    before = sys.gettrace()
    start()
    try:
        job.work()
    finally:
        sys.settrace(before)
    job.reset()
    lines = seen[0]
    # the last ones are where names change
    counts = {
        *range(1, lines + 1, 1 if every_case else lines // 10),
        *range(lines - 30, lines + 1, 1 if every_case else 3),
    }
    outcomes: Counter[bool] = Counter()
    for count in sorted(counts):
        _, start = at_line(count, die)
        status = in_child(lambda start=start: (start(), job.work()))  # type: ignore[misc]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (count, status)
        outcomes[job.check()] += 1
    assert outcomes[False] and outcomes[True], outcomes


class Meddled(io.FileIO):
    """A file on which the n-th write (of all such files), or sync, goes wrong half-way."""

    countdown: int
    wrong: Callable[[], object]

    def write(self, data: Any) -> int:
        type(self).countdown -= 1
        if type(self).countdown == 0:
            super().write(bytes(data)[: len(bytes(data)) // 2])
            type(self).wrong()
        return super().write(data)


def meddle(monkeypatch: pytest.MonkeyPatch, count: int, wrong: Callable[[], object]) -> type[Meddled]:
    """Let the `count`-th of the calls that change the disk go wrong."""

    class File(Meddled):
        countdown = count

    File.wrong = staticmethod(wrong)  # type: ignore[assignment]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            File.countdown -= 1
            if File.countdown == 0:
                wrong()
            return call(*args, **kwargs)

        return instead

    monkeypatch.setattr(
        checkpoints, "open", lambda path, mode: File(path, mode.replace("b", "")), raising=False
    )
    for owner, name in (
        (os, "fsync"),
        (os, "replace"),
        (shutil, "copyfile"),
        (Path, "write_text"),
        (Path, "mkdir"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return File


@needs_fork
@quiet_fork
@pytest.mark.parametrize("kind", KINDS)
def test_a_writer_killed_within_any_call_leaves_the_old_or_the_new(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(kind, tmp_path)
    outcomes: Counter[bool] = Counter()
    for count in range(1, 100):

        def work(count: int = count) -> None:
            meddle(monkeypatch, count, die)
            job.work()

        status = in_child(work)
        if not status:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        outcomes[job.check()] += 1
    assert status == 0 and outcomes[False] > 5 and outcomes[True], outcomes


@needs_fork
@quiet_fork
@pytest.mark.parametrize("kind", ["a delta", "a patched file"])
def test_a_writer_killed_at_any_time_leaves_the_old_or_the_new(
    kind: str, tmp_path: Path, every_case: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("tqdm"):
        from tqdm.auto import tqdm

        # its own is shared with children, who would die with it in their hands
        monkeypatch.setattr(tqdm, "_lock", threading.RLock(), raising=False)
    job = Job(kind, tmp_path)
    other = job.folder / "other.safetensors"
    other.write_bytes(job.old)

    def work() -> None:
        while True:
            job.work()
            with checkpoints.replacing(job.target) as path:
                shutil.copyfile(other, path)

    for _ in range(150 if every_case else 8):
        child = os.fork()
        if child == 0:
            try:
                work()
            finally:
                os._exit(1)
        time.sleep(random.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert job.state() in (job.old, job.new)
        job.work()
        assert job.state() == job.new


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("why", [errno.ENOSPC, errno.EIO], ids=["a full disk", "a broken disk"])
def test_a_disk_that_fails_leaves_the_old_and_nothing_beside_it(
    kind: str, why: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(kind, tmp_path)

    def wrong() -> None:
        raise OSError(why, os.strerror(why))

    with monkeypatch.context() as patch:
        file = meddle(patch, HUGE, wrong)
        job.work()
    job.reset()
    calls = HUGE - file.countdown
    assert calls > 5
    for count in range(1, calls + 1):
        with monkeypatch.context() as patch:
            meddle(patch, count, wrong)
            with pytest.raises(OSError, match=os.strerror(why)):
                job.work()
        # the last call makes the new name last: it is there, but may go with the power
        assert job.state() in (job.old, job.new) and job.others() == []
        job.reset()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_what_gets_its_name_is_on_the_disk_before(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of power cannot be had here, but the order of calls that it depends on."""
    job = Job(kind, tmp_path)
    log: list[str] = []
    sync, rename = os.fsync, os.replace

    def fsync(handle: int) -> None:
        log.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    def replace(source: Path, target: Path) -> None:
        held = [source, *source.iterdir()] if source.is_dir() else [source]
        assert {str(path) for path in held} <= set(log)
        log.append("named")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    job.work()
    assert log[-2:] == ["named", str(tmp_path)]


# --- properties -------------------------------------------------------------------------------------------


def holds(property_: Callable[..., None], examples: int, **strategies: Any) -> None:
    settings = hypothesis.settings(
        deadline=None, max_examples=examples, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    settings(hypothesis.given(**strategies)(property_))()


def test_any_ascending_set_is_coded_and_decoded(every_case: bool) -> None:
    """In the fewest bytes that a parameter of the code can give."""

    def round_trip(indices: np.ndarray[Any, Any], numel: int) -> None:
        code, rice = encode_indices(indices)
        got = decode_indices(code, rice, indices.size, numel)
        assert got is not None and got.dtype == np.int64 and np.array_equal(got, indices)
        gaps = np.diff(indices.astype(np.int64), prepend=-1) - 1
        plane = -(-gaps.size // 8)
        sizes = [-(-(int((gaps >> rice).sum()) + gaps.size) // 8) + rice * plane for rice in range(41)]
        assert code.size == min(sizes)

    def few(indices: set[int], beyond: int) -> None:
        round_trip(np.array(sorted(indices)), max(indices) + 1 + beyond)

    def many(numel: int, density: float, seed: int, width: str) -> None:
        chosen = np.random.default_rng(seed).random(numel) <= density
        chosen[seed % numel] = True
        round_trip(np.flatnonzero(chosen).astype(width), numel)

    examples = 2000 if every_case else 60
    widely = st.one_of(st.integers(0, 2**40 - 1), st.integers(0, 300), st.integers(2**40 - 300, 2**40 - 1))
    holds(
        few, examples, indices=st.sets(widely, min_size=1, max_size=40), beyond=st.sampled_from([0, 1, 2**39])
    )
    holds(
        many, examples, numel=st.integers(1, 5000), density=st.floats(0, 1), seed=st.integers(0, 2**20),
        width=st.sampled_from(["int32", "int64"]),
    )  # fmt: skip


def test_codes_of_random_sets_are_close_to_their_entropy() -> None:
    """log2(n choose k) bits."""
    n = 100_000
    worst = 0.0
    for density in [*np.geomspace(0.001, 0.5, 24), 0.382]:
        k = int(density * n)
        indices = np.sort(np.random.default_rng(k).choice(n, k, replace=False))
        entropy = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2) / 8
        worst = max(worst, (encode_indices(indices)[0].size - 2) / entropy)
    # measured: 0.01 % at half, 4.2 % at 0.3816, where a bitmap is as long as the code with one plane
    assert worst < 1.045


def test_no_code_but_the_encoders_is_decoded_to_the_same_indices() -> None:
    """Of one parameter: whatever bit of a code changes, the indices do, or it is none."""
    indices = np.array([0, 5, 6, 40, 41, 99, 117])
    code, rice = encode_indices(indices)
    for place in range(8 * code.size):
        changed = code.copy()
        changed[place // 8] ^= 1 << place % 8
        got = decode_indices(changed, rice, indices.size, 120)
        if got is not None:
            assert got.size == indices.size and not np.array_equal(got, indices)
            assert (np.diff(got, prepend=-1) > 0).all() and got[-1] < 120


def part_of(
    dtype: torch.dtype, shape: tuple[int, ...], mode: str, density: float | None, seed: int
) -> TensorDelta:
    hashes = [None, "0" * 32, ""]
    base, tuned = hashes[seed % 3], hashes[seed // 3 % 3]
    if density is None:
        return TensorDelta(shape, dtype, None, random_bits(dtype, shape, seed), base, tuned)
    numel = math.prod(shape)
    if mode == "add" and not dtype.is_floating_point:
        density = 0.0
    chosen = np.flatnonzero(np.random.default_rng(seed).random(numel) < density)
    values = random_bits(value_dtype(dtype, mode), (chosen.size,), seed)  # type: ignore[arg-type]
    return TensorDelta(shape, dtype, torch.from_numpy(chosen).to(index_dtype(numel)), values, base, tuned)


def test_what_is_loaded_is_what_was_saved(tmp_path: Path, every_case: bool) -> None:
    path = tmp_path / "delta.safetensors"
    json_ = st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**70), 2**70)
        | st.floats(allow_nan=False)
        | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
        max_leaves=8,
    )
    names = st.text(max_size=9)
    part = st.tuples(
        st.sampled_from(DTYPES),
        st.sampled_from([(), (0,), (1,), (3, 0, 2), (31,), (8, 5), (2, 3, 4, 5), (1025,)]),
        st.sampled_from([None, 0.0, 0.01, 0.3, 1.0]),
        st.integers(0, 10**6),
    )

    def same_again(mode: str, parts: dict[str, Any], **about: Any) -> None:
        tensors = {
            name: part_of(dtype, shape, mode, density, seed)
            for name, (dtype, shape, density, seed) in parts.items()
        }
        delta = Delta(tensors, mode, **about)  # type: ignore[arg-type]
        first = saved(delta, path)
        loaded = load_delta(path)
        assert told(loaded) == told(delta)
        assert saved(loaded, path) == first

    tables = st.dictionaries(names, json_, max_size=3)
    holds(
        same_again, 1500 if every_case else 60, mode=st.sampled_from(["xor", "replace", "add"]),
        parts=st.dictionaries(names, part, max_size=5), base_model=st.none() | names, prefix=names,
        aliases=st.dictionaries(names, names, max_size=3), conflicts=st.integers(0, 2**40),
        config=st.none() | st.fixed_dictionaries({"base": tables, "tuned": tables}),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("mode", ["xor", "replace", "add"])
def test_every_dtype_is_saved_and_loaded(dtype: torch.dtype, mode: str, tmp_path: Path) -> None:
    shapes = {"none": (0, 2), "one": (), "many": (33,)}
    parts = {name: part_of(dtype, shape, mode, 0.7, 5) for name, shape in shapes.items()}
    parts |= {f"whole {name}": part_of(dtype, shape, mode, None, 6) for name, shape in shapes.items()}
    delta = Delta(parts, mode)  # type: ignore[arg-type]
    save_delta(delta, tmp_path / "delta.safetensors")
    assert told(load_delta(tmp_path / "delta.safetensors")) == told(delta)


def test_nans_and_the_sign_of_zero_keep_their_bits(tmp_path: Path) -> None:
    odd = torch.tensor([0x7FC00001, -0x7FFFFF, 0x7F800001, -(2**31), 0, 1], dtype=torch.int32).view(
        torch.float32
    )
    base, tuned = {"w": torch.zeros(6), "v": odd}, {"w": odd.clone(), "v": odd.clone(), "head": odd.clone()}
    for mode in ("xor", "replace"):
        save_delta(extract_delta(base, tuned, mode=mode), tmp_path / "delta.safetensors")
        model = {"w": torch.zeros(6), "v": odd.clone(), "head": torch.zeros(6)}
        apply_delta(model, load_delta(tmp_path / "delta.safetensors"))
        assert fingerprint(model) == fingerprint(tuned)


def test_keys_of_a_config_that_are_numbers_become_strings(tmp_path: Path) -> None:
    """Also where strings have another order than numbers, which the checksum would notice."""
    config = {"base": {}, "tuned": {"labels": {2: "b", 10: "c"}}}
    save_delta(Delta({}, "xor", config=config), tmp_path / "delta.safetensors")
    loaded = load_delta(tmp_path / "delta.safetensors")
    assert loaded.config == {"base": {}, "tuned": {"labels": {"2": "b", "10": "c"}}}


PROGRAM = """
import torch
from sparse_optim import extract_delta, load_delta, save_delta
base = {f"layer.{i}.{j}": torch.full((9,), float(i)) for i in range(9) for j in "wb"}
base["tied"] = base["also"] = torch.ones(9)
tuned = {"m." + name: tensor + (torch.arange(9) % 4 == 0) for name, tensor in base.items()}
tuned["m.also"] = tuned["m.tied"]
tuned["head"] = torch.ones(3)
delta = extract_delta(base, tuned)
save_delta(delta, folder + "/one.safetensors")
save_delta(load_delta(folder + "/one.safetensors"), folder + "/two.safetensors")
"""


def test_the_same_delta_is_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
    exec(PROGRAM, {"folder": str(tmp_path / "here")})
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    there = PROGRAM.replace("folder", repr(str(tmp_path / "there")))
    subprocess.run([sys.executable, "-c", there], env=environment, check=True, timeout=300)
    files = {path.read_bytes() for path in tmp_path.glob("*/*.safetensors")}
    assert len(files) == 1 and len(list(tmp_path.glob("*/*.safetensors"))) == 4
