"""Weights wherever they are: in a module, a mapping, or safetensors files, read and written tensor by tensor.

Pickles are never opened. What is written appears under its name when it is whole, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .state import clean_name, is_dtensor

# the words of the safetensors format
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
WORDS = {dtype: word for word, dtype in DTYPES.items()}
# integers of each width, as which bits are compared, hashed and moved
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# what of a model's folder goes along with changed weights: no weights in other formats, which would be stale
_COMPANIONS = (
    ".json", ".txt", ".model", ".jinja", ".py", ".md", ".spm", ".tiktoken", ".bpe", ".vocab", ".yaml",
)  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# entries hashed at a time: 4 MiB of float32 stay in the cache
_CHUNK = 1 << 20
# a header that says more is no header; safetensors' own limit
_LARGEST_HEADER = 100_000_000
# Python's own code gives up at some hundred levels; configs have four
_DEEPEST_JSON = 50


Source = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]


class Kind(NamedTuple):
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Weights(NamedTuple):
    """Tensors by their names in the plain model, each read when it is asked for."""

    kinds: dict[str, Kind]
    read: Callable[[str], Tensor]
    aliases: dict[str, str]  # a name of a tensor that is in `kinds` under another, too: the earlier name
    files: list[tuple[Path, list[str]]]  # where they are files, and what each holds
    folder: Path | None = None
    names: Mapping[str, str] = {}  # as the module or file has them, where that differs


def weights_of(source: Source) -> Weights:
    """The tensors of a module, of a state dict, of a .safetensors file, of a folder with one or with shards
    and their index, or of a repository on the Hugging Face hub.

    Raises:
        TypeError: for anything else. ValueError: for files that cannot be read, and tensors that are not
            plain. ImportError: for a name on the hub without huggingface_hub.
    """
    if isinstance(source, nn.Module):
        source = source.state_dict()
    if isinstance(source, Mapping):
        return _in_memory(source)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"weights must be a module, a mapping of tensors or a path, got {type(source).__name__}; "
            "pass one of these."
        )
    path = Path(source)
    if not path.exists():
        path = from_hub(str(source))
    if path.is_dir():
        return _in_files(_files_of(path), path)
    if path.suffix in _PICKLES:
        raise ValueError(
            f"weights must be safetensors, got {path.name}, which may hold a pickle; "
            "save them with safetensors.torch.save_file, or model.save_pretrained."
        )
    return _in_files([path], None)


def plain(name: str, tensor: object) -> Tensor:
    """The tensor, if its bits lie in this process as they are.

    Raises:
        TypeError: for anything that is not a tensor. ValueError: for DTensors, wrapped and meta tensors.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name!r} must be a tensor, got {type(tensor).__name__}; leave it out.")
    if is_dtensor(tensor):
        raise ValueError(
            f"{name!r} must be a whole tensor, got a DTensor, of which this process holds a part; "
            "work on the model before it is sharded, or on its checkpoint."
        )
    if tensor.is_meta or tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
        got = "one on the meta device" if tensor.is_meta else f"{type(tensor).__name__}, {tensor.layout}"
        raise ValueError(f"{name!r} must be a plain dense tensor, got {got}; load or unwrap the model first.")
    if tensor.element_size() not in INTEGERS or tensor.is_quantized:
        raise ValueError(
            f"{name!r} must have entries of at most 8 bytes, got {tensor.dtype}; convert it first."
        )
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"{name!r} must hold its own bits, got a conjugate or negative view; clone it.")
    return tensor.detach()


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Where the entries lie: two tensors of one place are one."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two entries may share memory, as in what `expand` and `as_strided` make."""
    extent = 0
    for stride, size in sorted((stride, n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride <= extent:
            return bool(tensor.numel())
        extent += (size - 1) * stride
    return False


def _in_memory(tensors: Mapping[str, Any]) -> Weights:
    kinds: dict[str, Kind] = {}
    held: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    aliases: dict[str, str] = {}
    first_at: dict[tuple[Any, ...], str] = {}
    for key, tensor in tensors.items():
        if not isinstance(key, str):
            raise TypeError(f"names must be strings, got {key!r}; rename the tensor.")
        if key.endswith("_extra_state") and not isinstance(tensor, Tensor):
            continue
        name = clean_name(key)
        tensor = plain(name, tensor)
        if name in names:
            raise ValueError(
                f"names must differ without what wrappers add, got {names[name]!r} and {key!r}; "
                "pass the model without its wrappers."
            )
        names[name] = key
        earlier = first_at.setdefault(place_of(tensor), name) if tensor.numel() else name
        if earlier != name:
            aliases[name] = earlier
        else:
            kinds[name], held[name] = Kind(tensor.dtype, tuple(tensor.shape)), tensor
    _check_apart(held)
    return Weights(kinds, held.__getitem__, aliases, [], None, names)


def _check_apart(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that share a part of their memory: a change of one would be a change of the other."""
    extents = []
    for name, t in tensors.items():
        if t.numel():
            last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
            extents.append((str(t.device), t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size(), name))
    extents.sort()
    for (device, _, end, name), (other, start, _, next_name) in pairwise(extents):
        if device == other and start < end:
            raise ValueError(
                f"tensors must be one or apart in memory, got {name!r} and {next_name!r}, which overlap; "
                "clone one of them."
            )


def _files_of(folder: Path) -> list[Path]:
    """The weights of a model's folder, by its index where there is one."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = set(json_of(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{INDEX} must have a weight_map, got none ({one_line(error)}); save the model again."
            ) from error
        strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if strange:
            got = one_line(repr(strange[0]))
            raise ValueError(f"{INDEX} must name files beside it, got {got}; save the model again.")
        # not is_file, which cannot be asked about a name that is too long
        missing = sorted(names - set(os.listdir(folder)))
        missing += sorted(name for name in names.difference(missing) if not (folder / name).is_file())
        if missing:
            got = one_line(repr(missing[0]))
            raise ValueError(
                f"{folder.name} must have every file of its index, got no {got}; fetch it again."
            )
        return [folder / name for name in sorted(names)]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        pickles = any(path.suffix in _PICKLES for path in folder.iterdir())
        got = f"{len(found)} of them and no index" if found else "none" + pickles * ", but pickles"
        raise ValueError(
            f"the folder {folder.name!r} must have one .safetensors file or an index of several, got {got}; "
            "save the model with save_pretrained."
        )
    return found


def from_hub(name: str, file: str | None = None) -> Path:
    """What a repository on the Hugging Face hub has: a file, or a folder of weights, in the hub's cache."""
    if not _HUB_NAME.fullmatch(name) or name.endswith((".safetensors", *_PICKLES)):
        raise ValueError(f"a path must exist, got {name!r}; look for a typing error.")
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name!r} is no path, and a name on the hub needs huggingface_hub, got none; "
            "pip install huggingface_hub."
        ) from error
    patterns = ["*.safetensors", *("*" + suffix for suffix in _COMPANIONS)]
    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(name, file))
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's own, and those of the libraries under it
        raise ValueError(
            f"a path must exist, or be a name on the hub, got {name!r} ({one_line(error)}); "
            "look for a typing error, or fetch the files first."
        ) from error


def one_line(text: object) -> str:
    """The beginning of what may come from a file: as a part of a sentence, on whatever terminal."""
    line = " ".join(str(text)[:200].split()).rstrip(".")
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def json_of(text: str | bytes, deepest: int = _DEEPEST_JSON) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: for anything else, and for what is nested so deeply that it could not be written again.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level = [value]
    for _ in range(deepest):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return value
    raise ValueError("nested too deeply")


def open_safetensors(path: Path) -> Any:
    """The file, mapped into memory.

    Raises:
        ValueError: for anything that is not such a file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"weights must be a file or a folder, got {path.name!r}; name one of these.")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path.name} must be a safetensors file, got another ({one_line(error)}); "
            "save or fetch it again."
        ) from error


def _in_files(paths: Sequence[Path], folder: Path | None) -> Weights:
    kinds: dict[str, Kind] = {}
    opened: dict[str, Any] = {}
    names: dict[str, str] = {}
    files = []
    for path in paths:
        file = open_safetensors(path)
        mine = []
        for key in sorted(file.keys()):
            part, name = file.get_slice(key), clean_name(key)
            if name in kinds:
                got = one_line(repr(name))
                raise ValueError(f"names must differ, got {got} twice in {path.name}; save the model again.")
            if (word := part.get_dtype()) not in DTYPES:
                got = one_line(repr(name))
                raise ValueError(f"{got} must have a dtype of torch, got {word}; convert it first.")
            kinds[name] = Kind(DTYPES[word], tuple(part.get_shape()))
            opened[name], names[name] = file, key
            mine.append(name)
        files.append((path, mine))

    def read(name: str) -> Tensor:
        tensor: Tensor = opened[name].get_tensor(names[name])
        return tensor

    return Weights(kinds, read, {}, files, folder, names)


def renamed_key(key: str, own: str, new: str) -> str:
    """What a file calls a tensor, whose plain name changes from `own` to `new` at the front."""
    renamed = new.removesuffix(own) + key if new.endswith(own) else key.removeprefix(own.removesuffix(new))
    return renamed if clean_name(renamed) == new else new


def bits_of(tensor: Tensor) -> Tensor:
    """The entries as integers: [numel], a view where the tensor is contiguous."""
    return tensor.contiguous().view(INTEGERS[tensor.element_size()]).reshape(-1)


def content_hash(tensor: Tensor, indices: Tensor | None = None, bits: Tensor | None = None) -> str:
    """Half a SHA-256, in hexadecimal, of a tensor's bytes; with the listed entries as `bits` has them."""
    digest, flat = hashlib.sha256(), bits_of(tensor)
    listed = None if indices is None or bits is None else (indices.cpu().numpy(), bits.cpu().numpy())
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].cpu().numpy()
        if listed:
            low, high = np.searchsorted(listed[0], [start, start + _CHUNK])
            if low < high:
                part = part.copy()
                part[listed[0][low:high].astype(np.int64) - start] = listed[1][low:high]
        digest.update(part.data)
    return digest.hexdigest()[:32]


# --- writing ----------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name in the same folder to write a file or a folder under, which gets the name `path` when all went
    well. A file that is there is replaced; a folder is not.
    """
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """What was written there survives a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def word_of(name: str, dtype: torch.dtype) -> str:
    """What safetensors calls a tensor's dtype.

    Raises:
        ValueError: for one that it does not know.
    """
    if dtype not in WORDS:
        raise ValueError(f"{name!r} must have a dtype of safetensors, got {dtype}; convert it first.")
    return WORDS[dtype]


def _is_text(name: str) -> bool:
    """Whether there are no halves of surrogates, which Python's strings may have and files may not."""
    return name.encode(errors="ignore").decode() == name


def write_safetensors(
    path: Path,
    kinds: Mapping[str, Kind],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A safetensors file of tensors that are read one after the other: no more than one is held."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # entries of 8 bytes first, so that each tensor is aligned
    order = sorted(kinds, key=lambda name: (-kinds[name].dtype.itemsize, name))
    end = 0
    for name in order:
        dtype, shape = kinds[name]
        if name == "__metadata__" or not _is_text(name):
            raise ValueError(f"names must be such as safetensors knows, got {name!r}; rename the tensor.")
        start, end = end, end + kinds[name].nbytes
        header[name] = {"dtype": word_of(name, dtype), "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LARGEST_HEADER:
        raise ValueError(f"names and shapes must fit into 100 MB, got {len(text)} bytes; split the model.")
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = read(name)
            if Kind(tensor.dtype, tuple(tensor.shape)) != kinds[name]:
                raise RuntimeError(f"{name!r} was to be {kinds[name]}, got {tensor.dtype}, {tensor.shape}")
            file.write(bits_of(tensor).cpu().numpy().data)
        file.flush()
        os.fsync(file.fileno())


def rewrite_checkpoint(
    source: Weights,
    output: Path,
    names: Mapping[str, str],
    added: Mapping[str, Kind],
    read: Callable[[str], Tensor],
    config: Mapping[str, Any] | None,
) -> None:
    """The files of a checkpoint again, with other names and values.

    Args:
        names: of the tensors that stay, the new one for each.
        added: further tensors, which come into the last file.
        read: a tensor by its new name.
        config: what config.json is to say, if anything else than before.
    """
    if source.folder is None:
        with replacing(output) as path:
            mine = {names[name]: source.kinds[name] for name in source.kinds if name in names}
            write_safetensors(path, mine | dict(added), read, {"format": "pt"})
        return
    if output.exists():
        raise ValueError(f"output must be a new folder, got {str(output)!r}, which exists; name another.")
    with replacing(output) as folder:
        folder.mkdir()
        for path in sorted(source.folder.iterdir()):
            if path.suffix in _COMPANIONS and path.name != INDEX and path.is_file():
                shutil.copyfile(path, folder / path.name)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        places: dict[str, str] = {}
        size = 0
        for number, (path, held) in enumerate(source.files):
            kinds = {names[name]: source.kinds[name] for name in held if name in names}
            if number == len(source.files) - 1:
                kinds |= added
            write_safetensors(folder / path.name, kinds, read, {"format": "pt"})
            places |= dict.fromkeys(kinds, path.name)
            size += sum(kind.nbytes for kind in kinds.values())
        if (source.folder / INDEX).is_file():
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for path in folder.iterdir():
            _sync(path)
        _sync(folder)


def config_of(source: Weights) -> dict[str, Any] | None:
    """What the config.json beside the weights says."""
    path = source.folder / "config.json" if source.folder else None
    if path is None or not path.is_file():
        return None
    try:
        # two levels less: in a delta it is that much deeper
        config = json_of(path.read_bytes(), _DEEPEST_JSON - 2)
    except ValueError as error:
        raise ValueError(
            f"config.json must be JSON, got other text ({one_line(error)}); fetch the model again."
        ) from error
    return config if isinstance(config, dict) else None
