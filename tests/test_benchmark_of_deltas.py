"""The benchmark of deltas counts what it says, refuses what is wrong, and becomes tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import deltas, harness, peers, report
from sparse_optim import Delta, DeltaSwitcher, TensorDelta, extract_delta, load_delta, patching, save_delta

CPU = torch.device("cpu")
TINY = deltas.Shape(64, 1, 176, 256)
OPTIONS = harness.Options(CPU, None, True, "", ("reference",), 0.01, None)
needs_peft = pytest.mark.skipif(bool(deltas.surely_peft()), reason="not installed: peft")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each."""
    monkeypatch.setattr(deltas, "DTYPES", {"bfloat16": torch.bfloat16})
    monkeypatch.setattr(deltas, "DENSITIES", (0.01,))
    monkeypatch.setattr(deltas, "SWITCHED", (0.01,))


@pytest.fixture
def pair(tmp_path: Path) -> deltas.Pair:
    return deltas.pair_of(TINY, torch.bfloat16, 0.01, tmp_path)


def run(path: Path, *arguments: str) -> list[dict[str, str]]:
    deltas.main(["--quick", "--device", "cpu", "--seconds", "0.01", "--output", str(path), *arguments])
    return harness.read_csv(path) if path.exists() else []


# end to end


def test_a_quick_run_keeps_rows_that_become_tables(
    few: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(tmp_path / "tiny.csv")
    printed = capsys.readouterr().out
    found = {(row["question"], row["row"]): row for row in rows}
    ours = found[deltas.SIZE.format("bfloat16"), f"{deltas.OURS}, 1 %"]
    linear = 4 * 64 * 64 + 3 * 64 * 176 + 64 * 256
    assert int(ours["changed"]) == 4 * 40 + 3 * 112 + 163 <= 0.01 * linear
    assert float(ours["ideal_bytes"]) < int(ours["file_bytes"])
    for row in rows:
        assert row["row"] in printed
        assert not row["note"].startswith(("wrong", "failed")), row
        measured = row["ms"] or row["file_bytes"] or row["peak"]
        assert measured and float(measured) > 0, row
        if row["ms"]:
            assert "page cache" in row["note"] and "threads" in row["note"]
    names = {row["row"].partition(", 1 %")[0] for row in rows}
    expected = {
        deltas.OURS, deltas.CHECKPOINT, deltas.READ, deltas.EXTRACT, deltas.PLAIN, deltas.RELOAD,
        deltas.ACTIVATE, "save_delta", "load_delta", "apply_delta, verify=False", "revert_delta, verify=True",
    }  # fmt: skip
    assert expected <= names
    lora = {deltas.SHIRA, deltas.SUPERTUNING, deltas.LORA, deltas.UNMERGED, deltas.MERGED}
    assert (lora <= names) != bool(deltas.surely_peft())
    text = report.readme_text([rows])
    summary = report.delta_table(rows)
    assert summary in text
    per_entry = f"{int(ours['file_bytes']) / int(ours['changed']):.2f}"
    assert f"| file, bytes per changed entry, bfloat16, 1 % | {per_entry} |" in summary
    kinds = ("file, bytes", "extraction, MB/s", "extraction, bytes allocated", "switch, ms")
    assert [line.startswith(f"| {kind}") for kind, line in zip(kinds, summary.splitlines()[2:], strict=True)]
    assert f"{deltas.RELOAD}: " in summary.splitlines()[-1]
    for question in deltas.SIZE, deltas.EXTRACTION, deltas.MEMORY, deltas.ON_AND_OFF:
        assert f"**{question.format('bfloat16')}**, " in text


def test_without_peft_its_rows_are_left_out_and_a_line_says_so(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "why_missing", lambda module: "not installed")
    monkeypatch.setattr(deltas, "EXTRACTIONS", {})
    rows = run(tmp_path / "tiny.csv")
    assert "the rows of PEFT are left out: not installed" in capsys.readouterr().out.splitlines()
    assert rows
    assert not [row["row"] for row in rows if "PEFT" in row["row"]]
    summary = report.delta_table(rows).splitlines()
    assert "PEFT" not in "".join(summary) and f"{deltas.CHECKPOINT}: " in summary[2]


def test_results_without_deltas_have_no_section() -> None:
    assert report.delta_table([]) == ""


# bytes on paper


def test_bytes_on_paper_are_those_counted() -> None:
    base = {"a": torch.zeros(1000, 700, dtype=torch.bfloat16), "b": torch.zeros(300_000)}
    base = {name: base[name] for name in base}
    net = torch.nn.Module()
    for name, tensor in base.items():
        net.register_buffer(name, tensor)
    expected = {name: tensor.clone() for name, tensor in base.items()}
    generator = torch.Generator().manual_seed(0)
    for tensor in expected.values():
        tensor.view(-1)[torch.randperm(tensor.numel(), generator=generator)[: tensor.numel() // 50]] = 1
    delta = extract_delta(net, expected)
    switcher = DeltaSwitcher(net, {"one": delta})
    (step,) = switcher._steps["one"]
    assert deltas.list_bytes(delta) == sum(t.nbytes for column in step[1:] for t in column)
    lines = 0
    for tensor, indices in zip(*step[:2], strict=True):
        lines += len(torch.unique(indices.long() * tensor.element_size() // deltas.LINE))
    assert deltas.line_bytes(delta) == pytest.approx(deltas.LINE * lines, rel=0.01)
    both = 2 * (deltas.list_bytes(delta) + 2 * deltas.line_bytes(delta))
    assert deltas.switch_bytes(delta, delta) == both


def test_no_file_is_smaller_than_the_bound_and_ours_is_near_it(tmp_path: Path) -> None:
    place = torch.tensor([1, 4, 6, 7], dtype=torch.int32)
    part = TensorDelta((10,), torch.bfloat16, place, torch.ones(4, dtype=torch.int16))
    small = Delta({"w": part}, "xor")
    assert deltas.entropy_bytes(small) == pytest.approx(math.log2(math.comb(10, 4)) / 8 + 8)
    base = {"w": torch.zeros(500_000)}
    for density in (0.001, 0.01, 0.3):
        tuned = {"w": base["w"].clone()}
        tuned["w"][
            torch.randperm(500_000, generator=torch.Generator().manual_seed(1))[: int(density * 5e5)]
        ] = 1
        delta = extract_delta(base, tuned)
        save_delta(delta, tmp_path / "d.safetensors")
        bound, size = deltas.entropy_bytes(delta), (tmp_path / "d.safetensors").stat().st_size
        # names, hashes and a checksum in the header
        assert bound < size < 1.02 * bound + 1500


# gates


def without_the_last(old: torch.Tensor, new: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    where = (old != new).nonzero().view(-1)[:-1]
    yield where, old[where], new[where]


def test_the_gates_stop_an_extraction_that_loses_an_entry(
    pair: deltas.Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {row.name: row for row in deltas.extraction_rows(pair)}
    for name in (deltas.READ, deltas.EXTRACT, deltas.PLAIN):
        assert rows[name].check() is None
    monkeypatch.setattr(patching, "_differing", without_the_last)
    assert "must have the changes that were made" in rows[deltas.EXTRACT].check()
    records = deltas.timed("q", deltas.extraction_rows(pair), 1, "bfloat16", deltas.READ, OPTIONS)
    notes = {record.row: record.note for record in records}
    assert notes[deltas.EXTRACT].startswith("wrong, not measured")
    assert not notes[deltas.PLAIN]
    (ours,) = deltas.sizes(TINY, "bfloat16", 0.01, replace(OPTIONS, only=deltas.OURS), with_peft=False)
    assert ours.note.startswith("wrong, not measured") and ours.file_bytes is None


def test_the_gate_of_a_plain_formulation_sees_other_values(pair: deltas.Pair) -> None:
    found = deltas.plain_extraction(pair.base_file, pair.tuned_file)
    assert deltas.wrong_extraction(pair, found) is None
    places, bits = found["head.weight"]
    assert deltas.wrong_extraction(pair, {**found, "head.weight": (places, bits + 1)})
    assert deltas.wrong_extraction(pair, {**found, "head.weight": (places + 1, bits)})


def switch_of(pair: deltas.Pair, folder: Path, *, with_peft: bool = False) -> dict[str, deltas.Switched]:
    found = deltas.switched_rows(pair.net, 0.01, folder, CPU, with_peft=with_peft)
    return {each.row.name: each for each in found}


def test_a_switch_that_does_nothing_is_no_result(
    pair: deltas.Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = switch_of(pair, tmp_path)
    ours = found[deltas.ACTIVATE]
    assert ours.row.check() is None
    monkeypatch.setattr(patching, "move_bits", lambda *_: None)
    ours.turns.step()
    with pytest.raises(deltas.WrongResultError, match="after a switch to 'second' weights must be"):
        ours.turns.check()
    records = deltas.timed("q", [each.row for each in found.values()], 1, "bfloat16", deltas.RELOAD, OPTIONS)
    assert [record.row for record in records if record.note.startswith("wrong")] == [deltas.ACTIVATE]


def test_a_switch_that_goes_wrong_after_its_gate_ends_the_run(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    activate = DeltaSwitcher.activate

    def tires(self: DeltaSwitcher, name: str | None) -> None:
        nonlocal calls
        calls += 1
        if calls < 6:
            activate(self, name)

    monkeypatch.setattr(deltas, "of_files", lambda *_: [])
    monkeypatch.setattr(deltas.DeltaSwitcher, "activate", tires)
    with pytest.raises(SystemExit, match="wrong, nothing is kept: after a switch"):
        run(tmp_path / "tiny.csv", "--rows", "activate")
    assert not (tmp_path / "tiny.csv").exists()


@needs_peft
def test_the_gates_of_peft_see_other_adapters(
    pair: deltas.Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = switch_of(pair, tmp_path, with_peft=True)
    for name in (deltas.UNMERGED, deltas.MERGED):
        assert found[name].row.check() is None
        turns = found[name].turns
        monkeypatch.setattr(turns, "_switch", lambda _: None)
        turns.step()
        with pytest.raises(deltas.WrongResultError, match="the adapter must be"):
            turns.check()
    assert "of the base's weights are others afterwards" in found[deltas.MERGED].note()
    assert not found[deltas.MERGED].note().startswith("0.0 %")
    delta = extract_delta(pair.net, pair.tuned)
    size, entries = deltas.saved_adapter(delta, pair.net, "supertuning", tmp_path / "adapter")
    assert 8 * entries < size
    from sparse_optim.integrations import peft

    padded = peft._padded
    monkeypatch.setattr(peft, "_padded", lambda part, values, size: padded(part, 0 * values, size))
    with pytest.raises(deltas.WrongResultError, match=f"must change {entries} entries, got 0"):
        deltas.saved_adapter(delta, pair.net, "shira", tmp_path / "zeros")


def test_a_file_that_gives_other_weights_is_no_result(
    pair: deltas.Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = extract_delta(pair.net, pair.tuned)
    size, entries = deltas.saved_delta(delta, pair.net, pair.tuned, tmp_path / "d.safetensors")
    assert entries == sum(part.changed for part in delta.tensors.values())
    assert size == (tmp_path / "d.safetensors").stat().st_size
    rows = {row.name: row for row in deltas.on_and_off_rows(pair, delta, tmp_path, CPU)}
    assert rows["load_delta"].check() is None

    def less(path: Path) -> Delta:
        loaded = load_delta(path)
        part = loaded.tensors["head.weight"]
        fewer = replace(part, indices=part.indices[:-1], values=part.values[:-1])
        return replace(loaded, tensors={**loaded.tensors, "head.weight": fewer})

    monkeypatch.setattr(deltas, "load_delta", less)
    with pytest.raises(deltas.WrongResultError, match=r"got others in head\.weight"):
        deltas.saved_delta(delta, pair.net, pair.tuned, tmp_path / "d.safetensors")
    assert r"got others in head.weight" in rows["load_delta"].check()


# memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_growth_counts_what_is_allocated_and_no_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "zeros"
    path.write_bytes(bytes(32 << 20))

    def mapped() -> torch.Tensor:
        tensor = torch.from_file(str(path), shared=True, size=32 << 20, dtype=torch.uint8)
        assert tensor.max() == 0
        return tensor

    assert deltas.growth(mapped) < 8 << 20
    assert deltas.growth(lambda: torch.ones(32 << 20, dtype=torch.uint8)) > 31 << 20
    # what is freed before the end is seen, too
    assert deltas.growth(lambda: torch.ones(8 << 20).sum().item()) > 30 << 20


@pytest.mark.parametrize(("share", "word"), [(0.1, "met"), (0.6, "missed")])
def test_an_extraction_is_held_to_its_memory(
    pair: deltas.Pair, share: float, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def child(*_: object, input: str, **__: object) -> SimpleNamespace:
        Path(json.loads(input)["answer"]).write_text(str(int(share * pair.nbytes)))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(deltas.subprocess, "run", child)
    monkeypatch.setattr(deltas, "SMALLEST_HELD", 0)
    record = deltas.memory_row(deltas.EXTRACT, pair, 1.0, "bfloat16")
    assert record.peak == pytest.approx(2 * share, rel=0.01)
    assert [verdict for _, _, verdict in harness.verdicts(vars(record))] == [word]
    assert not deltas.memory_row(deltas.PLAIN, pair, 1.0, "bfloat16").bars


def test_an_extraction_that_fails_in_its_process_is_a_failed_row(
    pair: deltas.Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def child(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(returncode=1, stderr=f"traceback\nValueError: {said}")

    monkeypatch.setattr(deltas.subprocess, "run", child)
    for said, failed in (("no such file", True), ("needs Linux, which says", False)):
        record = deltas.memory_row(deltas.EXTRACT, pair, 1.0, "bfloat16")
        assert record.note.startswith("failed: ") == failed and said in record.note
        assert record.peak is None
