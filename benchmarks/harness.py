"""Times competing formulations of one step against a plain copy, interleaved in one process.

A *question* is a list of rows that do the same work on the same weights. In every round each row runs once: a
machine that slows down slows all of them, and ratios are medians over the rounds. Every row states the bytes
that its ideal implementation moves; its bandwidth is that number over the measured time, whatever it moved.
"""

from __future__ import annotations

import csv
import gc
import importlib.metadata
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TypeVar

import torch

RESULTS = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).parents[1]
# a row slower than this runs in one round only: np.percentile of 1e9 scores takes many seconds
SLOW_SECONDS = 4.0
# a first call slower than this counts as the measurement; below, it may have been the import of a compiler
ENDLESS_SECONDS = 15.0
MOST_ROUNDS = 50
FEWEST_ROUNDS = 3

Step = Callable[[], object]
T = TypeVar("T")


@dataclass(frozen=True)
class Bar:
    """A row must be at least `factor` times as fast as the fastest of `peers`."""

    factor: float
    peers: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.factor:.3g} x {' or '.join(self.peers)}"


@dataclass(frozen=True)
class Row:
    """One formulation of a step.

    Args:
        name: what runs.
        ideal_bytes: the bytes that the ideal implementation of this row moves.
        make: sets up and returns the step that is timed, or that step and one that prepares it off the clock.
        check: returns what is wrong with this row's results on a small problem, or None; called first.
        bars: what this row has to reach.
    """

    name: str
    ideal_bytes: float
    make: Callable[[], Step | tuple[Step, Step]]
    check: Callable[[], str | None] | None = None
    bars: tuple[Bar, ...] = ()


@dataclass(frozen=True)
class Record:
    """One row of the results, and of the CSV."""

    question: str
    row: str
    parameters: int
    dtype: str
    ideal_bytes: float
    ms: float | None = None
    ms_20: float | None = None
    ms_80: float | None = None
    samples: int = 0
    gb_per_s: float | None = None
    percent_of_copy: float | None = None
    anchor: str = ""
    times_as_fast_as_anchor: float | None = None
    bars: str = ""
    reached: str = ""
    met: str = ""
    note: str = ""
    machine: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    python: str = ""
    threads: int = 0
    commit: str = ""
    command: str = ""


@dataclass
class _Timing:
    row: Row
    step: Step
    before: Step | None
    seconds: list[float] = field(default_factory=list)


def measure(
    question: str,
    rows: Sequence[Row],
    *,
    parameters: int,
    anchor: str,
    device: torch.device,
    seconds: float,
    dtype: str = "float32",
) -> list[Record]:
    """Checks and times the rows of one question.

    Args:
        rows: the first is the plain copy.
        anchor: the row with which every row is compared.
        seconds: roughly how long to measure, set-up and slow rows not counted.
    """
    notes: dict[str, str] = {}
    timings: dict[str, _Timing] = {}
    for row in progress(rows, f"{question}: set up"):
        try:
            problem = row.check() if row.check else None
            if problem:
                notes[row.name] = f"wrong, not timed: {problem}"
                continue
            made = row.make()
            step, before = made if isinstance(made, tuple) else (made, None)
            timing = _Timing(row, step, before)
            # the first call compiles and allocates
            first = _time(timing, device)
            timing.seconds.append(first if first > ENDLESS_SECONDS else _time(timing, device))
            timings[row.name] = timing
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            # what cannot run on this machine or is not built yet stays visible as a row
            notes[row.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            free(device)

    lively = [timing for timing in timings.values() if timing.seconds[0] <= SLOW_SECONDS]
    per_round = sum(timing.seconds[0] for timing in lively)
    rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(seconds / per_round))) if lively else 0
    for _ in progress(range(rounds), f"{question}: {rounds} rounds"):
        for timing in lively:
            timing.seconds.append(_time(timing, device))
    for timing in lively:
        # taken during set-up, not interleaved
        del timing.seconds[0]

    records = [
        _record(question, row, rows[0].name, anchor, timings, notes, parameters, dtype) for row in rows
    ]
    return records


def _time(timing: _Timing, device: torch.device) -> float:
    if timing.before:
        timing.before()
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        timing.step()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    timing.step()
    return time.perf_counter() - started


def free(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _record(
    question: str,
    row: Row,
    copy: str,
    anchor: str,
    timings: dict[str, _Timing],
    notes: dict[str, str],
    parameters: int,
    dtype: str,
) -> Record:
    base = Record(
        question,
        row.name,
        parameters,
        dtype,
        row.ideal_bytes,
        anchor=anchor,
        bars="; ".join(map(str, row.bars)),
        note=notes.get(row.name, ""),
    )
    if row.name not in timings:
        return base
    seconds = timings[row.name].seconds
    low, middle, high = quantiles(seconds)
    gb_per_s = row.ideal_bytes / middle / 1e9
    known = {
        "ms": 1000 * middle,
        "ms_20": 1000 * low,
        "ms_80": 1000 * high,
        "samples": len(seconds),
        "gb_per_s": gb_per_s,
    }
    if copy in timings:
        copied = timings[copy]
        known["percent_of_copy"] = (
            100 * gb_per_s / (copied.row.ideal_bytes / quantiles(copied.seconds)[1] / 1e9)
        )
    if anchor in timings:
        known["times_as_fast_as_anchor"] = ratio(timings[anchor].seconds, seconds)
    if row.bars:
        reached = []
        for bar in row.bars:
            peers = [ratio(timings[peer].seconds, seconds) for peer in bar.peers if peer in timings]
            reached.append(min(peers) if peers else None)
        known["reached"] = "; ".join("?" if value is None else f"{value:.3g} x" for value in reached)
        known["met"] = "; ".join(
            "?" if value is None else "yes" if value >= bar.factor else "no"
            for bar, value in zip(row.bars, reached, strict=True)
        )
    return Record(**(asdict(base) | known))


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """How many times as fast the second is: the median over the rounds that both ran."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=False))


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[round(0.2 * last)], statistics.median(ordered), ordered[round(0.8 * last)]


def progress(items: Iterable[T], text: str) -> Iterable[T]:
    """The items under a progress bar, or after a line of text where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        print(text, file=sys.stderr, flush=True)
        return items
    return tqdm(items, desc=text, leave=False, ncols=100)


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


def surroundings(device: torch.device) -> dict[str, str | int]:
    """What a result depends on besides the code: the columns that every row shares."""
    driver = (
        _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.type == "cuda"
        else ""
    )
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    module = sys.modules["__main__"].__spec__
    return {
        "machine": machine(device),
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
    # results that a later commit cannot reproduce must not carry a clean one
    return commit + "+" if _output("git", "status", "--porcelain", "--untracked-files=no") else commit


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().split("\n")[0]


def results_path(device: torch.device) -> Path:
    """Where the results of this machine are kept."""
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", machine(device).lower()).strip("-") + ".csv")


def write_csv(records: Sequence[Record], path: Path) -> None:
    """Writes all records, or leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, newline="") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Record)])
        writer.writeheader()
        for record in records:
            values = asdict(record)
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
