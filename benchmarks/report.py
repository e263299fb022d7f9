"""Puts the measured tables into README.md and draws the figures: no number is ever typed.

    python -m benchmarks.report              README.md and the figures, from benchmarks/results/*.csv
    python -m benchmarks.report FILE.csv     prints every row of one file

What README.md holds between `<!-- benchmarks begin -->` and `<!-- benchmarks end -->` is replaced.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import deltas
from benchmarks.harness import COPY, REPOSITORY, RESULTS, read_csv, verdicts
from benchmarks.peers import FUSED
from benchmarks.scaling import SIZES, with_threads

BEGIN, END = "<!-- benchmarks begin -->", "<!-- benchmarks end -->"
STEP_FIGURE, MEMORY_FIGURE, SCALING_FIGURE = "step.png", "memory.png", "scaling.png"
KINDS = ("weights", "gradients", "states", "masks")

# what the README is to say, and the start of the rows that say it
EXPECTED = {
    "cuda": (
        ("dense steps", "step", "adamw_ dense"),
        ("Bernoulli masks", "step", "adamw_ Bernoulli"),
        ("stored bits", "step", "adamw_ bits"),
        ("a known threshold", "step", "adamw_ threshold"),
        ("indexed masks", "step", "adamw_indexed_"),
        ("observing and training in one launch", "step", "observe and train"),
        ("whole steps on 199 small tensors", "step", "MaskedAdamW"),
        ("exact top-k", "topk", "select, global"),
        ("memory", "memory", "TopK, indexed"),
        ("steps by size", "scaling", "MaskedAdamW"),
        ("bitsandbytes", "step", "bitsandbytes "),
        ("torchao", "step", "torchao "),
        ("flashoptim", "step", "flashoptim "),
    ),
    "cpu": (
        ("dense steps", "step", "adamw_ dense"),
        ("Bernoulli masks", "step", "adamw_ Bernoulli"),
        ("stored bits", "step", "adamw_ bits"),
        ("indexed masks", "step", "adamw_indexed_"),
        ("exact top-k", "topk", "select, global"),
        ("memory", "memory", "TopK, indexed"),
        ("threads and sizes", "scaling", "MaskedAdamW"),
        ("deepspeed", "step", "deepspeed "),
    ),
}
PLACES = {"cuda": "on a GPU", "cpu": "on a CPU"}
RELEASED = "gradients released during the backward pass (bar: at most 2.22 bytes per bfloat16 weight at 1 %)"

CsvRow = dict[str, str]


def all_results(folder: Path = RESULTS) -> list[list[CsvRow]]:
    """The files of all machines, GPUs first."""
    found = [rows for rows in map(read_csv, sorted(folder.glob("*.csv"))) if rows]
    return sorted(found, key=lambda rows: rows[0]["device"] != "cuda")


def measured(rows: Iterable[CsvRow]) -> list[CsvRow]:
    """Those with figures."""
    return [row for row in rows if row["ms"] or row["states"]]


# tables


def table(head: Sequence[str], lines: Iterable[Sequence[str]], *, numbers: range) -> str:
    """Markdown; `numbers` says which columns are aligned to the right."""
    rows = [head, ["---:" if column in numbers else "---" for column in range(len(head))], *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)


def caption(rows: Sequence[CsvRow]) -> str:
    """Where these figures come from."""
    parts = []
    for row in {(row["commit"], row["command"]): row for row in rows}.values():
        driver = "" if row["driver"] == "none" else f"driver {row['driver']}, "
        load = f"load average {float(row['load_before'] or 0):.1f} when it began"
        parts.append(
            f"{row['machine']}, {driver}{row['threads']} CPU threads, {load}, torch {row['torch']}, "
            f"triton {row['triton']}, Python {row['python']}, commit {row['commit']}: `{row['command']}`"
        )
    return "\n\n".join(parts)


def _number(text: str, digits: int = 3) -> str:
    """Rounded to so many digits, without an exponent."""
    value = float(f"{float(text):.{digits}g}")
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:g}"


def _times(row: CsvRow) -> str:
    return f"{_number(row['ms'])} ({_number(row['ms_20'])} - {_number(row['ms_80'])})"


def _compared(row: CsvRow) -> str:
    pairs = [pair.rpartition(": ") for pair in row["times_as_fast_as"].split("; ") if pair]
    return ", ".join(f"{_number(factor)} x {peer}" for peer, _, factor in pairs)


def timing_table(rows: Sequence[CsvRow]) -> str:
    """All rows of one question."""
    head = ["", "ms (20 - 80 %)", "GB/s", "% of copy", "times as fast as", "bar: reached"]
    lines = []
    for row in rows:
        if not row["ms"]:
            lines.append([row["row"], "-", "-", "-", row["note"], ""])
            continue
        bars = "; ".join(f"{bar}: {reached}, **{word}**" for bar, reached, word in verdicts(row))
        share = f"{float(row['percent_of_copy']):.0f}" if row["percent_of_copy"] else "-"
        scratch = [f"scratch {float(row['scratch_bytes']) / 2**20:.3g} MiB"] if row["scratch_bytes"] else []
        compared = ", ".join(filter(None, [_compared(row), *scratch]))
        lines.append([row["row"], _times(row), _number(row["gb_per_s"]), share, compared, bars])
    return table(head, lines, numbers=range(1, 4))


def memory_table(rows: Sequence[CsvRow]) -> str:
    """Bytes per weight by kind: one dtype after the other, and bars where rows have any."""
    head = ["bytes per weight", *KINDS, "total", "ideal", "peak of a step", "peak ever"]
    numbers = range(1, len(head))
    barred = any(map(verdicts, rows))
    if barred:
        head.append("bar: reached")
    lines = []
    for row in _by_dtype(rows):
        bars = ["; ".join(f"{bar}: {reached}, **{word}**" for bar, reached, word in verdicts(row))]
        if not row["states"]:
            lines.append([row["row"], *["-"] * (len(head) - 2), row["note"]])
            continue
        kinds = [float(row[kind]) for kind in KINDS]
        ideal = float(row["ideal_bytes"]) / int(row["parameters"])
        peaks = [float(row["step_peak"]), float(row["peak"])]
        values = [f"{value:.2f}" for value in (*kinds, sum(kinds), ideal, *peaks)]
        lines.append([row["row"], *values, *bars * barred])
    return table(head, lines, numbers=numbers)


def _by_dtype(rows: Sequence[CsvRow]) -> list[CsvRow]:
    """One dtype after the other, as they first appear; else in the order they have."""
    order = list(dict.fromkeys(row["dtype"] for row in rows))
    return sorted(rows, key=lambda row: order.index(row["dtype"]))


def large_table(rows: Sequence[CsvRow]) -> str:
    """A whole model in training: what its process grew by, in bytes per weight, and how fast it was."""
    lines = [
        [
            row["row"],
            _number(row["peak"]) if row["peak"] else "-",
            _number(f"{float(row['ideal_bytes']) / float(row['parameters'])}"),
            _times(row) if row["ms"] else "-",
            row["note"],
        ]
        for row in rows
    ]
    head = ["", "bytes per weight", "without activations", "ms a step (20 - 80 %)", "in all"]
    return table(head, lines, numbers=range(1, 4))


def distributed_table(rows: Sequence[CsvRow]) -> str:
    """Training steps of a group of processes: time, and bytes of one process and step."""
    kinds = ("handed", "ring", "sent", "ring_observing", "ring_selecting")
    lines = [
        [
            row["row"],
            _times(row) if row["ms"] else "-",
            *(f"{float(row[kind]):,.0f}" if row[kind] else "-" for kind in kinds),
            _compared(row) or row["note"],
        ]
        for row in rows
    ]
    head = ["bytes a process and step", "ms (20 - 80 %)", "handed in", "a ring sends", "sent", "observing"]
    return table([*head, "selecting", "times as fast as"], lines, numbers=range(1, 7))


def paper_table(rows: Sequence[CsvRow]) -> str:
    """What formulas say of groups that were never run: what a ring sends, and the time of an assumed link."""
    ranks = list(dict.fromkeys(row["processes"] for row in rows))
    lines = []
    for name in dict.fromkeys(row["row"] for row in rows):
        found = {row["processes"]: row for row in rows if row["row"] == name}
        for kind, end in (("ring", ""), ("ring_selecting", ", the step that selects")):
            cells = []
            for count in ranks:
                size, link = float(found[count][kind]), float(found[count]["assumed_gb_per_s"])
                cells.append(f"{size / 1e9:,.1f} GB, {size / link / 1e6:,.0f} ms")
            if not end or cells != lines[-1][1:]:
                lines.append([name + end, *cells])
    head = ["a ring sends a process and step", *(f"{int(count):,} processes" for count in ranks)]
    return table(head, lines, numbers=range(1, len(head)))


def delta_size_table(rows: Sequence[CsvRow]) -> str:
    """Files of deltas and adapters: bytes, and how many for each changed entry."""
    lines = [
        [
            row["row"],
            f"{float(row['file_bytes']):,.0f}" if row["file_bytes"] else "-",
            f"{float(row['ideal_bytes']):,.0f}",
            _per_entry(row) if row["file_bytes"] else row["note"],
        ]
        for row in rows
    ]
    return table(["", "bytes", "on paper", "bytes per entry"], lines, numbers=range(1, 4))


def _per_entry(row: CsvRow) -> str:
    return f"{float(row['file_bytes']) / int(row['changed']):,.2f}"


def allocation_table(rows: Sequence[CsvRow]) -> str:
    """What an extraction allocates."""
    lines = [
        [
            row["row"],
            f"{float(row['peak']):.3f}" if row["peak"] else "-",
            f"{float(row['ideal_bytes']) / int(row['parameters']):.3f}",
            row["note"],
            "; ".join(f"{bar}: {reached}, **{word}**" for bar, reached, word in verdicts(row)),
        ]
        for row in rows
    ]
    head = ["", "bytes per weight", "the delta alone", "in all", "bar: reached"]
    return table(head, lines, numbers=range(1, 3))


def delta_table(rows: Sequence[CsvRow]) -> str:
    """What a delta costs to keep, to make and to switch, in a line each, beside others."""
    found = {(row["question"], row["row"]): row for row in rows if row["script"] == "deltas"}
    lines: list[list[str]] = []

    def line(text: str, mine: str, others: Iterable[tuple[str, str]]) -> None:
        if mine:
            lines.append([text, mine, "; ".join(f"{name}: {value}" for name, value in others if value)])

    def size(name: str, density: float, dtype: str) -> str:
        row = found.get((deltas.SIZE.format(dtype), f"{name}, {100 * density:g} %"))
        return _per_entry(row) if row and row["file_bytes"] else ""

    def speed(question: str, name: str) -> str:
        row = found.get((question, name))
        return _number(f"{1000 * float(row['gb_per_s'])}") if row and row["ms"] else ""

    def time(question: str, name: str) -> str:
        row = found.get((question, name))
        return _times(row) if row and row["ms"] else ""

    def allocated(question: str, name: str) -> str:
        row = found.get((question, name))
        return f"{float(row['peak']):.3f}" if row and row["peak"] else ""

    for dtype in deltas.DTYPES:
        for density in deltas.DENSITIES:
            names = (deltas.SUPERTUNING, deltas.SHIRA, deltas.LORA, deltas.CHECKPOINT)
            others = ((name, size(name, density, dtype)) for name in names)
            text = f"file, bytes per changed entry, {dtype}, {100 * density:g} %"
            line(text, size(deltas.OURS, density, dtype), others)
    for dtype in deltas.DTYPES:
        end = f"{dtype}, {100 * deltas.DENSITY:g} %"
        asked = deltas.EXTRACTION.format(dtype)
        others = ((name, speed(asked, name)) for name in (deltas.READ, deltas.PLAIN))
        line(f"extraction, MB/s of both files, {end}", speed(asked, deltas.EXTRACT), others)
        asked = deltas.MEMORY.format(dtype)
        beside = [(deltas.PLAIN, allocated(asked, deltas.PLAIN))]
        line(f"extraction, bytes allocated per weight, {end}", allocated(asked, deltas.EXTRACT), beside)
    for density in deltas.SWITCHED:
        asked = deltas.SWITCH.format(100 * density)
        names = (deltas.RELOAD, deltas.UNMERGED, deltas.MERGED)
        text = f"switch, ms (20 - 80 %), bfloat16, {100 * density:g} %"
        line(text, time(asked, deltas.ACTIVATE), ((name, time(asked, name)) for name in names))
    return table(["", "sparse delta", "beside it"], lines, numbers=range(1, 2)) if lines else ""


def size_table(rows: Sequence[CsvRow]) -> str:
    """Nanoseconds per entry, a column for each size."""
    sizes = sorted({int(row["parameters"]) for row in rows})
    lines = []
    for name in dict.fromkeys(row["row"] for row in rows):
        found = {int(row["parameters"]): row for row in rows if row["row"] == name}
        cells = []
        for size in sizes:
            row = found.get(size)
            cells.append(_number(f"{1e6 * float(row['ms']) / size}") if row and row["ms"] else "-")
        lines.append([name, *cells])
    head = ["ns per entry", *(f"{size:,}" for size in sizes)]
    return table(head, lines, numbers=range(1, len(head)))


def thread_table(rows: Sequence[CsvRow]) -> str:
    """Milliseconds by question and number of threads, and how many times as fast as one thread that is."""
    asked = [row for row in rows if row["row"].endswith(_on_threads(row))]
    columns = list(dict.fromkeys((row["question"], row["threads"]) for row in asked))
    found = {
        (row["row"].removesuffix(_on_threads(row)), row["question"], row["threads"]): row for row in asked
    }
    lines = []
    for name in dict.fromkeys(name for name, _, _ in found):
        cells = []
        for question, threads in columns:
            row = found.get((name, question, threads))
            if row is None or not row["ms"]:
                cells.append("-")
                continue
            pairs = [pair.rpartition(": ") for pair in row["times_as_fast_as"].split("; ")]
            gains = [_number(factor) for peer, _, factor in pairs if peer == with_threads(name, 1)]
            cells.append(_number(row["ms"]) + "".join(f" ({gain} x)" for gain in gains))
        lines.append([name, *cells])
    head = ["ms", *(question.removeprefix("threads, ") + _on(threads) for question, threads in columns)]
    return table(head, lines, numbers=range(1, len(head)))


def _on(threads: str) -> str:
    return with_threads("", int(threads))


def _on_threads(row: CsvRow) -> str:
    return _on(row["threads"])


def render(rows: Sequence[CsvRow]) -> str:
    """Markdown: one table per question of one machine, each after the command that measured it."""
    if not rows:
        raise ValueError(
            "the results must have at least one row, got none; run python -m benchmarks.step first."
        )
    parts = []
    for script, members in groupby(rows, key=lambda row: row["script"]):
        group = list(members)
        parts.append(caption(group))
        for question, asked in groupby(group, key=lambda row: row["question"]):
            same = list(asked)
            entries = max(int(row["parameters"]) for row in same)
            if script == "memory":
                parts.append(f"**{question}**, {entries:,} weights")
                parts.append(memory_table(same))
            elif script == "large":
                parts.append(f"**{question}**, {entries:,} weights")
                parts.append(large_table(same))
            elif script == "distributed" and same[0]["assumed_gb_per_s"]:
                link = f"predicted, not measured, at an assumed {same[0]['assumed_gb_per_s']} GB/s"
                parts.append(f"**{question}**, {entries:,} weights in {same[0]['dtype']}: {link}")
                parts.append(paper_table(same))
            elif script == "distributed":
                parts.append(f"**{question}**, {entries:,} weights")
                parts.append(distributed_table(same))
            elif script == "deltas":
                parts.append(f"**{question}**, {entries:,} weights{_conditions(same)}")
                if any(row["file_bytes"] for row in same):
                    parts.append(delta_size_table(same))
                elif any(row["peak"] for row in same):
                    parts.append(allocation_table(same))
                else:
                    parts.append(timing_table(same))
            elif (script, question) == ("scaling", SIZES):
                parts.append(f"**cost by size**, up to {entries:,} entries")
                parts.append(size_table(same))
            else:
                parts.append(f"**{question}**, {entries:,} entries")
                parts.append(timing_table(same))
    return "\n\n".join(parts)


def _conditions(rows: Sequence[CsvRow]) -> str:
    """What the notes of timed rows say, each thing once."""
    notes = dict.fromkeys(row["note"] for row in rows if row["ms"])
    shared = [part for part in next(iter(notes), "").split("; ") if all(part in note for note in notes)]
    own = [
        f"{row['row']}: {part}"
        for row in rows
        if row["ms"]
        for part in row["note"].split("; ")
        if part not in shared
    ]
    return "".join(f"; {part}" for part in [*shared, *own] if part)


def missing(results: Sequence[Sequence[CsvRow]]) -> str:
    """What was not measured yet, in plain words; nothing once all of it was."""
    gaps = []
    for device, expected in EXPECTED.items():
        rows = [row for rows in results for row in measured(rows) if row["device"] == device]
        absent = [
            name
            for name, script, start in expected
            if not any(row["script"] == script and row["row"].startswith(start) for row in rows)
        ]
        if len(absent) == len(expected):
            gaps.append(f"everything {PLACES[device]}")
        elif absent:
            gaps.append(f"{PLACES[device]}: {', '.join(absent)}")
    rows = [row for rows in results for row in measured(rows) if row["script"] == "memory"]
    if not any(", released" in row["row"] and row["backend"] for row in rows):
        gaps.append(RELEASED)
    return f"Not measured yet: {'; '.join(gaps)}." if gaps else ""


def bar_table(rows: Sequence[CsvRow]) -> str:
    """What was promised, and what was reached."""
    lines = [
        [row["row"], row["question"], _times(row) if row["ms"] else "-", bar, reached, word]
        for row in rows
        for bar, reached, word in verdicts(row)
    ]
    return table(["held to a bar", "", "ms (20 - 80 %)", "bar", "reached", ""], lines, numbers=range(2, 3))


def readme_text(results: Sequence[Sequence[CsvRow]]) -> str:
    """What stands between the markers."""
    parts = ["## Measured", *filter(None, [missing(results)])]
    if any(row["script"] == "step" for rows in results for row in measured(rows)):
        parts.append(f"![milliseconds of a step against density](benchmarks/results/{STEP_FIGURE})")
    if any(row["script"] == "memory" for rows in results for row in measured(rows)):
        parts.append(f"![bytes per weight by optimizer](benchmarks/results/{MEMORY_FIGURE})")
    if any(row["question"] == SIZES for rows in results for row in measured(rows)):
        parts.append(f"![nanoseconds of a step per entry against size](benchmarks/results/{SCALING_FIGURE})")
    for rows in results:
        parts.append(f"**{rows[0]['machine']}**")
        if all(row["backend"] in ("", "reference") for row in measured(rows)):
            parts.append(
                "Ours is the reference backend here, plain PyTorch: what is correct, not what is fast."
            )
        if any(map(verdicts, rows)):
            parts.append(bar_table(rows))
        threads = [row for row in rows if row["script"] == "scaling" and row["question"] != SIZES]
        if threads:
            parts.append("Whole steps by number of threads, and how many times as fast as with one:")
            parts.append(thread_table(threads))
        if kept := delta_table(rows):
            parts += ["What a delta costs to keep, to make and to switch:", kept]
        parts += [f"<details><summary>Every row: {rows[0]['machine']}</summary>", render(rows), "</details>"]
    return "\n\n".join(parts)


def replace(text: str, new: str) -> str:
    """The text with `new` between the markers."""
    before, found_begin, rest = text.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not found_begin or not found_end:
        raise ValueError(f"the file must hold the lines {BEGIN} and {END}, got neither or one; add both.")
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


# figures


def draw_steps(results: Sequence[Sequence[CsvRow]], path: Path) -> bool:
    """Step time against density: one panel a machine, with torch's fused AdamW and the roof of bytes."""
    panels = [
        rows
        for rows in (
            [row for row in measured(rows) if row["script"] == "step" and row["question"] == "float32"]
            for rows in results
        )
        if {COPY, FUSED} <= {row["row"] for row in rows}
        and any(row["density"] and row["backend"] for row in rows)
    ]
    if not panels:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(panels), 4.8), layout="constrained")
    for axes, rows in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, rows)
    figure.savefig(path, dpi=130)
    return True


def _draw_panel(axes: Any, rows: Sequence[CsvRow]) -> None:
    from matplotlib.ticker import LogLocator, ScalarFormatter

    def points(chosen: Iterable[CsvRow]) -> tuple[list[float], list[float]]:
        pairs = sorted((100 * float(row["density"]), float(row["ms"])) for row in chosen)
        return [density for density, _ in pairs], [ms for _, ms in pairs]

    named = {row["row"]: row for row in rows}
    axes.axhline(float(named[FUSED]["ms"]), color="#444444", linestyle="--", label="torch.optim.AdamW, fused")
    ours = [row for row in rows if row["backend"]]
    for number, backend in enumerate(dict.fromkeys(row["backend"] for row in ours)):
        mine, color = [row for row in ours if row["backend"] == backend], f"C{number}"
        lists = [row for row in mine if row["row"].startswith("adamw_indexed_")]
        axes.plot(*points(lists), marker="o", color=color, label=f"indexed, {backend}")
        for start, marker in (("adamw_ Bernoulli", "s"), ("adamw_ bits", "^"), ("adamw_ dense", "D")):
            chosen = [row for row in mine if row["row"].startswith(start)]
            label = f"{start.removeprefix('adamw_ ')}, {backend}"
            axes.scatter(
                *points(chosen), s=60, marker=marker, color=color, edgecolor="white", label=label, zorder=3
            )
    # a processor reads the lines that a copy writes
    on_gpu = rows[0]["device"] == "cuda"
    copy = float(named[COPY]["gb_per_s"]) * (1.0 if on_gpu else 1.5)
    roof = sorted(
        {
            (100 * float(row["density"]), float(row["ideal_bytes"]) / copy / 1e6)
            for row in ours
            if row["row"].startswith(("adamw_indexed_", "adamw_ dense"))
        }
    )
    label = "ideal bytes at a copy's bandwidth" + ("" if on_gpu else ", reads of written lines counted")
    axes.plot(*zip(*roof, strict=True), color="black", linewidth=1, label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="entries trained, %",
        ylabel="ms a step",
        title=f"{rows[0]['machine']}\n{int(rows[0]['parameters']):,} float32 weights",
    )
    axes.set_xticks([1, 3, 10, 30, 100])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter("")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")


def draw_scaling(results: Sequence[Sequence[CsvRow]], path: Path) -> bool:
    """Nanoseconds per entry against the number of entries: one panel a machine."""
    panels = [
        rows
        for rows in ([row for row in measured(rows) if row["question"] == SIZES] for rows in results)
        if len({row["parameters"] for row in rows}) > 1
    ]
    if not panels:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(panels), 4.8), layout="constrained")
    for axes, rows in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        ours = 0
        for name in dict.fromkeys(row["row"] for row in rows):
            mine = sorted((row for row in rows if row["row"] == name), key=lambda row: int(row["parameters"]))
            sizes = [int(row["parameters"]) for row in mine]
            low, middle, high = (
                [1e6 * float(row[column]) / size for row, size in zip(mine, sizes, strict=True)]
                for column in ("ms_20", "ms", "ms_80")
            )
            style: dict[str, Any] = {"color": f"C{ours}", "marker": "o"}
            if not mine[0]["backend"]:
                style = (
                    {"color": "black", "linewidth": 1} if name == COPY else {"color": "#444444", "ls": "--"}
                )
            else:
                ours += 1
            label = "torch.optim.AdamW, fused" if name == FUSED else name.removeprefix("MaskedAdamW ")
            axes.plot(sizes, middle, label=label, **style)
            axes.fill_between(sizes, low, high, color=style["color"], alpha=0.15, linewidth=0)
        threads = "" if rows[0]["device"] == "cuda" else f", {_on(rows[0]['threads']).removeprefix(', ')}"
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="entries of one float32 tensor",
            ylabel="ns per entry",
            title=f"whole steps by size, median and 20 - 80 %\n{rows[0]['machine']}{threads}",
        )
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=130)
    return True


def draw_memory(results: Sequence[Sequence[CsvRow]], path: Path) -> bool:
    """Bytes per weight, stacked by kind, a panel for each question and dtype: of the first machine, since
    they hardly depend on it.
    """
    found = ([row for row in measured(rows) if row["script"] == "memory"] for rows in results)
    rows = next(filter(None, found), None)
    if rows is None:
        return False
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], list[CsvRow]] = {}
    for row in rows:
        panels.setdefault((row["question"], row["dtype"]), []).append(row)
    heights = [len(panel) + 1 for panel in panels.values()]
    figure = Figure(figsize=(8.0, 0.8 + 0.7 * len(panels) + 0.24 * sum(heights)), layout="constrained")
    columns = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, ((question, dtype), panel) in zip(columns, panels.items(), strict=True):
        _draw_kinds(axes, panel)
        size = f"{max(int(row['parameters']) for row in panel):,} {dtype} weights"
        model = question.partition(", ")[2]
        axes.set_title(f"{model}, {size}" if model else size, loc="left", fontsize=10)
    columns[0].legend(fontsize=8)
    columns[-1].set_xlabel("bytes per weight, between steps")
    figure.suptitle(rows[0]["machine"], fontsize=11)
    figure.savefig(path, dpi=130)
    return True


def _draw_kinds(axes: Any, rows: Sequence[CsvRow]) -> None:
    # the panel says which dtype and which model
    names = [row["row"].rpartition(", ")[0] or row["row"] for row in rows]
    left = [0.0] * len(rows)
    for kind, color in zip(KINDS, ("#8c96a6", "#c9ced6", "#d9822b", "#2f6db0"), strict=True):
        widths = [float(row[kind]) for row in rows]
        axes.barh(names, widths, left=left, color=color, label=kind)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for name, total in zip(names, left, strict=True):
        axes.annotate(
            f"{total:.2f}", (0, name), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7
        )
    peaks = [float(row["peak"]) for row in rows]
    axes.scatter(peaks, names, marker="|", color="black", label="peak ever")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(alpha=0.3, axis="x")


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the README's tables and the figures, or prints one file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("csv", type=Path, nargs="?", help="print this one")
    given = parser.parse_args(arguments)
    if given.csv is not None:
        print(render(read_csv(given.csv)))
        return
    results = all_results()
    readme = REPOSITORY / "README.md"
    readme.write_text(replace(readme.read_text(), readme_text(results)))
    written = ["README.md"]
    if draw_steps(results, RESULTS / STEP_FIGURE):
        written.append(STEP_FIGURE)
    if draw_scaling(results, RESULTS / SCALING_FIGURE):
        written.append(SCALING_FIGURE)
    if draw_memory(results, RESULTS / MEMORY_FIGURE):
        written.append(MEMORY_FIGURE)
    print(f"written from {len(results)} files of results: {', '.join(written)}")


if __name__ == "__main__":
    main()
