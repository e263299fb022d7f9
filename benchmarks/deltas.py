"""What does a delta cost to make, keep and switch?

    python -m benchmarks.deltas                        55 million weights in the shapes of a Llama
    python -m benchmarks.deltas --numel 1e8            deeper; --rows PEFT: rows whose name contains this
    python -m benchmarks.deltas --quick                tiny sizes; nothing is kept, as with --rows

Of every linear layer's weights a share d is changed, at random places, in up to 7 bits of the significand
that bfloat16 and float32 share; embeddings and norms stay. Places that training chooses may be closer
together, which makes a file smaller, never larger.

*On disk*, k of n entries of e bytes changed: at least log2 C(n, k) bits for where, summed over tensors, and k
e bytes for what. Values are counted at their width: what a compressor might make of them is left out, here
and in all other rows. A raw list takes k (4 + e). Beside it, the files that PEFT loads: the same delta as an
adapter, 12 k (SHiRA, which pads each layer to a multiple of in + out) or 8 k (Supertuning), and a LoRA
adapter with as many trained values, 4 k as peft saves it; and the whole checkpoint, n e. Gate: the file,
loaded and applied, gives the tuned model's bytes; an adapter has the delta's entries, or k values.

*Extraction* reads two checkpoints, 2 n e, which are in the page cache: `reading both files` is what the disk
can do at best. The plain formulation loads both with safetensors, compares tensor by tensor, and takes the
places with `nonzero`; it does without the hashes of the base, whose own time is a row. Gate: places and
values of both are the ones that were changed.

*Memory* of an extraction is measured in a fresh process each: the most that RssAnon of /proc/self/status has
grown by, looked at every millisecond. That is what the process has allocated. Pages of the mapped checkpoints
are not in it: the kernel takes them back when it likes, and ru_maxrss and VmHWM would count them. On paper:
the delta, k (4 + e); what comes on top is of the tensors that are at work, one a thread.

*On and off*: `apply_delta` reads the lists and combines the listed entries, `verify=True` reads all n e for
hashes. `save_delta` syncs the file; `save_file` does not.

*A switch* takes one delta off and puts the next one on: of each, the indices and the values, k (4 + e), and
every cache line of 64 bytes with a changed entry in it, read and written: 2 n e (1 - (1 - d)^(64 / e)).
Beside it: reading the checkpoint (2 n e: `load_file` and
`load_state_dict`); LoRA adapters of k trained values in PEFT, unmerged, which moves nothing at the switch and
pays in every forward pass; and merged, taken off and put on, which reads and writes all changed layers twice.
Gate: after every switch the weights have the bytes of the tuned model, looked at off the clock. Merged
LoRA does not return to them: the row's note says how many of the base's weights are others afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.harness import (
    REPOSITORY,
    Options,
    Record,
    Row,
    WrongResultError,
    finish,
    first_line,
    keep,
    measure,
    parse,
    progress,
    show,
    verdicts,
)
from sparse_optim import (
    Delta,
    DeltaSwitcher,
    apply_delta,
    backends,
    extract_delta,
    load_delta,
    patching,
    revert_delta,
    save_delta,
)
from sparse_optim.checkpoints import bits_of, content_hash

CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DENSITIES = (0.001, 0.01, 0.05, 0.3)
DENSITY = 0.01
SWITCHED = (0.01, 0.001)
LINE = 64  # bytes of a cache line
# bytes of a model whose extraction is held to a bar
SMALLEST_HELD = 64 << 20

SIZE, EXTRACTION, MEMORY = "a delta on disk, {}", "extraction, {}", "memory of an extraction, {}"
ON_AND_OFF, SWITCH = "on and off, {}", "a switch, {:g} %"
QUESTIONS = (
    *(question.format(dtype) for question in (SIZE, EXTRACTION, MEMORY, ON_AND_OFF) for dtype in DTYPES),
    *(SWITCH.format(100 * density) for density in SWITCHED),
)
OURS, SHIRA, SUPERTUNING, LORA = "sparse delta", "PEFT SHiRA", "PEFT Supertuning", "PEFT LoRA"
CHECKPOINT = "whole checkpoint"
READ, EXTRACT, PLAIN = "reading both files", "extract_delta", "load both, compare, nonzero"
HASH = "SHA-256 of the base"
RELOAD, SAVE_ALL = "load_file, load_state_dict", "save_file, whole checkpoint"
ACTIVATE, UNMERGED = "DeltaSwitcher.activate", "PEFT LoRA, set_adapter"
MERGED = "PEFT LoRA, unmerge and merge"
# by default glibc keeps what is freed
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}

Tensors = Mapping[str, Tensor]


# models


@dataclass(frozen=True)
class Shape:
    """A model like Llama: width, layers, width of the feed-forward part, and tokens."""

    width: int
    layers: int
    inner: int
    vocabulary: int


class Block(nn.Module):
    """The weights of one layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(shape.width, shape.width, bias=False))
        self.gate_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.down_proj = nn.Linear(shape.inner, shape.width, bias=False)
        self.input_norm, self.post_norm = nn.RMSNorm(shape.width), nn.RMSNorm(shape.width)


class Net(nn.Module):
    """The weights of a model, which nobody runs."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        # not by the names for which peft saves whole layers
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)


def shape_of(options: Options) -> Shape:
    """What is asked for, roughly."""
    if options.quick:
        return Shape(64, 1, 176, 256)
    width, inner, vocabulary = 1024, 2816, 8000
    layer = width * (4 * width + 3 * inner)
    rest = (options.numel or 0) - 2 * vocabulary * width
    return Shape(width, max(1, round(rest / layer)) if options.numel else 3, inner, vocabulary)


def net_of(shape: Shape, dtype: torch.dtype, device: torch.device) -> Net:
    """A model with random weights, the same on every call."""
    with torch.device("meta"):
        net = Net(shape).to(dtype)
    net = net.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data.normal_(0.0, 0.02, generator=generator)
        p.requires_grad_(False)
    return net.to(device)


def linears(net: nn.Module) -> dict[str, nn.Linear]:
    """The modules whose weights are changed, by name."""
    return {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}


def changed_entries(tensor: Tensor, density: float) -> int:
    """How many entries of a linear layer are changed."""
    return max(1, int(density * tensor.numel()))


def tuned_of(net: nn.Module, density: float, seed: int = 1) -> dict[str, Tensor]:
    """All tensors of the model, some entries of the linear layers changed."""
    generator = torch.Generator().manual_seed(seed)
    tuned = {name: tensor.detach().cpu().clone() for name, tensor in net.state_dict().items()}
    for module in linears(net):
        bits = bits_of(tuned[f"{module}.weight"])
        k = changed_entries(bits, density)
        places = torch.randperm(bits.numel(), generator=generator)[:k]
        flips = torch.randint(1, 128, (k,), generator=generator, dtype=torch.int32)
        # the seven bits of bfloat16's significand, in either dtype
        bits[places] ^= (flips << 8 * (bits.element_size() - 2)).to(bits.dtype)
    return tuned


def differing(got: Tensors, expected: Tensors) -> str:
    """Which tensors do not have the expected bytes; empty if all do."""
    pairs = {name: (bits_of(got[name].detach()).cpu(), bits_of(expected[name])) for name in expected}
    wrong = [name for name, (mine, theirs) in pairs.items() if not torch.equal(mine, theirs)]
    return f"weights must be those expected to the bit, got others in {', '.join(wrong[:3])}" * bool(wrong)


# bytes on paper


def entropy_bytes(delta: Delta) -> float:
    """What places cost at least, and values at their width."""
    total = 0.0
    for part in delta.tensors.values():
        n, k = part.numel, part.changed
        where = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
        total += where / 8 + k * part.dtype.itemsize
    return total


def list_bytes(delta: Delta) -> int:
    """Indices and values as they lie in memory."""
    return sum(part.changed * (4 + part.dtype.itemsize) for part in delta.tensors.values())


def line_bytes(delta: Delta) -> float:
    """The cache lines in which a uniformly random choice of as many entries lies."""
    total = 0.0
    for part in delta.tensors.values():
        nbytes, per_line = part.numel * part.dtype.itemsize, LINE // part.dtype.itemsize
        total += nbytes * (1 - (1 - part.changed / max(1, part.numel)) ** per_line)
    return total


def switch_bytes(off: Delta, on: Delta) -> float:
    """Lists read; lines read and written."""
    return sum(list_bytes(delta) + 2 * line_bytes(delta) for delta in (off, on))


# files


@dataclass(frozen=True)
class Pair:
    """A base and a tuned model, in memory and in files."""

    net: Net
    tuned: dict[str, Tensor]
    base_file: Path
    tuned_file: Path

    @property
    def numel(self) -> int:
        return sum(tensor.numel() for tensor in self.tuned.values())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tuned.values())

    def base(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.net.state_dict().items()}


def pair_of(shape: Shape, dtype: torch.dtype, density: float, folder: Path) -> Pair:
    """Both models, on the CPU and on disk."""
    from safetensors.torch import save_file

    net = net_of(shape, dtype, CPU)
    pair = Pair(net, tuned_of(net, density), folder / "base.safetensors", folder / "tuned.safetensors")
    save_file(pair.base(), pair.base_file)
    save_file(pair.tuned, pair.tuned_file)
    return pair


def surely_peft() -> str:
    """Why PEFT's rows are left out; empty if they are not."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        return peers.why_missing("peft")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries say when they are imported."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def lora_of(net: nn.Module, trained: int, *names: str) -> Any:
    """The model with adapters of about so many trained values, of which none is zero."""
    peft = importlib.import_module("peft")
    targets = linears(net)
    per_rank = sum(sum(module.weight.shape) for module in targets.values())
    config = peft.LoraConfig(
        r=max(1, round(trained / per_rank)), target_modules=list(targets), init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, copy.deepcopy(config))
    return model


# sizes


def sizes(shape: Shape, dtype: str, density: float, options: Options, *, with_peft: bool) -> list[Record]:
    """The files of one delta, beside others."""
    net = net_of(shape, DTYPES[dtype], CPU)
    tuned = tuned_of(net, density)
    delta = extract_delta(net, tuned)
    k = sum(part.changed for part in delta.tensors.values())
    base_bytes = sum(tensor.nbytes for tensor in tuned.values())
    percent = f"{100 * density:g} %"
    record = Record(
        "deltas",
        SIZE.format(dtype),
        "",
        sum(tensor.numel() for tensor in tuned.values()),
        dtype,
        density=density,
    )
    kinds: dict[str, tuple[Callable[[Path], tuple[int, int]], float]] = {
        OURS: (lambda path: saved_delta(delta, net, tuned, path), entropy_bytes(delta)),
        CHECKPOINT: (lambda path: (saved_checkpoint(tuned, path), k), base_bytes),
    }
    if with_peft:
        for name, kind, each in ((SHIRA, "shira", 12), (SUPERTUNING, "supertuning", 8)):
            save_as = functools.partial(saved_adapter, delta, net, kind)
            kinds[name] = (save_as, each * k)
        kinds[LORA] = (lambda path: saved_lora(shape, DTYPES[dtype], k, path), 4 * k)
    records = []
    for name, (save, ideal) in kinds.items():
        row = f"{name}, {percent}"
        if options.only.lower() not in row.lower():
            continue
        mine = replace(record, row=row, ideal_bytes=float(ideal), backend=ours(name))
        with tempfile.TemporaryDirectory() as folder:
            try:
                size, entries = save(Path(folder) / "file")
                mine = replace(mine, file_bytes=size, changed=entries)
            except WrongResultError as error:
                mine = replace(mine, note=f"wrong, not measured: {error}")
            except Exception as error:
                mine = replace(mine, note=("failed: " if name == OURS else "") + first_line(error))
        records.append(mine)
    return records


def ours(name: str, device: torch.device = CPU) -> str:
    """The backend of a row; none for what others wrote."""
    mine = (OURS, EXTRACT, ACTIVATE, "save_delta", "load_delta", "apply_delta", "revert_delta")
    if not name.startswith(mine):
        return ""
    found: str = backends.resolve("auto", device, wants_reference=False).__name__
    return found.rpartition(".")[2].removesuffix("_kernels")


def saved_delta(delta: Delta, net: Net, tuned: Tensors, path: Path) -> tuple[int, int]:
    """Bytes and entries of the file, which must give the tuned model."""
    save_delta(delta, path)
    loaded = load_delta(path)
    state = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    apply_delta(state, loaded)
    problem = differing(state, tuned)
    if problem:
        raise WrongResultError(problem)
    return path.stat().st_size, sum(part.changed for part in loaded.tensors.values())


def saved_checkpoint(tuned: Tensors, path: Path) -> int:
    """Bytes of all tensors, as safetensors writes them."""
    from safetensors.torch import save_file

    save_file(dict(tuned), path)
    return path.stat().st_size


def saved_adapter(delta: Delta, net: Net, kind: str, path: Path) -> tuple[int, int]:
    """Bytes and changed entries of an adapter: the delta's, with zeros for padding."""
    from safetensors.torch import load_file

    from sparse_optim.integrations.peft import to_peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        to_peft(delta, path, model=net, kind=kind)  # type: ignore[arg-type]
    file = path / "adapter_model.safetensors"
    found = sum(int(t.count_nonzero()) for name, t in load_file(file).items() if "_indices" not in name)
    wanted = sum(part.changed for part in delta.tensors.values())
    if found != wanted:
        raise WrongResultError(f"an adapter must change {wanted} entries, got {found}")
    return file.stat().st_size, found


def saved_lora(shape: Shape, dtype: torch.dtype, trained: int, path: Path) -> tuple[int, int]:
    """Bytes of a LoRA adapter as peft saves it, and its values."""
    from safetensors.torch import load_file

    with torch.device("meta"):
        net = Net(shape).to(dtype)
    model = lora_of(net.to_empty(device="cpu"), trained, "default")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    file = path / "adapter_model.safetensors"
    values = sum(tensor.numel() for tensor in load_file(file).values())
    expected = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    if values != expected:
        raise WrongResultError(f"an adapter must hold {expected} values, got {values}")
    return file.stat().st_size, values


# extraction


def read_files(*paths: Path) -> int:
    """Reads them through one buffer, and returns their bytes."""
    buffer = bytearray(4 << 20)
    total = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def plain_extraction(base: Path, tuned: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Places and bits of what changed, as one would write it in torch."""
    from safetensors.torch import load_file

    before, after = load_file(base), load_file(tuned)
    found = {}
    for name in before:
        old, new = bits_of(before[name]), bits_of(after[name])
        where = (old != new).nonzero().view(-1)
        found[name] = where.to(torch.int32), old[where] ^ new[where]
    return found


def wrong_extraction(pair: Pair, found: Mapping[str, tuple[Tensor, Tensor]]) -> str | None:
    """What is wrong with places and bits, against those that were changed."""
    base = pair.base()
    for name, tensor in pair.tuned.items():
        old, new = bits_of(base[name]), bits_of(tensor)
        where = (old != new).nonzero().view(-1)
        places, bits = found[name]
        if not torch.equal(places.long(), where) or not torch.equal(bits, old[where] ^ new[where]):
            return f"{name!r} must have the changes that were made, got others"
    return None


def extraction_rows(pair: Pair) -> list[Row]:
    """Ways to find out what changed, between two files."""
    files = pair.base_file, pair.tuned_file
    both = float(sum(path.stat().st_size for path in files))

    def extracted() -> dict[str, tuple[Tensor, Tensor]]:
        parts = extract_delta(*files).tensors
        return {name: (part.indices, part.values) for name, part in parts.items() if part.indices is not None}

    def wrong_read() -> str | None:
        return None if read_files(*files) == both else "fewer bytes than the files have"

    base = pair.base()
    return [
        Row(READ, both, lambda: lambda: read_files(*files), wrong_read),
        Row(
            EXTRACT,
            both,
            lambda: lambda: extract_delta(*files),
            lambda: wrong_extraction(pair, extracted()),
            peers=(READ, PLAIN),
            backend=ours(EXTRACT),
            density=DENSITY,
        ),
        Row(
            PLAIN,
            both,
            lambda: lambda: plain_extraction(*files),
            lambda: wrong_extraction(pair, plain_extraction(*files)),
            density=DENSITY,
        ),
        Row(HASH, both / 2, lambda: lambda: [content_hash(tensor) for tensor in base.values()]),
    ]


# memory, in processes of their own


def anonymous_bytes() -> int:
    """What this process has allocated, without pages of mapped files.

    Raises:
        RuntimeError: where the kernel does not say.
    """
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("needs Linux, which says in /proc/self/status what a process has allocated")


def growth(step: Callable[[], object]) -> int:
    """The most that allocated memory grows by in a call."""
    before = anonymous_bytes()
    most = before
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        # held until memory has been looked at once more
        result = step()
        most = max(most, anonymous_bytes())
        del result
    finally:
        done.set()
        watcher.join()
    return most - before


EXTRACTIONS: dict[str, Callable[[Path, Path], object]] = {EXTRACT: extract_delta, PLAIN: plain_extraction}


def child() -> None:
    """Reads a task from standard input, and writes the answer to the file that it names."""
    task = json.load(sys.stdin)
    extract = EXTRACTIONS[task["row"]]
    # what is loaded at the first call
    extract(Path(task["small"]), Path(task["small"]))
    answer = growth(lambda: extract(Path(task["base"]), Path(task["tuned"])))
    Path(task["answer"]).write_text(json.dumps(answer))


def memory_row(row: str, pair: Pair, ideal: float, dtype: str) -> Record:
    """What an extraction in a fresh process holds at most."""
    from safetensors.torch import save_file

    record = Record(
        "deltas", MEMORY.format(dtype), row, pair.numel, dtype, ours(row), DENSITY, ideal_bytes=ideal
    )
    with tempfile.TemporaryDirectory() as folder:
        small, answer = Path(folder) / "small.safetensors", Path(folder) / "answer.json"
        save_file({"weight": torch.zeros(64)}, small)
        task = {
            "row": row,
            "base": str(pair.base_file),
            "tuned": str(pair.tuned_file),
            "small": str(small),
            "answer": str(answer),
        }
        done = subprocess.run(
            [sys.executable, "-c", "import benchmarks.deltas; benchmarks.deltas.child()"],
            input=json.dumps(task),
            text=True,
            cwd=REPOSITORY,
            capture_output=True,
            check=False,
            env=os.environ | GIVE_BACK,
        )
        if done.returncode or not answer.exists():
            reason = (done.stderr.splitlines() or ["nothing said"])[-1]
            return replace(record, note=reason if "needs Linux" in reason else f"failed: {reason[:160]}")
        grown = json.loads(answer.read_text())
    record = replace(
        record,
        peak=grown / pair.numel,
        note=f"{grown / pair.nbytes:.3f} of one model, {grown / 2**20:.1f} MiB, RssAnon in a fresh process",
    )
    # in a small model threads and their buffers weigh more than tensors
    if row == EXTRACT and pair.nbytes >= SMALLEST_HELD:
        record = replace(
            record,
            bars="allocates less than half a model",
            reached=f"{grown / pair.nbytes:.3f} of one",
            met="yes" if grown < pair.nbytes / 2 else "no",
        )
    return record


# on, off, and in between


def on_and_off_rows(pair: Pair, delta: Delta, folder: Path, device: torch.device) -> list[Row]:
    """A delta's file, and what it does to a model in memory."""
    from safetensors.torch import load_file, save_file

    own, whole = folder / "delta.safetensors", folder / "written.safetensors"
    save_delta(delta, own)
    size = float(own.stat().st_size)
    net = copy.deepcopy(pair.net).to(device)
    state = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    bases = {name: tensor.to(device) for name, tensor in pair.base().items()}
    tuned = {name: tensor.to(device) for name, tensor in pair.tuned.items()}
    moved = list_bytes(delta) + 2 * line_bytes(delta)

    def put(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            state[name].copy_(tensor)

    def round_trip() -> str | None:
        put(bases)
        apply_delta(net, load_delta(own))
        if problem := differing(state, pair.tuned):
            return problem
        revert_delta(net, delta)
        return differing(state, pair.base()) or None

    def changing(name: str, change: Callable[..., None], start: Tensors, *, verify: bool) -> Row:
        return Row(
            f"{name}, verify={verify}",
            moved + verify * pair.nbytes,
            lambda: (lambda: change(net, delta, verify=verify), lambda: put(start)),
            round_trip,
            peers=(RELOAD,),
            backend=ours(name, device),
            density=DENSITY,
        )

    def reload() -> None:
        net.load_state_dict(load_file(pair.tuned_file, device=str(device)))

    def wrong_reload() -> str | None:
        reload()
        return differing(state, pair.tuned) or None

    return [
        Row(RELOAD, 2.0 * pair.nbytes, lambda: reload, wrong_reload),
        Row(SAVE_ALL, float(pair.nbytes), lambda: lambda: save_file(pair.tuned, whole)),
        Row(
            "save_delta",
            size,
            lambda: lambda: save_delta(delta, folder / "again.safetensors"),
            round_trip,
            peers=(SAVE_ALL,),
            backend=ours("save_delta"),
            density=DENSITY,
        ),
        Row(
            "load_delta",
            size,
            lambda: lambda: load_delta(own),
            round_trip,
            peers=(RELOAD,),
            backend=ours("load_delta"),
            density=DENSITY,
        ),
        *(changing("apply_delta", apply_delta, bases, verify=verify) for verify in (True, False)),
        *(changing("revert_delta", revert_delta, tuned, verify=verify) for verify in (True, False)),
    ]


class Turns:
    """Switches to one model after the other; what each switch has made is looked at off the clock.

    Args:
        switch: to a model, by its name.
        look: what is wrong with the weights if this model is to be active; empty if nothing is.
    """

    def __init__(self, switch: Callable[[str], object], look: Callable[[str], str], names: Sequence[str]):
        self._switch, self._look = switch, look
        self._order = itertools.cycle(names)
        self._active: str | None = None

    def step(self) -> None:
        self._active = next(self._order)
        self._switch(self._active)

    def check(self) -> None:
        problem = self._look(self._active) if self._active is not None else ""
        if problem:
            raise WrongResultError(f"after a switch to {self._active!r} {problem}")

    def first(self) -> str | None:
        """Both switches and back again, for a gate."""
        for _ in range(3):
            self.step()
            self.check()
        return None


@dataclass(frozen=True)
class Switched:
    """A row, and what there is to say when it has run."""

    row: Row
    turns: Turns
    note: Callable[[], str] = lambda: ""


def switched_rows(
    net: Net, density: float, folder: Path, device: torch.device, *, with_peft: bool
) -> list[Switched]:
    """Ways to give a model in memory other weights."""
    from safetensors.torch import load_file, save_file

    names = ("first", "second")
    expected = {name: tuned_of(net, density, seed) for seed, name in enumerate(names)}
    deltas = {name: extract_delta(net, expected[name]) for name in names}
    nbytes = sum(tensor.nbytes for tensor in expected["first"].values())
    k = sum(part.changed for part in deltas["first"].tensors.values())

    def model() -> Net:
        return copy.deepcopy(net).to(device)

    def row(name: str, ideal: float, turns: Turns) -> Row:
        steps = turns.step, turns.check
        return Row(name, ideal, lambda: steps, turns.first, backend=ours(name, device), density=density)

    def looks(held: nn.Module) -> Callable[[str], str]:
        return lambda name: differing(held.state_dict(), expected[name])

    switched, reloaded = model(), model()
    switcher = DeltaSwitcher(switched, deltas)
    activated = Turns(switcher.activate, looks(switched), names)
    files = {name: folder / f"{name}.safetensors" for name in names}
    for name, path in files.items():
        save_file(expected[name], path)

    def reload(name: str) -> None:
        reloaded.load_state_dict(load_file(files[name], device=str(device)))

    loaded = Turns(reload, looks(reloaded), names)
    rows = [
        Switched(row(ACTIVATE, switch_bytes(*deltas.values()), activated), activated),
        Switched(row(RELOAD, 2.0 * nbytes, loaded), loaded),
    ]
    if with_peft:
        rows += lora_rows(net, model, k, names, row)
    return rows


def lora_rows(
    net: Net,
    model: Callable[[], Net],
    trained: int,
    names: Sequence[str],
    row: Callable[[str, float, Turns], Row],
) -> list[Switched]:
    """Adapters of PEFT, beside the weights and merged into them."""
    targets = linears(net)
    apart, merged = lora_of(model(), trained, *names), lora_of(model(), trained, *names)

    def layers(held: Any) -> Iterator[tuple[Any, Tensor]]:
        for name, module in targets.items():
            yield held.base_model.model.get_submodule(name), module.weight.detach()

    def look_apart(name: str) -> str:
        for layer, base in layers(apart):
            if layer.active_adapters != [name] or layer.merged:
                return f"the adapter must be active, got {layer.active_adapters}"
            if not torch.equal(bits_of(layer.base_layer.weight.detach()).cpu(), bits_of(base)):
                return "the weights must be the base's, got others"
        return ""

    def unmerge() -> None:
        with warnings.catch_warnings():
            # there may be nothing to take off
            warnings.simplefilter("ignore")
            merged.base_model.unmerge_adapter()

    def merge(name: str) -> None:
        unmerge()
        merged.base_model.merge_adapter([name])

    def look_merged(name: str) -> str:
        for layer, base in itertools.islice(layers(merged), 1):
            total = base.float() + layer.get_delta_weight(name).detach().float().cpu()
            # roundings add up with every switch: there is no coming back
            error = float((layer.base_layer.weight.detach().float().cpu() - total).norm() / total.norm())
            if layer.merged_adapters != [name] or error > 0.05:
                return f"the adapter must be merged, got {layer.merged_adapters}, {error:.2g} off"
        return ""

    def drift() -> str:
        unmerge()
        pairs = [(layer.base_layer.weight.detach().cpu(), base) for layer, base in layers(merged)]
        others = sum(int((bits_of(got) != bits_of(base)).sum()) for got, base in pairs)
        share = others / sum(base.numel() for _, base in pairs)
        return f"{100 * share:.1f} % of the base's weights are others afterwards"

    nbytes = sum(base.nbytes for _, base in layers(merged))
    unmerged, remerged = Turns(apart.set_adapter, look_apart, names), Turns(merge, look_merged, names)
    return [
        Switched(row(UNMERGED, 0.0, unmerged), unmerged, lambda: "pays in every forward pass"),
        Switched(row(MERGED, 4.0 * nbytes + 8.0 * trained, remerged), remerged, drift),
    ]


# all of it


def note() -> str:
    """What a time here depends on."""
    return (
        f"files in the page cache, {torch.get_num_threads()} threads of torch, {patching._THREADS} of "
        "extraction and hashes"
    )


def noted(records: Sequence[Record], more: Mapping[str, str] | None = None) -> list[Record]:
    """Those that were timed, with a note."""
    return [
        replace(record, note="; ".join(filter(None, [note(), (more or {}).get(record.row, "")])))
        if record.ms is not None
        else record
        for record in records
    ]


def timed(
    question: str, rows: Sequence[Row], numel: int, dtype: str, anchor: str, options: Options
) -> list[Record]:
    """The rows of one question."""
    return measure(
        "deltas",
        question,
        rows,
        parameters=numel,
        anchor=anchor,
        # what is timed leaves nothing under way on another device, but for a model that is there
        device=options.device,
        seconds=options.seconds,
        dtype=dtype,
        only=options.only,
    )


def of_files(shape: Shape, dtype: str, options: Options) -> list[Record]:
    """Extraction, its memory, and a delta on and off, of one dtype."""
    records = []
    with tempfile.TemporaryDirectory() as folder:
        pair = pair_of(shape, DTYPES[dtype], DENSITY, Path(folder))
        question = EXTRACTION.format(dtype)
        records += noted(timed(question, extraction_rows(pair), pair.numel, dtype, READ, options))
        delta = extract_delta(pair.net, pair.tuned)
        for row in progress([row for row in EXTRACTIONS if options.only.lower() in row.lower()], "memory"):
            records.append(memory_row(row, pair, float(list_bytes(delta)), dtype))
        rows = on_and_off_rows(pair, delta, Path(folder), options.device)
        records += noted(timed(ON_AND_OFF.format(dtype), rows, pair.numel, dtype, RELOAD, options))
    return records


def of_switches(shape: Shape, density: float, options: Options, *, with_peft: bool) -> list[Record]:
    """Switches between two deltas of one density, in bfloat16.

    Raises:
        WrongResultError: for a switch that has not made the weights that it should.
    """
    net = net_of(shape, torch.bfloat16, CPU)
    numel = sum(p.numel() for p in net.parameters())
    with tempfile.TemporaryDirectory() as folder:
        found = switched_rows(net, density, Path(folder), options.device, with_peft=with_peft)
        rows = [each.row for each in found]
        records = timed(SWITCH.format(100 * density), rows, numel, "bfloat16", RELOAD, options)
        measured = {record.row for record in records if record.ms is not None}
        for each in found:
            if each.row.name in measured:
                each.turns.check()
        notes = {each.row.name: each.note() for each in found if each.row.name in measured}
    return noted(records, notes)


def show_sizes(records: Sequence[Record]) -> None:
    """Prints the files of one dtype."""
    if not records:
        return
    first = records[0]
    print(f"\n{first.question}, {first.parameters:,} weights")
    print(f"{'':<34} {'bytes':>14} {'on paper':>14} {'per entry':>10}")
    for record in records:
        if record.file_bytes is None or not record.changed:
            print(f"  {record.row:<32} {record.note}")
            continue
        print(
            f"  {record.row:<32} {record.file_bytes:14,.0f} {record.ideal_bytes or 0:14,.0f} "
            f"{record.file_bytes / record.changed:10.3f}"
        )


def show_memory(records: Sequence[Record]) -> None:
    """Prints what extractions allocate."""
    for record in records:
        print(f"  {record.row:<32} {record.note}")
        for bar, reached, met in verdicts(asdict(record)):
            print(f"  {'':<32} {bar}: {reached} ({met})")


def show_all(records: Sequence[Record]) -> None:
    """Prints each question in its way."""
    for question in dict.fromkeys(record.question for record in records):
        mine = [record for record in records if record.question == question]
        if any(question == SIZE.format(dtype) for dtype in DTYPES):
            show_sizes(mine)
        elif any(question == MEMORY.format(dtype) for dtype in DTYPES):
            print(f"\n{question}")
            show_memory(mine)
        else:
            show(mine)
            for record in mine:
                own = record.note.removeprefix(note()).removeprefix("; ")
                if record.ms is not None and own:
                    print(f"  {record.row}: {own}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all questions; keeps them in one CSV."""
    started = time.perf_counter()
    options = parse((__doc__ or "").splitlines()[0], arguments)
    shape = shape_of(options)
    missing = surely_peft()
    if missing:
        print(f"the rows of PEFT are left out: {missing}")
    if (auto := ours(ACTIVATE, options.device)) not in options.backends:
        print(f"deltas are moved by the backend that 'auto' takes, which is {auto} here")
    with_peft = not missing
    records = []
    try:
        pairs = list(itertools.product(DTYPES, DENSITIES))
        for dtype, density in progress(pairs, "sizes"):
            records += sizes(shape, dtype, density, options, with_peft=with_peft)
        for dtype in DTYPES:
            records += of_files(shape, dtype, options)
        for density in SWITCHED:
            records += of_switches(shape, density, options, with_peft=with_peft)
    except WrongResultError as error:
        sys.exit(f"wrong, nothing is kept: {error}")
    show_all(records)
    print(f"\ntimes with {note()}")
    keep("deltas", records, options, QUESTIONS)
    print(f"\n{time.perf_counter() - started:.0f} s")
    finish(records)


if __name__ == "__main__":
    main()
