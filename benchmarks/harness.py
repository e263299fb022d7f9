"""Times competing formulations of one step against a plain copy, interleaved in one process.

A *question* is a list of rows that do the same work on the same weights. In every round each row runs once,
in an order drawn anew: a machine that slows down slows all of them, and ratios are medians over the rounds.
Every row states the bytes that its ideal implementation moves; its bandwidth is that number over the measured
time, whatever it moved.

On a GPU a step is timed by two events on an idle stream, so that the time in which the host prepares its
launches counts as well as the time in which they run.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import importlib.metadata
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparse_optim import backends

RESULTS = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).parents[1]
# a row slower than this runs in one round only: np.percentile of 1e9 scores takes many seconds
SLOW_SECONDS = 4.0
# a first call slower than this counts as the measurement; below, it may have been the import of a compiler
ENDLESS_SECONDS = 15.0
MOST_ROUNDS = 50
FEWEST_ROUNDS = 5
COPY = "plain copy"
QUICK_NUMEL = 5_000
# Triton's kernels then run on the CPU, a thousand times slower: a rehearsal, whose results are not kept
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

Step = Callable[[], object]
T = TypeVar("T")


class UnavailableError(RuntimeError):
    """What a row needs, a package say, is not on this machine; the message is the whole note."""


class WrongResultError(RuntimeError):
    """A row computes something else than it should."""


@dataclass(frozen=True)
class Faster:
    """A row must be at least `factor` times as fast as the fastest of `peers`."""

    factor: float
    peers: tuple[str, ...]

    def __str__(self) -> str:
        peers = " or ".join(self.peers)
        if self.factor == 1:
            return f"no slower than {peers}"
        if self.factor < 1:
            return f"at most {1 / self.factor:.3g} x the time of {peers}"
        return f"at least {self.factor:.3g} x as fast as {peers}"

    def judge(self, row: str, results: _Results) -> tuple[str, bool] | None:
        """What was reached, and whether that suffices."""
        own = results.timings[row].seconds
        ratios = [ratio(results.timings[peer].seconds, own) for peer in self.peers if peer in results.timings]
        if not ratios:
            return None
        reached = min(ratios)
        shown = f"{1 / reached:.3g} x the time" if self.factor < 1 else f"{reached:.3g} x as fast"
        return shown, reached >= self.factor


@dataclass(frozen=True)
class OfCopy:
    """A row must reach this share of the bandwidth of a plain copy."""

    percent: float

    def __str__(self) -> str:
        return f"at least {self.percent:.3g} % of a copy"

    def judge(self, row: str, results: _Results) -> tuple[str, bool] | None:
        """What was reached, and whether that suffices."""
        reached = results.percent_of_copy(row)
        return None if reached is None else (f"{reached:.3g} %", reached >= self.percent)


@dataclass(frozen=True)
class ScratchBelow:
    """A row must need less memory than this beyond what it is given and what it returns."""

    mib: float

    def __str__(self) -> str:
        return f"scratch under {self.mib:.3g} MiB"

    def judge(self, row: str, results: _Results) -> tuple[str, bool] | None:
        """What was reached, and whether that suffices."""
        scratch = results.timings[row].scratch_bytes
        if scratch is None:
            return None
        return f"{scratch / 2**20:.3g} MiB", scratch < self.mib * 2**20


@dataclass(frozen=True)
class Row:
    """One formulation of a step.

    Args:
        name: what runs.
        ideal_bytes: the bytes that the ideal implementation of this row moves.
        make: sets up and returns the step that is timed, or that step and one that prepares it off the clock.
        check: returns what is wrong with this row's results on a small problem, or None; called first.
        bars: what this row has to reach.
        peers: rows with which it is compared; by default the question's anchor.
        backend: of ours; empty for what others wrote.
        density: share of entries that the step updates or returns.
        measures_scratch: whether to measure what the step allocates and gives back.
        threads: of torch, while the step runs; 0 leaves them as they are.
        calls: how often a measurement calls the step; more than once where it takes microseconds.
    """

    name: str
    ideal_bytes: float
    make: Callable[[], Step | tuple[Step, Step]]
    check: Callable[[], str | None] | None = None
    bars: tuple[Faster | OfCopy | ScratchBelow, ...] = ()
    peers: tuple[str, ...] = ()
    backend: str = ""
    density: float | None = None
    measures_scratch: bool = False
    threads: int = 0
    calls: int = 1


@dataclass(frozen=True)
class Record:
    """One row of the results, and of the CSV. Where it ran stands in the last columns."""

    script: str
    question: str
    row: str
    parameters: int
    dtype: str
    backend: str = ""
    density: float | None = None
    ideal_bytes: float | None = None
    ms: float | None = None
    ms_20: float | None = None
    ms_80: float | None = None
    samples: int = 0
    gb_per_s: float | None = None
    percent_of_copy: float | None = None
    times_as_fast_as: str = ""
    scratch_bytes: float | None = None
    # memory.py: bytes per parameter
    weights: float | None = None
    gradients: float | None = None
    states: float | None = None
    masks: float | None = None
    step_peak: float | None = None
    peak: float | None = None
    # distributed.py: bytes of one process and step; those without another word in a step that trains
    processes: int | None = None
    handed: float | None = None
    ring: float | None = None
    ring_observing: float | None = None
    ring_selecting: float | None = None
    sent: float | None = None
    assumed_gb_per_s: float | None = None
    # deltas.py: a file, and the entries or values in it
    file_bytes: int | None = None
    changed: int | None = None
    bars: str = ""
    reached: str = ""
    met: str = ""
    note: str = ""
    machine: str = ""
    device: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    python: str = ""
    threads: int = 0
    load_before: float | None = None
    commit: str = ""
    command: str = ""


@dataclass
class _Timing:
    row: Row
    step: Step
    before: Step | None
    seconds: list[float] = field(default_factory=list)
    scratch_bytes: int | None = None


@dataclass(frozen=True)
class _Results:
    timings: dict[str, _Timing]

    def percent_of_copy(self, row: str) -> float | None:
        if COPY not in self.timings:
            return None
        speeds = [
            t.row.ideal_bytes / quantiles(t.seconds)[1] for t in (self.timings[row], self.timings[COPY])
        ]
        return 100 * speeds[0] / speeds[1]


def measure(
    script: str,
    question: str,
    rows: Sequence[Row],
    *,
    parameters: int,
    anchor: str,
    device: torch.device,
    seconds: float,
    dtype: str = "float32",
    only: str = "",
) -> list[Record]:
    """Checks and times the rows of one question.

    Args:
        rows: one of them is the plain copy.
        anchor: the row with which rows are compared.
        seconds: roughly how long to measure, set-up and slow rows not counted.
        only: a part of the names of the rows that are wanted; the copy and the anchor always run.
    """
    rows = [row for row in rows if row.name in (COPY, anchor) or only.lower() in row.name.lower()]
    if {row.name for row in rows} <= {COPY, anchor} and only:
        return []
    notes: dict[str, str] = {}
    timings: dict[str, _Timing] = {}
    for row in progress(rows, f"{question}: set up"):
        made = _set_up(row, device)
        if isinstance(made, str):
            notes[row.name] = made
        else:
            timings[row.name] = made

    lively = [timing for timing in timings.values() if timing.seconds[0] <= SLOW_SECONDS]
    per_round = sum(timing.seconds[0] * timing.row.calls for timing in lively)
    fewest = FEWEST_ROUNDS if seconds >= 1 else 1
    rounds = max(fewest, min(MOST_ROUNDS, int(seconds / per_round))) if lively else 0
    order = random.Random(0)
    for _ in progress(range(rounds), f"{question}: {rounds} rounds"):
        for timing in order.sample(lively, len(lively)):
            timing.seconds.append(_time(timing, device))
    for timing in lively:
        # taken during set-up, not interleaved
        del timing.seconds[0]
    results = _Results(timings)
    return [_record(script, question, row, anchor, results, notes, parameters, dtype) for row in rows]


def _set_up(row: Row, device: torch.device) -> _Timing | str:
    """A row that has run twice, or why it cannot be timed: it stays visible as a line of the table."""
    try:
        problem = row.check() if row.check else None
        if problem:
            raise WrongResultError(problem)
        made = row.make()
        step, before = made if isinstance(made, tuple) else (made, None)
        timing = _Timing(row, step, before)
        # the first call compiles and allocates
        first = _time(timing, device)
        timing.seconds.append(first if first > ENDLESS_SECONDS else _time(timing, device))
        if row.measures_scratch and first <= ENDLESS_SECONDS:
            if before:
                before()
            timing.scratch_bytes = scratch_bytes(step, device)
        return timing
    except WrongResultError as error:
        return f"wrong, not measured: {error}"
    except UnavailableError as error:
        return str(error)
    except Exception as error:
        # the other rows are worth having all the same
        free(device)
        return failure(error, row.backend)


def _time(timing: _Timing, device: torch.device) -> float:
    calls = range(timing.row.calls)
    with on_threads(timing.row.threads):
        if timing.before:
            timing.before()
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            start.record()
            for _ in calls:
                timing.step()
            end.record()
            torch.cuda.synchronize(device)
            return start.elapsed_time(end) / 1000 / len(calls)
        started = time.perf_counter()
        for _ in calls:
            timing.step()
        return (time.perf_counter() - started) / len(calls)


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Runs the block on so many of torch's threads; 0 leaves them as they are."""
    if not count:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def free(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def balance(step: Callable[[], object], device: torch.device) -> tuple[int, int, object]:
    """The bytes that are held after a call and were not before, the most that were held meanwhile, and what
    the call returns.
    """
    # what others have left is not to be freed meanwhile
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = step()
        torch.cuda.synchronize(device)
        most = torch.cuda.max_memory_allocated(device)
        return torch.cuda.memory_allocated(device) - before, most - before, result
    # every allocation and release of torch's allocator, in order
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = step()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    kept = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        kept += event.nbytes()
        most = max(most, kept)
    return kept, most, result


def extra_bytes(step: Step, device: torch.device) -> tuple[int, object]:
    """The most memory that a step holds beyond what was held before it, and what the step returns."""
    _, most, result = balance(step, device)
    return most, result


def scratch_bytes(step: Step, device: torch.device) -> int:
    """The most memory that a step holds beyond what was held before it and what it returns."""
    most, result = extra_bytes(step, device)
    # what an allocation on a GPU takes is a multiple of this
    grain = 512 if device.type == "cuda" else 1
    returned = sum(-(-size // grain) * grain for size in storages(result).values())
    return max(0, most - returned)


def storages(*values: Any) -> dict[int, int]:
    """Bytes of every storage that tensors in these values hold, by address; lists, dicts and wrappers too."""
    found: dict[int, int] = {}
    for value in values:
        if isinstance(value, dict):
            found |= storages(*value.values())
        elif isinstance(value, list | tuple):
            found |= storages(*value)
        elif isinstance(value, Tensor) and hasattr(type(value), "__tensor_flatten__"):
            # quantised states are wrappers around the tensors that hold their codes
            names, _ = value.__tensor_flatten__()
            found |= storages(*(getattr(value, name) for name in names))
        elif isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _record(
    script: str,
    question: str,
    row: Row,
    anchor: str,
    results: _Results,
    notes: dict[str, str],
    parameters: int,
    dtype: str,
) -> Record:
    base = Record(
        script,
        question,
        row.name,
        parameters,
        dtype,
        row.backend,
        row.density,
        row.ideal_bytes,
        bars="; ".join(map(str, row.bars)),
        note=notes.get(row.name, ""),
        threads=row.threads,
    )
    timings = results.timings
    if row.name not in timings:
        return base
    seconds = timings[row.name].seconds
    low, middle, high = quantiles(seconds)
    compared = () if row.name == COPY else row.peers or (anchor,)
    verdicts = [bar.judge(row.name, results) for bar in row.bars]
    known = {
        "ms": 1000 * middle,
        "ms_20": 1000 * low,
        "ms_80": 1000 * high,
        "samples": len(seconds),
        "gb_per_s": row.ideal_bytes / middle / 1e9,
        "percent_of_copy": results.percent_of_copy(row.name),
        "times_as_fast_as": "; ".join(
            f"{name}: {ratio(timings[name].seconds, seconds):.3g}"
            for name in compared
            if name in timings and name != row.name
        ),
        "scratch_bytes": timings[row.name].scratch_bytes,
        "reached": "; ".join("?" if verdict is None else verdict[0] for verdict in verdicts),
        "met": "; ".join("?" if verdict is None else "yes" if verdict[1] else "no" for verdict in verdicts),
    }
    return Record(**(asdict(base) | known))


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """How many times as fast the second is: the median over the rounds that both ran."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=False))


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[round(0.2 * last)], statistics.median(ordered), ordered[round(0.8 * last)]


def failure(error: Exception, backend: str) -> str:
    """What the table says of a row that raised; a backend of ours may lack memory, and nothing else."""
    if not backend or isinstance(error, torch.OutOfMemoryError):
        return first_line(error)
    traceback.print_exception(error)
    return f"failed, not measured: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """An error in one line of a table."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def progress(items: Iterable[T], text: str) -> Iterable[T]:
    """The items under a progress bar, or after a line of text where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        print(text, file=sys.stderr, flush=True)
        return items
    return tqdm(items, desc=text, leave=False, ncols=100)


# what the scripts have in common


@dataclass(frozen=True)
class Options:
    """What a script was asked for."""

    device: torch.device
    numel: int | None
    quick: bool
    only: str
    backends: tuple[str, ...]
    seconds: float
    output: Path | None
    commit: str = ""
    load: float = 0.0


def parse(description: str, arguments: Sequence[str] | None) -> Options:
    """The command line of a script that measures."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--numel", type=lambda text: int(float(text)), help="entries, roughly; 1e9, say")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; nothing is kept without --output")
    parser.add_argument("--rows", default="", help="only rows whose name contains this; likewise")
    parser.add_argument("--backend", default="", help="measure this one; default: the accelerated ones")
    parser.add_argument("--seconds", type=float, help="measuring time per question; default 10 (CPU: 20)")
    parser.add_argument("--output", type=Path, help="the CSV; default: benchmarks/results/<machine>.csv")
    parser.add_argument("--commit", default="", help="what to call this version where git is not at hand")
    given = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    if given.device == "cuda" and not cuda:
        parser.error("--device cuda needs a GPU that torch can use, got none; use --device cpu.")
    device = torch.device("cuda" if given.device != "cpu" and cuda else "cpu")
    output = given.output
    if output is None and not given.quick and not given.rows and not INTERPRETED:
        output = results_path(device)
    usual = 0.2 if given.quick else 10.0 if device.type == "cuda" else 20.0
    seconds = usual if given.seconds is None else given.seconds
    numel = given.numel or (QUICK_NUMEL if given.quick else None)
    wanted = _wanted(given.backend, device)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return Options(device, numel, given.quick, given.rows, wanted, seconds, output, given.commit, load)


def _wanted(backend: str, device: torch.device) -> tuple[str, ...]:
    """The backends to measure. One that cannot run here is a line of text, no failure."""
    available = backends.available(device)
    if not backend:
        return tuple(name for name in available if name != "reference") or available
    if backend in available:
        return (backend,)
    reason = backends.why_not(backend, device) if backend in backends.NAMES else "there is no such backend"
    print(f"backend {backend} is not measured: {reason}")
    return ()


def keep(script: str, records: Sequence[Record], options: Options, questions: Sequence[str]) -> None:
    """Puts the records of a question into the file of results.

    Args:
        questions: all that this script asks; rows of others in the file are from an older version of it.
    """
    shared = surroundings(options.device)
    shared |= {"commit": options.commit or shared["commit"], "load_before": options.load}
    records = [
        Record(**(asdict(record) | shared | ({"threads": record.threads} if record.threads else {})))
        for record in records
    ]
    if options.output is not None and records:
        kept = read_csv(options.output) if options.output.exists() else []
        measured = {record.question for record in records}
        kept = [
            row
            for row in kept
            if row["script"] != script or (row["question"] in questions and row["question"] not in measured)
        ]
        write_csv([*kept, *records], options.output)
        where = options.output.resolve()
        shown = where.relative_to(REPOSITORY) if where.is_relative_to(REPOSITORY) else options.output
        print(f"\n{shown}: {len(records)} rows of {script}")


def finish(records: Sequence[Record]) -> None:
    """Exits with an error if a result was wrong or a backend failed."""
    bad = [record.row for record in records if record.note.startswith(("wrong", "failed"))]
    if bad:
        sys.exit(f"wrong or failed, not measured: {', '.join(bad)}")


def show(records: Sequence[Record]) -> None:
    """Prints the results of one question."""
    if not records:
        return
    first = records[0]
    print(f"\n{first.question}, {first.parameters:,} entries, {first.dtype}")
    for record in records:
        if record.ms is None:
            print(f"  {record.row:<52} {record.note}")
            continue
        print(
            f"  {record.row:<52} {record.ms:9.3f} ms ({record.ms_20:.3f} - {record.ms_80:.3f}) "
            f"{record.gb_per_s or 0:8.1f} GB/s {record.percent_of_copy or 0:5.0f} % of copy"
            + ("" if record.scratch_bytes is None else f"  scratch {record.scratch_bytes / 2**20:.3g} MiB")
        )
        if record.times_as_fast_as:
            print(f"  {'':<52} times as fast as {record.times_as_fast_as}")
        for bar, reached, met in verdicts(asdict(record)):
            print(f"  {'':<52} {bar}: {reached} ({met})")


def verdicts(row: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Every bar of a row with what was reached, and "met", "missed" or "no peer"."""
    if not row["bars"] or not row["met"]:
        return []
    words = {"yes": "met", "no": "missed", "?": "no peer"}
    columns = [row[name].split("; ") for name in ("bars", "reached", "met")]
    return [(bar, reached, words[met]) for bar, reached, met in zip(*columns, strict=True)]


# where it ran


def machine(device: torch.device) -> str:
    """The GPU's name, or the processor's with its number of cores; nothing that names this one machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        name = models.group(1).strip() if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def surroundings(device: torch.device) -> dict[str, Any]:
    """What a result depends on besides the code: the columns that every row shares."""
    driver = (
        _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.type == "cuda"
        else ""
    )
    try:
        triton = importlib.metadata.version("triton") + (" in its interpreter" if INTERPRETED else "")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    module = sys.modules["__main__"].__spec__
    return {
        "machine": machine(device),
        "device": device.type,
        "driver": driver or "none",
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "command": shlex.join(["python", "-m", module.name if module else "benchmarks", *sys.argv[1:]]),
    }


def _commit() -> str:
    commit = _output("git", "rev-parse", "--short", "HEAD")
    if not commit:
        return "unknown"
    # results that a later commit cannot reproduce must not carry a clean one; results themselves do not count
    changed = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    return commit + "+" if changed else commit


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().split("\n")[0]


def results_path(device: torch.device) -> Path:
    """Where the results of this machine are kept."""
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", machine(device).lower()).strip("-") + ".csv")


def write_csv(records: Sequence[Record | dict[str, str]], path: Path) -> None:
    """Writes all records, or leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [column.name for column in fields(Record)]
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", restval="")
        writer.writeheader()
        for record in records:
            values = record if isinstance(record, dict) else asdict(record)
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for k, v in values.items()}
            )
    # the temporary file is for its owner only
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a results file, as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
