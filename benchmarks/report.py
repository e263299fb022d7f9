"""Renders a results CSV as markdown tables, and puts them between markers in a file: no table is ever typed.

python -m benchmarks.report benchmarks/results/NAME.csv                    prints the tables
python -m benchmarks.report benchmarks/results/NAME.csv --into README.md   replaces what lies between
    <!-- benchmarks NAME begin --> and <!-- benchmarks NAME end -->
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.harness import read_csv


def render(rows: Sequence[dict[str, str]]) -> str:
    """Markdown: one table per question, and a line that says where the figures come from."""
    if not rows:
        raise ValueError(
            "the results must have at least one row, got none; run python -m benchmarks.baselines first."
        )
    first = rows[0]
    parts = [
        (
            f"{first['machine']}, driver {first['driver']}, {first['threads']} CPU threads, "
            f"torch {first['torch']}, triton {first['triton']}, Python {first['python']}, "
            f"commit {first['commit']}: `{first['command']}`"
        )
    ]
    for question, members in groupby(rows, key=lambda row: row["question"]):
        group = list(members)
        parts.append(f"**{question}**, {int(group[0]['parameters']):,} parameters, {group[0]['dtype']}")
        anchor = group[0]["anchor"]
        head = [
            "",
            "ms (20 - 80 %)",
            "GB to move",
            "GB/s",
            "% of copy",
            f"times as fast as {anchor}",
            "bar",
            "reached",
        ]
        lines = [head, ["---"] + ["---:"] * (len(head) - 3) + ["---"] * 2]
        lines += [_cells(row) for row in group]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts)


def _cells(row: dict[str, str]) -> list[str]:
    moved = f"{float(row['ideal_bytes']) / 1e9:.3g}"
    if not row["ms"]:
        return [row["row"], "-", moved, "-", "-", "-", row["bars"], row["note"].replace("|", "/")]
    verdicts = {"yes": "met", "no": "missed", "?": "no peer"}
    reached = "; ".join(
        f"{value} ({verdicts[met]})"
        for value, met in zip(row["reached"].split("; "), row["met"].split("; "), strict=True)
        if met
    )
    times = row["times_as_fast_as_anchor"]
    return [
        row["row"],
        f"{float(row['ms']):.4g} ({float(row['ms_20']):.4g} - {float(row['ms_80']):.4g})",
        moved,
        f"{float(row['gb_per_s']):.4g}",
        f"{float(row['percent_of_copy']):.0f}" if row["percent_of_copy"] else "-",
        f"{float(times):.3g}" if times else "-",
        row["bars"],
        reached,
    ]


def replace(text: str, name: str, table: str) -> str:
    """The text with `table` between the two markers of `name`."""
    begin, end = f"<!-- benchmarks {name} begin -->", f"<!-- benchmarks {name} end -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the file must hold the lines {begin} and {end}, got neither or one; add both.")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables of a CSV, or writes them into a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--into", type=Path, help="the file with the markers")
    options = parser.parse_args(arguments)
    table = render(read_csv(options.csv))
    if options.into is None:
        print(table)
    else:
        options.into.write_text(replace(options.into.read_text(), options.csv.stem, table))


if __name__ == "__main__":
    main()
