"""What crosses between processes in a training step, and how long the step takes, against DDP and FSDP2 with
torch's fused AdamW.

    python -m benchmarks.distributed                   groups of 2 and 4 processes; a GPU each where they are
    python -m benchmarks.distributed --rows released   rows whose name contains this; nothing is kept
    python -m benchmarks.distributed --quick           2 processes and tiny tensors, likewise

A small language model is trained in every way side by side in one group of processes, gloo on CPUs and NCCL
on GPUs. In every round each row takes one whole step (forward, backward, `step()`), in an order drawn anew; a
sample is the time of the slowest process. Processes of one machine share its cores and its memory, which
are their network: ratios here say little about a cluster.

Three numbers of bytes, each per process and step:
- *handed in*: the payload given to collectives; of an all-reduce and a reduce-scatter the whole tensor, of an
  all-gather the shard. Counted where torch dispatches collectives, below DDP's reducer and FSDP2; one whose
  bytes nobody has written down here is an error.
- *a ring sends*: what an ideal ring makes of it on r ranks: 2 (r - 1) / r of an all-reduce, (r - 1) / r of a
  reduce-scatter, r - 1 times the shard of an all-gather. Arithmetic.
- *sent*: what the kernel says that TCP sockets of the process have sent (Linux, gloo). Nothing that crosses
  can hide from it: if it is not what gloo's algorithms make of the bytes handed in, plus headers, the run is
  wrong. Gloo's reduce-scatter is an all-reduce, which sends twice what a ring needs. NCCL has no such check.

Bytes handed in, n weights in T tensors, k of them selected, e bytes an entry of a gradient, m micro-batches:
- DDP: e n, whatever the optimizer, once a step (`no_sync`).
- gradients released: 4 k + 28 T where a step trains: a float32 for each selected entry, and flags and lengths
  for each tensor. While observing signed gradients 12 T, and in the step that selects 4 n + 20 T: the
  statistic crosses once. With squares whole gradients cross in every step that observes, 4 n + 12 T.
- FSDP2: two all-gathers of e n / r (one of what the root holds) and a reduce-scatter of e n, m times. A
  selection adds 40,968 bytes of counts a threshold (one in all, or T), and flags, 4 T + 4 a group.

`predicted` is these formulas. They must give the counted bytes exactly, at every size, phase, dtype and
number of micro-batches that is run here, or the run ends with an error and keeps nothing. The same function
then says what 7 and 70 billion bfloat16 weights would take on up to 1,024 ranks, with time at an assumed
bandwidth: no latency, no overlap with computation, no padding of shards, and no measurement.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import socket
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import (
    FEWEST_ROUNDS,
    MOST_ROUNDS,
    Options,
    Record,
    WrongResultError,
    keep,
    parse,
    progress,
    quantiles,
    ratio,
)
from sparse_optim import Bernoulli, MaskedAdamW, Schedule, SignedGradient, SquaredGradient, TopK

RANKS = (2, 4)
QUESTIONS = (*(f"{ranks} processes" for ranks in RANKS), "on paper, 7B weights", "on paper, 70B weights")
BASELINE, SHARDED = "DDP, torch.optim.AdamW fused", "FSDP2, torch.optim.AdamW fused"
DENSITY = 0.01
# the first step observes, the second one selects, the others train
PHASES = ("observes", "selects", "trains")
OBSERVE = 2
BLOCKS = 4
TOKENS = 32
NUMEL, SMALL = 2_000_000, 5_000
# large enough that the rounding of a small gradient moves no weight by much
SETTINGS: dict[str, Any] = {"lr": 1e-3, "eps": 1e-3}
# of weights that have moved by SETTINGS["lr"] a step
TOLERANCE = 1e-6

# an assumption, as good as any: 400 Gbit/s for each GPU
ASSUMED_GB_PER_S = 50.0
PAPER_RANKS = (8, 64, 512, 1024)
BFLOAT16 = 2

Parallel = Literal["ddp", "released", "fsdp"]
Statistic = Literal["", "signed", "squares"]
Scope = Literal["global", "tensor"]
T = TypeVar("T")


# bytes on paper


class Traffic(NamedTuple):
    """Bytes that one process hands to collectives."""

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0
    broadcast: int = 0

    @property
    def handed(self) -> int:
        """All of them."""
        return sum(self)

    def ring(self, ranks: int) -> float:
        """What a rank sends where every collective is a ring."""
        share = (ranks - 1) / ranks
        return (
            2 * share * self.all_reduce
            + (ranks - 1) * self.all_gather
            + share * self.reduce_scatter
            + self.broadcast
        )

    def gloo(self, ranks: int) -> float:
        """What gloo sends, less headers."""
        return self._replace(all_reduce=self.all_reduce + self.reduce_scatter, reduce_scatter=0).ring(ranks)


def predicted(
    parallel: Parallel,
    phase: str,
    *,
    weights: int,
    tensors: int,
    ranks: int,
    density: float = 1.0,
    statistic: Statistic = "",
    scope: Scope = "global",
    micro_batches: int = 1,
    root: int = 0,
    element: int = 4,
) -> Traffic:
    """What one process hands to collectives in a step.

    Args:
        phase: one of `PHASES`; where nothing is selected they are all the same.
        density: of what is selected; it matters where gradients are released.
        statistic: by which entries are selected; empty where none are.
        scope: of a threshold.
        root: weights that FSDP2 shards with the whole model rather than with a block: gathered once.
        element: bytes of an entry of a gradient.
    """
    if parallel == "ddp":
        return Traffic(all_reduce=element * weights)
    if parallel == "released":
        present, lengths = 3 * 4 * tensors, 2 * 8 * tensors
        if phase == "trains":
            return Traffic(all_reduce=4 * int(density * weights) + present + lengths)
        if statistic == "squares":
            return Traffic(all_reduce=4 * weights + present)
        begun_and_spoiled = 2 * 4 * tensors
        selects = phase == "selects"
        return Traffic(all_reduce=present + selects * (4 * weights + begun_and_spoiled))
    counts = 0
    if statistic and phase == "selects":
        thresholds = tensors if scope == "tensor" else 1
        # 11, 11 and 10 bits of a float32 score, with one number more in the first round; one group
        counts = 8 * (2048 + 1 + 2048 + 1024) * thresholds + 4 * tensors + 4
    return Traffic(
        all_reduce=counts,
        all_gather=micro_batches * element * (2 * weights - root) // ranks,
        reduce_scatter=micro_batches * element * weights,
    )


# bytes counted

# the collective, and which argument this process hands in
COLLECTIVES = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::allreduce_coalesced_": ("all_reduce", 0),
    "c10d::allgather_": ("all_gather", 1),
    "c10d::_allgather_base_": ("all_gather", 1),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "c10d::broadcast_": ("broadcast", 0),
    "_c10d_functional::all_reduce": ("all_reduce", 0),
    "_c10d_functional::all_reduce_": ("all_reduce", 0),
    "_c10d_functional::all_reduce_coalesced": ("all_reduce", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", 0),
    "_c10d_functional::all_gather_into_tensor_coalesced": ("all_gather", 0),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional::reduce_scatter_tensor_coalesced": ("reduce_scatter", 0),
    "_c10d_functional::broadcast": ("broadcast", 0),
}
WITHOUT_BYTES = ("barrier", "wait_tensor", "_wrap_tensor_autograd")


class Counter(TorchDispatchMode):
    """Sees the collectives of whatever runs inside: DDP's reducer calls them from C++, but through torch's
    dispatcher, like everybody else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.traffic, self.calls = Traffic(), 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Adds the bytes of a collective."""
        if DTensor in types:
            # it first does what it does: its collectives come back here
            return NotImplemented
        name = func._schema.name
        if "c10d" in func.namespace and not name.endswith(WITHOUT_BYTES):
            if name not in COLLECTIVES:
                raise WrongResultError(
                    f"the bytes of a collective must be known, got {name}; add it to COLLECTIVES."
                )
            kind, place = COLLECTIVES[name]
            handed = sum(t.nbytes for t in tree_leaves(args[place]) if isinstance(t, Tensor))
            self.traffic = self.traffic._replace(**{kind: getattr(self.traffic, kind) + handed})
            self.calls += 1
        return func(*args, **(kwargs or {}))


# of struct tcp_info: bytes sent, and how many of them were sent again, for a segment that was late
_BYTES_SENT = struct.Struct("=200xQQ")


def sent() -> int | None:
    """Bytes that this process's TCP sockets have sent so far; None where the kernel does not say."""
    folder = Path("/proc/self/fd")
    if not (folder.exists() and hasattr(socket, "TCP_INFO")):
        return None
    total = 0
    for name in os.listdir(folder):
        try:
            if not os.readlink(folder / name).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as found:
                known = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
        except OSError:
            # closed meanwhile, or a socket of another kind
            continue
        if len(known) < _BYTES_SENT.size:
            return None
        once_and_again, again = _BYTES_SENT.unpack_from(known)
        total += once_and_again - again
    return total


def settled() -> int | None:
    """The same once nothing is under way."""
    before = sent()
    while before is not None:
        time.sleep(0.02)
        after = sent()
        if after == before:
            break
        before = after
    return before


class Count(NamedTuple):
    """What one process handed in and sent during a call."""

    traffic: Traffic
    calls: int
    sent: int | None

    @staticmethod
    def read(values: Sequence[Any]) -> Count:
        """From JSON."""
        return Count(Traffic(*values[0]), *values[1:])


def counted(step: Callable[[], object], *, on_wire: bool = False) -> Count:
    """Counts what a call hands in and, where asked and known, what it sends."""
    counter = Counter()
    before = settled() if on_wire else None
    with counter:
        step()
    after = settled() if on_wire else None
    on_sockets = None if before is None or after is None else after - before
    return Count(counter.traffic, counter.calls, on_sockets)


def hidden(count: Count, ranks: int) -> str:
    """What is wrong with bytes on the wire, if the bytes handed in do not explain them."""
    if count.sent is None:
        return ""
    ideal = count.traffic.gloo(ranks)
    # each message has a header, and is of at most 1 MiB; parts of a tensor are rounded to entries
    messages = count.calls + count.traffic.handed / 2**20
    rounded = 16 * ranks * messages
    if ideal - rounded <= count.sent <= ideal + rounded + 640 * (ranks - 1) * messages:
        return ""
    return (
        f"the bytes on the wire must be {ideal:,.0f} and headers, got {count.sent:,}; count the collective "
        "that sent the rest."
    )


# what is trained


class Block(nn.Module):
    """The feed-forward half of a transformer's layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Adds what it computes."""
        return hidden + self.down(torch.relu(self.up(hidden)))


class Net(nn.Module):
    """Rows of every tensor divide evenly among 2, 4 and 8 ranks, so that no shard is padded."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        width = max(16, 8 * round((numel / (8 + 8 * BLOCKS)) ** 0.5 / 8))
        self.vocabulary = 4 * width
        self.embeddings = nn.Embedding(self.vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(BLOCKS))
        self.head = nn.Linear(width, self.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of guessing each token's successor in the row."""
        hidden = self.embeddings(tokens[:, :-1])
        for block in self.blocks:
            hidden = block(hidden)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1).float(), tokens[:, 1:].flatten())


@dataclass(frozen=True)
class Method:
    """One way to train.

    Args:
        policy: of ours; None for torch's fused AdamW.
    """

    name: str
    parallel: Parallel
    policy: Bernoulli | TopK | None = None

    @property
    def statistic(self) -> Statistic:
        """By which it selects."""
        if not isinstance(self.policy, TopK):
            return ""
        return "squares" if isinstance(self.policy.statistic, SquaredGradient) else "signed"

    @property
    def density(self) -> float:
        """The share of entries that it trains."""
        if isinstance(self.policy, Bernoulli):
            return self.policy.keep
        return self.policy.density if self.policy else 1.0

    def predicted(self, phase: str, **numbers: Any) -> Traffic:
        """What it hands to collectives."""
        scope = self.policy.scope if isinstance(self.policy, TopK) else "global"
        return predicted(
            self.parallel, phase, density=self.density, statistic=self.statistic, scope=scope, **numbers
        )

    def optimizer(self, model: nn.Module, backend: str, *, releases: bool) -> torch.optim.Optimizer:
        """Of a model that is sharded already, but not wrapped."""
        if self.policy is None:
            return torch.optim.AdamW(model.parameters(), fused=True, weight_decay=0.0, **SETTINGS)
        return MaskedAdamW(
            model.named_parameters(), policy=self.policy, release_gradients=releases, weight_decay=0.0,
            unselected="zero_grad" if isinstance(self.policy, Bernoulli) else "frozen", backend=backend,
            **SETTINGS,
        )  # fmt: skip


def _top(statistic: SignedGradient | SquaredGradient, scope: Scope = "global") -> TopK:
    return TopK(DENSITY, statistic, scope=scope, schedule=Schedule(observe=OBSERVE))


METHODS = (
    Method(BASELINE, "ddp"),
    Method("DDP, Bernoulli, keep 30 %", "ddp", Bernoulli(0.3)),
    Method("DDP, TopK, 1 %", "ddp", _top(SquaredGradient())),
    Method("released, TopK, 1 %", "released", _top(SignedGradient())),
    Method("released, TopK, 1 %, squares", "released", _top(SquaredGradient())),
    Method(SHARDED, "fsdp"),
    Method("FSDP2, TopK, 1 %", "fsdp", _top(SquaredGradient())),
    Method("FSDP2, TopK, 1 %, in each tensor", "fsdp", _top(SquaredGradient(), "tensor")),
)


METHOD = {method.name: method for method in METHODS}


class Place(NamedTuple):
    """Of a process."""

    rank: int
    ranks: int
    device: torch.device
    backend: str


class Trainer:
    """One method on one model, in a group of processes, or alone with the batches of all of them.

    Args:
        model: is copied.
    """

    def __init__(
        self, method: Method, model: Net, place: Place, *, micro_batches: int = 1, alone: bool = False
    ) -> None:
        self.place, self.micro_batches, self.alone, self.steps = place, micro_batches, alone, 0
        self.net = self.wrapped = copy.deepcopy(model)
        shared = not alone
        if shared and method.parallel == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(place.device.type, (place.ranks,))
            for part in (*self.net.blocks, self.net):
                fully_shard(part, mesh=mesh)
        releases = shared and method.parallel == "released"
        self.optimizer: Any = method.optimizer(self.net, place.backend, releases=releases)
        if releases:
            with warnings.catch_warnings():
                # that everything is masked, so that there is nothing to wrap
                warnings.simplefilter("ignore")
                self.optimizer.gradient_release.exclude_from_ddp(self.net)
        elif shared and method.parallel == "ddp":
            self.wrapped = nn.parallel.DistributedDataParallel(self.net)
            # in its second pass it tells the others, once and for all, in what order gradients arrive
            for _ in range(2):
                self.wrapped(self._batch(place.rank)).backward()

    def step(self) -> None:
        """One whole training step."""
        self.optimizer.zero_grad()
        own = [self.place.rank] if not self.alone else range(self.place.ranks)
        batches = [self._batch(rank) for rank in own]
        if self.alone:
            self.wrapped(torch.cat(batches)).backward()
        else:
            parts = batches[0].chunk(self.micro_batches)
            for number, part in enumerate(parts):
                with self._syncing(number + 1 == len(parts)):
                    (self.wrapped(part) / len(parts)).backward()
        self.optimizer.step()
        self.steps += 1

    def _syncing(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel) and not is_last:
            no_sync: contextlib.AbstractContextManager[Any] = self.wrapped.no_sync()
            return no_sync
        return contextlib.nullcontext()

    def _batch(self, rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.steps + rank)
        return torch.randint(self.net.vocabulary, (2, TOKENS), generator=generator).to(self.place.device)

    def weights(self) -> list[Tensor]:
        """Whole tensors; every process has to ask."""
        return [
            p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in self.net.parameters()
        ]


def sizes(model: Net) -> dict[str, int]:
    """What `predicted` asks of a model."""
    blocks = sum(p.numel() for p in model.blocks.parameters())
    weights = [p.numel() for p in model.parameters()]
    return {"weights": sum(weights), "tensors": len(weights), "root": sum(weights) - blocks}


# what each process runs


def trained(method: Method, place: Place, *, micro_batches: int, dtype: torch.dtype) -> tuple[str, Any]:
    """Trains a small model in the group, and alone on all batches: what is wrong, if anything, and what was
    counted meanwhile. Rounding in bfloat16 depends on the order of a sum, so there only bytes are looked at.
    """
    torch.manual_seed(0)
    model = Net(SMALL).to(place.device, dtype)
    before = [p.detach().clone() for p in model.parameters()]
    together = Trainer(method, model, place, micro_batches=micro_batches)
    counts = count_phases(together, on_wire=False)
    asked = sizes(model) | {"element": dtype.itemsize, "micro_batches": micro_batches}
    problem = ""
    if dtype == torch.float32:
        alone = Trainer(method, model, place, alone=True)
        together.step()
        for _ in range(together.steps):
            alone.step()
        problem = differing(method.name, together.weights(), alone.weights(), before)
    return problem, (method.name, asked, counts)


def differing(name: str, together: list[Tensor], alone: list[Tensor], before: list[Tensor]) -> str:
    """What is wrong with the weights of this process; every process has to ask."""
    pairs = zip(together, alone, strict=True)
    off = max(float((mine - truth).abs().max()) for mine, truth in pairs)
    moved = max(float((mine - start).abs().max()) for mine, start in zip(together, before, strict=True))
    if not alike(together):
        return f"{name}: ranks must hold the same weights, got different ones."
    if not off <= TOLERANCE or not moved > 100 * TOLERANCE:
        return (
            f"{name}: weights must be those of one process within {TOLERANCE:g} and move, got {off:.2g} off "
            f"after moving by {moved:.2g}."
        )
    return ""


def alike(weights: list[Tensor]) -> bool:
    """Whether all processes hold the same bits."""
    sha = hashlib.sha256()
    for tensor in weights:
        sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, sha.hexdigest())
    return len(set(digests)) == 1


def count_phases(trainer: Trainer, *, on_wire: bool) -> dict[str, Count]:
    """The first steps of a trainer, one a phase."""
    found = {}
    for phase in PHASES:
        dist.barrier()
        found[phase] = counted(trainer.step, on_wire=on_wire)
    return found


@dataclass(frozen=True)
class Task:
    """What a group of processes is asked."""

    numel: int
    seconds: float
    only: str
    backend: str

    def methods(self) -> list[Method]:
        """Those whose rows are wanted, and the baseline."""
        ours = [m for m in METHODS if self.backend or m.policy is None]
        return [m for m in ours if m.name == BASELINE or self.only in m.name.lower()]


def examine(place: Place, task: Task) -> dict[str, Any]:
    """Gates, counts and timings of all methods in this process."""
    show = place.rank == 0
    gloo = place.device.type == "cpu"
    problems, counts = [], []
    trainers: dict[str, Trainer] = {}
    torch.manual_seed(0)
    model = Net(task.numel).to(place.device)
    text = f"{place.ranks} processes"
    for method in _shown(task.methods(), f"{text}: gates and bytes", show):
        for micro_batches, dtype in ((2, torch.float32), (1, torch.bfloat16)):
            problem, count = trained(method, place, micro_batches=micro_batches, dtype=dtype)
            problems.append(problem)
            counts.append(count)
        trainer = trainers[method.name] = Trainer(method, model, place)
        counts.append((method.name, sizes(model), count_phases(trainer, on_wire=gloo)))
    problems = [problem for problem in problems if problem]
    seconds: dict[str, list[float]] = {}
    failed = torch.tensor(len(problems), device=place.device)
    dist.all_reduce(failed)
    if not failed:
        seconds = timed(trainers, place, task.seconds, show)
        for name, trainer in trainers.items():
            if not alike(trainer.weights()):
                problems.append(f"{name}: ranks must hold the same weights after the last step, got others.")
    return {"problems": problems, "counts": counts, "seconds": seconds}


def _shown(items: Iterable[T], text: str, show: bool) -> Iterable[T]:
    # one bar, not one for each process
    return progress(items, text) if show else items


def timed(trainers: dict[str, Trainer], place: Place, seconds: float, show: bool) -> dict[str, list[float]]:
    """Interleaved rounds, in an order that all processes share."""

    def one(trainer: Trainer) -> float:
        dist.barrier()
        started = time.perf_counter()
        trainer.step()
        if place.device.type == "cuda":
            torch.cuda.synchronize(place.device)
        return time.perf_counter() - started

    # what compiles and allocates at its first call has done so while bytes were counted
    per_round = torch.tensor(sum(one(trainer) for trainer in trainers.values()), dtype=torch.float64)
    per_round = per_round.to(place.device)
    dist.all_reduce(per_round, dist.ReduceOp.MAX)
    fewest = FEWEST_ROUNDS if seconds >= 1 else 1
    rounds = max(fewest, min(MOST_ROUNDS, int(seconds / float(per_round))))
    order = random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in _shown(range(rounds), f"{place.ranks} processes: {rounds} rounds", show):
        for name in order.sample(list(trainers), len(trainers)):
            found[name].append(one(trainers[name]))
    return found


# groups of processes


def threads_of(ranks: int) -> int:
    """The share of each process in the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks)


def _enter(rank: int, ranks: int, device: str, folder: str, program: bytes) -> None:
    """A process of a group: what the program returns is left in a file."""
    run: Callable[[int, torch.device], object] = pickle.loads(program)
    own = torch.device("cuda", rank) if device == "cuda" else torch.device("cpu")
    if own.type == "cuda":
        torch.cuda.set_device(own)
    torch.set_num_threads(threads_of(ranks))
    dist.init_process_group(
        "nccl" if own.type == "cuda" else "gloo",
        # a file, so that every TCP socket of the process is gloo's
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=120),
    )
    try:
        answer = run(rank, own)
        Path(folder, f"{rank}.json").write_text(json.dumps(answer))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def in_processes(ranks: int, device: str, run: Callable[[int, torch.device], object]) -> list[Any]:
    """What a function returns in each process of a new group, through JSON.

    Args:
        run: is given the rank and the device; it has to be pickled.
    """
    start = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    if start == "forkserver":
        # what a process spends its first seconds on, loaded once for all of them
        multiprocessing.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "sparse_optim"])
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _enter, (ranks, device, folder, pickle.dumps(run)), nprocs=ranks, start_method=start
        )
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


def _work(ranks: int, task: Task, rank: int, device: torch.device) -> dict[str, Any]:
    return examine(Place(rank, ranks, device, task.backend), task)


def check(answers: Sequence[dict[str, Any]], ranks: int) -> None:
    """Refuses what a group of processes found wrong, and bytes that are not those predicted.

    Raises:
        WrongResultError: with the first reason.
    """
    for rank, answer in enumerate(answers):
        for problem in answer["problems"]:
            raise WrongResultError(f"rank {rank} of {ranks}, {problem}")
        for name, asked, phases in answer["counts"]:
            for phase, values in phases.items():
                count, expected = Count.read(values), METHOD[name].predicted(phase, ranks=ranks, **asked)
                where = f"rank {rank} of {ranks}, {name}, a step that {phase}, {asked}"
                if count.traffic != expected:
                    raise WrongResultError(
                        f"{where}: the bytes handed in must be the predicted {expected}, got "
                        f"{count.traffic}; correct whichever is wrong."
                    )
                problem = hidden(count, ranks)
                if problem:
                    raise WrongResultError(f"{where}: {problem}")


def records_of(answers: Sequence[dict[str, Any]], ranks: int, backend: str) -> list[Record]:
    """One row a method, of answers that have passed the check."""
    # a step is as slow as the slowest of its processes
    seconds = {
        name: [max(times) for times in zip(*(answer["seconds"][name] for answer in answers), strict=True)]
        for name in answers[0]["seconds"]
    }
    # of each method the last count is that of the size which is timed
    last = [{name: (asked, phases) for name, asked, phases in answer["counts"]} for answer in answers]
    records = []
    for name, times in seconds.items():
        method, (asked, phases) = METHOD[name], last[0][name]
        low, middle, high = quantiles(times)
        sent = [Count.read(found[name][1]["trains"]).sent for found in last]
        records.append(
            Record(
                "distributed",
                f"{ranks} processes",
                name,
                asked["weights"],
                "float32",
                backend if method.policy else "",
                method.density,
                ms=1000 * middle,
                ms_20=1000 * low,
                ms_80=1000 * high,
                samples=len(times),
                times_as_fast_as="; ".join(
                    f"{peer}: {ratio(seconds[peer], times):.3g}"
                    for peer in (BASELINE, SHARDED)
                    if peer in seconds
                    and peer != name
                    and name != BASELINE
                    and METHOD[peer].parallel in ("ddp", method.parallel)
                ),
                processes=ranks,
                sent=max((value for value in sent if value is not None), default=None),
                threads=threads_of(ranks),
                **_bytes([Count.read(phases[phase]).traffic for phase in PHASES], ranks),
            )
        )
    return records


def _bytes(phases: Sequence[Traffic], ranks: int) -> dict[str, Any]:
    observes, selects, trains = phases
    return {
        "handed": trains.handed,
        "ring": trains.ring(ranks),
        "ring_observing": observes.ring(ranks),
        "ring_selecting": selects.ring(ranks),
    }


def measured(ranks: int, options: Options) -> list[Record]:
    """The rows of one group of processes.

    Raises:
        WrongResultError: where one is wrong; then none of them is worth having.
    """
    task = Task(
        options.numel or NUMEL, options.seconds, options.only.lower(), next(iter(options.backends), "")
    )
    device = options.device.type
    if device == "cuda" and torch.cuda.device_count() < ranks:
        note = f"needs {ranks} GPUs, got {torch.cuda.device_count()}"
        return [
            Record("distributed", f"{ranks} processes", method.name, task.numel, "float32", note=note)
            for method in task.methods()
        ]
    answers = in_processes(ranks, device, functools.partial(_work, ranks, task))
    check(answers, ranks)
    return records_of(answers, ranks, task.backend)


# on paper


class OnPaper(NamedTuple):
    """A model that nobody has run here."""

    weights: int
    tensors: int
    root: int  # weights of embeddings, head and last norm


# Llama 2
PAPER = {
    "7B": OnPaper(6_738_415_616, 291, 2 * 32_000 * 4096 + 4096),
    "70B": OnPaper(68_976_648_192, 723, 2 * 32_000 * 8192 + 8192),
}


def on_paper(methods: Sequence[Method]) -> list[Record]:
    """Bytes of one process and step as predicted, with weights and gradients in bfloat16."""
    return [
        Record(
            "distributed",
            f"on paper, {name} weights",
            method.name,
            model.weights,
            "bfloat16",
            density=method.density,
            processes=ranks,
            assumed_gb_per_s=ASSUMED_GB_PER_S,
            note="predicted, not measured",
            **_bytes(
                [
                    method.predicted(phase, ranks=ranks, element=BFLOAT16, **model._asdict())
                    for phase in PHASES
                ],
                ranks,
            ),
        )
        for name, model in PAPER.items()
        for method in methods
        for ranks in PAPER_RANKS
    ]


def show(records: Sequence[Record]) -> None:
    """Prints what was measured in one group of processes."""
    print(f"\n{records[0].question}, {records[0].parameters:,} weights, bytes a process and step", end="")
    print(
        f"\n{'':<34} {'handed in':>12} {'a ring sends':>12} {'sent':>12} {'observing':>12} {'selecting':>12}"
    )
    for record in records:
        if record.ms is None:
            print(f"  {record.row:<32} {record.note}")
            continue
        columns = [record.handed, record.ring, record.sent, record.ring_observing, record.ring_selecting]
        print(
            f"  {record.row:<32}"
            + "".join(f" {'-' if value is None else format(value, ',.0f'):>12}" for value in columns)
        )
        print(
            f"  {'':<32} {record.ms:9.3f} ms ({record.ms_20:.3f} - {record.ms_80:.3f})"
            + (f", times as fast as {record.times_as_fast_as}" if record.times_as_fast_as else "")
        )


def show_paper(records: Sequence[Record]) -> None:
    """Prints what the formulas say of one model."""
    first = records[0]
    print(
        f"\n{first.question}, {first.dtype}: GB that a ring sends a process and step, and ms at an assumed "
        f"{ASSUMED_GB_PER_S:g} GB/s"
    )
    print(f"{'':<34}" + "".join(f"{f'{ranks:,} ranks':>22}" for ranks in PAPER_RANKS))
    for name in dict.fromkeys(record.row for record in records):
        rows = [record for record in records if record.row == name]
        trains = [_on_link(record.ring) for record in rows]
        selects = [_on_link(record.ring_selecting) for record in rows]
        print(f"  {name:<32}" + "".join(f"{cell:>22}" for cell in trains))
        if selects != trains:
            print(f"  {'':<4}{'the step that selects':<28}" + "".join(f"{cell:>22}" for cell in selects))


def _on_link(sent: float | None) -> str:
    value = sent or 0.0
    return f"{value / 1e9:,.1f} GB, {value / ASSUMED_GB_PER_S / 1e6:,.0f} ms"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures groups of 2 and 4 processes, checks the formulas, and says what they mean for large models."""
    options = parse((__doc__ or "").splitlines()[0], arguments)
    records = []
    try:
        for ranks in RANKS[:1] if options.quick else RANKS:
            rows = measured(ranks, options)
            show(rows)
            records += rows
    except WrongResultError as error:
        sys.exit(f"wrong, nothing is kept: {error}")
    if any(record.ms is not None for record in records):
        paper = on_paper([METHOD[record.row] for record in records if record.processes == RANKS[0]])
        for question in dict.fromkeys(record.question for record in paper):
            show_paper([record for record in paper if record.question == question])
        records += paper
    keep("distributed", records, options, QUESTIONS)


if __name__ == "__main__":
    # by its name, under which processes find its functions
    from benchmarks import distributed

    distributed.main()
