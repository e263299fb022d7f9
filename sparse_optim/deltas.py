"""What fine-tuning changed, as data: positions and values of the entries of a model that are not the base's.

A delta of one base is applied and reverted in place and to the bit, merged with others of the same base, and
kept in one safetensors file. There, the positions of a tensor are its gaps (unselected entries before each
selected one) in a Rice code: the quotient of a gap by `2**rice` as that many zeros and a one, then its
remainder, whose bits lie in `rice` planes. With `rice` = 0 that is a bitmap; the parameter is the one that
gives the fewest bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .checkpoints import (
    DTYPES,
    INTEGERS,
    WORDS,
    Kind,
    bits_of,
    content_hash,
    from_hub,
    json_of,
    one_line,
    replacing,
    word_of,
    write_safetensors,
)

Mode = Literal["xor", "replace", "add"]
MODES = ("xor", "replace", "add")
FORMAT = 1
# of a folder, and of a repository
DELTA = "delta.safetensors"
# of a file: where its manifest is, and how the tensors of its payload are named
_KEY, _INDICES, _VALUES = "sparse_delta", ".indices", ".values"
# the parameter of a code: gaps of more than 2**40 entries are in no tensor
_LARGEST_RICE = 40


@dataclass(frozen=True, eq=False)
class TensorDelta:
    """What changed in one tensor.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        indices: changed entries of the flattened tensor, ascending: [nnz] int32, or int64 when the tensor has
            more than 2**31 - 1 entries. None: `values` is the whole tensor.
        values: [nnz]. In mode "xor" old bits xor new bits, in integers of the dtype's width; in mode
            "replace" the new values, in the tensor's dtype; in mode "add" new - old, in float32 (float64 for
            float64). Of a whole tensor, its values.
        base: hash of the bytes of the base's tensor: half a SHA-256, in hexadecimal. None: not known.
        tuned: the same of the tuned tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    indices: Tensor | None
    values: Tensor
    base: str | None = None
    tuned: str | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def changed(self) -> int:
        """How many entries are listed; all of them, for a whole tensor."""
        return self.numel if self.indices is None else self.indices.numel()


@dataclass(frozen=True, eq=False)
class Delta:
    """The difference of a tuned model from its base. What makes one: `extract_delta`, `load_delta`,
    `merge_deltas` and `MaskedAdamW.delta`.

    Args:
        tensors: by name, as the tuned model has it; also those that did not change, with their hashes.
        mode: what the values mean, see `TensorDelta`.
        base_model: the name of the base, for people.
        prefix: what the tuned model's names have before the base's, such as "bert.".
        aliases: further names of tensors that are tied, and the name that `tensors` has.
        config: what config.json says beside the base and beside the tuned weights, where these differ.
        conflicts: entries that more than one of the deltas changed which were merged into this one.

    Raises:
        ValueError: for indices that are not ascending and inside the tensor, and for values that do not fit.
    """

    tensors: Mapping[str, TensorDelta]
    mode: Mode
    base_model: str | None = None
    prefix: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    conflicts: int = 0

    def __post_init__(self) -> None:
        check_mode(self.mode)
        if self.config is not None and not all(
            isinstance(self.config.get(key), Mapping) for key in ("base", "tuned")
        ):
            raise ValueError(
                f"config must be None or hold those of 'base' and 'tuned', got {list(self.config)}; "
                "give both."
            )
        for name, part in self.tensors.items():
            _check_part(name, part, self.mode)

    def __repr__(self) -> str:
        changed = sum(part.changed for part in self.tensors.values())
        return f"Delta({changed:,} entries of {len(self.tensors)} tensors, mode={self.mode!r})"

    def info(self) -> dict[str, Any]:
        """Sizes, in numbers and strings that JSON knows.

        Returns:
            mode, base_model, conflicts; tensors, changed_tensors and whole_tensors; entries, changed and
            density of all but the whole tensors; bytes of the coded positions (index_bytes), of the values
            (value_bytes) and of both per changed entry (bytes_per_entry); whole_bytes; and per_tensor, by
            name: shape, dtype, entries, changed, density, bytes.

        Example:
            >>> import torch
            >>> from sparse_optim import extract_delta
            >>> base = {"weight": torch.zeros(10, 10)}
            >>> info = extract_delta(base, {"weight": torch.eye(10)}).info()
            >>> info["changed"], info["density"], info["bytes_per_entry"]
            (10, 0.1, 4.8)
        """
        sizes = {name: _sizes(part) for name, part in self.tensors.items()}
        listed = {name: part for name, part in self.tensors.items() if part.indices is not None}
        entries = sum(part.numel for part in listed.values())
        changed = sum(part.changed for part in listed.values())
        index_bytes = sum(sizes[name][0] for name in listed)
        value_bytes = sum(sizes[name][1] for name in listed)
        return {
            "mode": self.mode,
            "base_model": self.base_model,
            "conflicts": self.conflicts,
            "tensors": len(self.tensors),
            "changed_tensors": sum(part.changed > 0 for part in self.tensors.values()),
            "whole_tensors": len(self.tensors) - len(listed),
            "entries": entries,
            "changed": changed,
            "density": changed / max(1, entries),
            "index_bytes": index_bytes,
            "value_bytes": value_bytes,
            "bytes_per_entry": (index_bytes + value_bytes) / max(1, changed),
            "whole_bytes": sum(sum(sizes[name]) for name in sizes if name not in listed),
            "per_tensor": {
                name: {
                    "shape": list(part.shape),
                    "dtype": str(part.dtype).removeprefix("torch."),
                    "entries": part.numel,
                    "changed": part.changed,
                    "density": part.changed / max(1, part.numel),
                    "bytes": sum(sizes[name]),
                }
                for name, part in self.tensors.items()
            },
        }

    def without(self, *patterns: str) -> Delta:
        """This delta without the tensors whose names match, such as "classifier.*".

        Raises:
            ValueError: for a pattern that no name matches.
        """
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in self.tensors):
                raise ValueError(
                    f"patterns must match a name, got {pattern!r}, which matches none; see info()."
                )
        kept = {name: part for name, part in self.tensors.items() if not matches(name, patterns)}
        aliases = {alias: name for alias, name in self.aliases.items() if name in kept}
        return replace(self, tensors=kept, aliases=aliases)


def check_mode(mode: object) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be 'xor', 'replace' or 'add', got {mode!r}; 'xor' can be reverted.")


def _check_part(name: str, part: TensorDelta, mode: Mode) -> None:
    values = part.values
    if part.indices is None:
        if (values.dtype, tuple(values.shape)) != (part.dtype, part.shape):
            raise ValueError(
                f"values of {name!r} must be the whole tensor, {part.dtype} {list(part.shape)}, "
                f"got {values.dtype} {list(values.shape)}; give what the tuned model has."
            )
        return
    if mode == "add" and part.changed and not part.dtype.is_floating_point:
        raise ValueError(
            f"mode must be 'xor' or 'replace' for {name!r}, got 'add'; differences of {part.dtype} are not "
            "floating-point."
        )
    expected = value_dtype(part.dtype, mode)
    if values.dtype != expected or values.dim() != 1 or values.shape != part.indices.shape:
        raise ValueError(
            f"values of {name!r} must be {expected} [{part.changed}], one for each index, got {values.dtype} "
            f"{list(values.shape)}; extract the delta again."
        )
    if part.indices.dtype != index_dtype(part.numel):
        raise ValueError(
            f"indices of {name!r} must be {index_dtype(part.numel)}, got {part.indices.dtype}; convert them."
        )
    if part.changed:
        first, last = int(part.indices[0]), int(part.indices[-1])
        if first < 0 or last >= part.numel or not bool((part.indices[1:] > part.indices[:-1]).all()):
            raise ValueError(
                f"indices of {name!r} must ascend from 0 to {part.numel - 1} at most, none twice, got "
                f"others ({first} first, {last} last); sort them."
            )


def value_dtype(dtype: torch.dtype, mode: Mode) -> torch.dtype:
    if mode == "add":
        return torch.float64 if dtype == torch.float64 else torch.float32
    return INTEGERS[dtype.itemsize] if mode == "xor" else dtype


def index_dtype(numel: int) -> torch.dtype:
    return torch.int32 if numel <= 2**31 - 1 else torch.int64


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def delta_of(changed: Mapping[str, tuple[Tensor, Tensor | None]], base_model: str | None) -> Delta:
    """Tensors as they are, and which entries of each are not the base's; None: all of them."""
    tensors = {}
    for name, (tensor, indices) in changed.items():
        kind = tuple(tensor.shape), tensor.dtype
        if indices is None:
            tensors[name] = TensorDelta(*kind, None, tensor.to("cpu", copy=True).contiguous())
        else:
            listed, values = indices.to(index_dtype(tensor.numel())), tensor.reshape(-1)[indices.long()]
            tensors[name] = TensorDelta(*kind, listed.cpu(), values.cpu(), tuned=content_hash(tensor))
    return Delta(tensors, "replace", base_model)


# --- files ------------------------------------------------------------------------------------------------


def save_delta(delta: Delta, path: str | os.PathLike[str]) -> None:
    """Write a delta to one safetensors file, which appears under its name when it is whole.

    It takes about 3 bytes per changed bfloat16 entry at 1 % density, 5 per float32 entry. The same delta
    gives the same bytes.

    Raises:
        ValueError: for a path whose folder is missing, and for dtypes that safetensors does not know.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"path must be a file in a folder that exists, got {str(path)!r}; make the folder.")
    payload: dict[str, Tensor] = {}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "mode": delta.mode,
        "base_model": delta.base_model,
        "prefix": delta.prefix,
        "aliases": dict(delta.aliases),
        "config": delta.config,
        "conflicts": delta.conflicts,
        "tensors": {},
    }
    for name, part in delta.tensors.items():
        about: dict[str, Any] = {"dtype": word_of(name, part.dtype), "shape": list(part.shape)}
        if part.indices is None:
            payload[name + _VALUES] = part.values
        else:
            about["changed"] = part.changed
            if part.changed:
                code, about["rice"] = encode_indices(part.indices.cpu().numpy())
                payload[name + _INDICES] = torch.from_numpy(code)
                payload[name + _VALUES] = part.values
        hashes = (("base", part.base), ("tuned", part.tuned))
        about |= {key: value for key, value in hashes if value is not None}
        manifest["tensors"][name] = about
    kinds = {name: Kind(tensor.dtype, tuple(tensor.shape)) for name, tensor in payload.items()}
    # as it will be read: a config's keys may be numbers, which JSON makes strings, of another order
    manifest = json_of(json.dumps(manifest))
    manifest["checksum"] = _checksum(
        manifest,
        {name: (WORDS[t.dtype], list(t.shape), bits_of(t).cpu().numpy().data) for name, t in payload.items()},
    )
    with replacing(path) as temporary:
        write_safetensors(temporary, kinds, payload.__getitem__, {_KEY: json.dumps(manifest)})


def load_delta(path: str | os.PathLike[str]) -> Delta:
    """Read a delta that `save_delta` wrote.

    Args:
        path: the file, a folder with delta.safetensors, or a repository on the Hugging Face hub with one.

    Returns:
        The delta, on the CPU, in memory in proportion to the file, whatever that says.

    Raises:
        ValueError: for anything else: damaged, truncated, made by a later version, or by nobody of ours.
            No code of a file is ever run.
    """
    path = _delta_file(path)
    try:
        return _parsed(path.read_bytes())
    except _DamagedError as error:
        got = one_line(error)
    raise ValueError(
        f"{path.name} must be a delta as save_delta writes it, got {got}; fetch or extract it again."
    )


class _DamagedError(Exception):
    """Why a file is no delta."""


def _delta_file(path: str | os.PathLike[str]) -> Path:
    name, path = os.fspath(path), Path(path)
    if path.is_dir():
        path = path / DELTA
    elif not path.exists():
        path = from_hub(name, DELTA)
    if not path.is_file():
        raise ValueError(f"path must be a delta's file, got {name!r}; look for a typing error.")
    return path


def _parsed(file: bytes) -> Delta:
    from safetensors import SafetensorError, deserialize

    try:
        payload = dict(deserialize(file))  # type: ignore[no-untyped-call]
        length = int.from_bytes(file[:8], "little")
        manifest = json_of(json_of(file[8 : 8 + length])["__metadata__"][_KEY])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"no manifest ({type(error).__name__}: {error})") from error
    about = _Fields("manifest", manifest)
    version = about.take("format", int)
    if version != FORMAT:
        raise _DamagedError(f"format {version!r}, where this version of sparse_optim knows {FORMAT}")
    checksum = about.take("checksum", str)
    del manifest["checksum"]
    contents = {name: (each["dtype"], each["shape"], each["data"]) for name, each in payload.items()}
    if checksum != _checksum(manifest, contents):
        raise _DamagedError("bytes that do not fit its checksum")
    mode = about.take("mode", str)
    if mode not in MODES:
        raise _DamagedError(f"mode {mode!r}")
    aliases = about.take("aliases", dict)
    if not all(isinstance(name, str) for name in aliases.values()):
        raise _DamagedError("aliases that are not names")
    tensors = {}
    for name, fields in about.take("tensors", dict).items():
        tensors[name] = _part_of(name, _Fields(name, fields), mode, payload)
    if payload:
        raise _DamagedError(f"a tensor {min(payload)!r} that its manifest does not name")
    config = about.take("config", dict, type(None))
    if config is not None and not all(isinstance(config.get(key), dict) for key in ("base", "tuned")):
        raise _DamagedError("a config that is none")
    made = {
        "base_model": about.take("base_model", str, type(None)),
        "prefix": about.take("prefix", str),
        "conflicts": about.take("conflicts", int),
    }
    about.end()
    if not 0 <= made["conflicts"] < 2**62:
        raise _DamagedError("a number of conflicts that is none")
    return Delta(tensors, mode, aliases=aliases, config=config, **made)


class _Fields:
    """What a part of the manifest says, of which nothing may be left over."""

    def __init__(self, name: str, fields: object) -> None:
        if not isinstance(fields, dict):
            raise _DamagedError(f"{name!r} without fields")
        self.name, self.fields = name, dict(fields)

    def take(self, key: str, *kinds: type) -> Any:
        value = self.fields.pop(key, _DamagedError)
        # not isinstance: True is an int
        if type(value) not in kinds:
            raise _DamagedError(f"{key} of {self.name!r} of another kind")
        return value

    def end(self) -> None:
        if self.fields:
            raise _DamagedError(f"{self.name!r} with {min(self.fields)!r}, which this version does not know")


def _part_of(name: str, about: _Fields, mode: Mode, payload: dict[str, Any]) -> TensorDelta:
    word, shape = about.take("dtype", str), about.take("shape", list)
    if word not in DTYPES or DTYPES[word].itemsize not in INTEGERS:
        raise _DamagedError(f"dtype {word!r}")
    if len(shape) > 64 or not all(type(size) is int and 0 <= size < 2**62 for size in shape):
        raise _DamagedError(f"shape of {name!r} that is none")
    dtype, numel = DTYPES[word], math.prod(shape)
    # without zeros, too: torch multiplies the strides of empty tensors
    if math.prod(max(1, size) for size in shape) >= 2**62:
        raise _DamagedError(f"shape of {name!r} that is too large")
    hashes = {key: about.take(key, str) for key in ("base", "tuned") if key in about.fields}
    if "changed" not in about.fields:
        about.end()
        values = _tensor_of(name + _VALUES, payload, dtype, tuple(shape))
        return TensorDelta(tuple(shape), dtype, None, values, **hashes)
    changed = about.take("changed", int)
    stored = value_dtype(dtype, mode)
    if changed and mode == "add" and not dtype.is_floating_point:
        raise _DamagedError(f"differences of {name!r}, which is {dtype}")
    if changed == 0:
        about.end()
        # not where a default device says
        listed, values = (torch.zeros(0, dtype=of, device="cpu") for of in (index_dtype(numel), stored))
        return TensorDelta(tuple(shape), dtype, listed, values, **hashes)
    rice = about.take("rice", int)
    about.end()
    # first what the file has to have a byte for
    values = _tensor_of(name + _VALUES, payload, stored, (changed,))
    code = payload.pop(name + _INDICES, None)
    if code is None or code["dtype"] != "U8":
        raise _DamagedError(f"no indices of {name!r}")
    indices = decode_indices(np.frombuffer(code["data"], np.uint8), rice, changed, numel)
    if indices is None:
        raise _DamagedError(f"indices of {name!r} that are not {changed} of {numel}")
    listed = torch.from_numpy(indices).to(index_dtype(numel))
    return TensorDelta(tuple(shape), dtype, listed, values, **hashes)


def _tensor_of(key: str, payload: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    found = payload.pop(key, None)
    if found is None or (found["dtype"], tuple(found["shape"])) != (WORDS[dtype], shape):
        raise _DamagedError(f"no {key!r} of the shape and dtype that its manifest says")
    if not math.prod(shape):
        return torch.zeros(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(found["data"], dtype=INTEGERS[dtype.itemsize]).view(dtype).view(shape)


def _checksum(manifest: Mapping[str, Any], payload: Mapping[str, tuple[str, Sequence[int], Any]]) -> str:
    """SHA-256 of all that a file says, in whatever order and spelling it says it."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    for name in sorted(payload):
        dtype, shape, data = payload[name]
        digest.update(json.dumps([name, dtype, list(shape)]).encode())
        digest.update(data)
    return digest.hexdigest()


def encode_indices(indices: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], int]:
    """Ascending indices (one or more) in the fewest bytes, and the parameter of their Rice code."""
    gaps = np.diff(indices.astype(np.int64), prepend=-1) - 1

    def size(rice: int) -> int:
        return -(-(int((gaps >> rice).sum()) + gaps.size) // 8) + rice * (-(-gaps.size // 8))

    # the size has one valley, at about the logarithm of the mean gap
    rice = max(0, int(math.log2(max(1.0, float(gaps.mean()) * math.log(2)))))
    while rice > 0 and size(rice - 1) <= size(rice):
        rice -= 1
    while rice < _LARGEST_RICE and size(rice + 1) < size(rice):
        rice += 1
    ends = np.cumsum((gaps >> rice) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1, np.uint8)
    unary[ends] = 1
    planes = [np.packbits((gaps >> bit) & 1 == 1, bitorder="little") for bit in range(rice)]
    return np.concatenate([np.packbits(unary, bitorder="little"), *planes]), rice


def decode_indices(
    code: np.ndarray[Any, Any], rice: int, count: int, numel: int
) -> np.ndarray[Any, Any] | None:
    """The indices again, [count] int64; None for a code of anything but `count` indices below `numel`."""
    plane = -(-count // 8)
    last = code.size - rice * plane
    if not (
        0 < count <= numel
        and 0 <= rice <= _LARGEST_RICE
        and last > 0
        and count <= 8 * last
        and code[last - 1]
    ):
        return None
    gaps = np.flatnonzero(np.unpackbits(code[:last], bitorder="little"))
    if gaps.size != count:
        return None
    # in place: these are the largest arrays of a load
    gaps[1:] -= gaps[:-1] + 1
    if (gaps > numel >> rice).any():
        return None
    gaps <<= rice
    for bit in range(rice):
        bits = np.unpackbits(code[last + bit * plane : last + (bit + 1) * plane], bitorder="little")
        if bits[count:].any():
            return None
        gaps |= np.left_shift(bits[:count], bit, dtype=np.int64)
    # in floating-point first, which cannot wrap around
    if gaps.sum(dtype=np.float64) > 2.0**62:
        return None
    gaps += 1
    indices = np.cumsum(gaps, out=gaps)
    indices -= 1
    return indices if indices[-1] < numel else None


def _sizes(part: TensorDelta) -> tuple[int, int]:
    """Bytes of the positions and of the values in a file."""
    if part.indices is None or not part.changed:
        return 0, part.values.nbytes
    return encode_indices(part.indices.cpu().numpy())[0].nbytes, part.values.nbytes


def push_delta(
    delta: Delta,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a sparse delta",
) -> str:
    """Upload a delta to the Hugging Face hub, with a model card; `load_delta(repo_id)` reads it again.

    Args:
        repo_id: "user/name"; made if it does not exist.
        private, token, commit_message: see `huggingface_hub.HfApi.create_repo` and `upload_folder`.

    Returns:
        The address of the commit.

    Raises:
        ImportError: without huggingface_hub. Its own errors for a repository that cannot be written.
    """
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError as error:
        raise ImportError(
            "push_delta needs huggingface_hub, got none; pip install huggingface_hub."
        ) from error
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_delta(delta, Path(folder) / DELTA)
        (Path(folder) / "README.md").write_text(_card(delta, repo_id))
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))


def _card(delta: Delta, repo_id: str) -> str:
    info = delta.info()
    base = delta.base_model or "the base model"
    # JSON's strings are YAML's
    about = f"base_model: {json.dumps(delta.base_model)}\n" if delta.base_model else ""
    return f"""---
library_name: sparse_optim
{about}tags:
- sparse-delta
---
# {repo_id}

{info["changed"]:,} of {info["entries"]:,} weights of {base} ({100 * info["density"]:.3g} %), as a sparse
delta in mode `{delta.mode}`: {info["index_bytes"] + info["value_bytes"] + info["whole_bytes"]:,} bytes.

```python
from sparse_optim import apply_delta, load_delta

apply_delta(model, load_delta("{repo_id}"))  # model: {base}, loaded in its own dtype
```
"""
