"""The benchmarks measure what they say, refuse to time what is wrong, and fill the README."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gates, harness, memory, operands, peers, report, step, topk
from sparse_optim import Bernoulli, Schedule, TopK
from sparse_optim.backends import reference

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[1]
ONE_SHAPE: operands.Shapes = [(64, 33), (7,)]


def options(**changes: object) -> harness.Options:
    asked = harness.Options(CPU, None, True, "", ("reference",), 0.01, None)
    return replace(asked, **changes)


# end to end


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # a process of its own: the warnings of other libraries are not ours to turn into errors
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}", "--quick", "--device", "cpu", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )


SAMPLES = {
    "step": ("dense", ["plain copy", "torch fused", "adamw_ dense, reference"]),
    "topk": ("global", ["plain copy", "torch.topk", "select, global, reference"]),
    "memory": ("float32", ["torch.optim.AdamW fused, float32", "TopK, indexed, 1 %, float32"]),
}


@pytest.mark.parametrize("script", SAMPLES)
def test_a_quick_run_prints_and_keeps_its_rows(script: str, tmp_path: Path) -> None:
    only, expected = SAMPLES[script]
    path = tmp_path / "tiny.csv"
    command = ["--backend", "reference", "--rows", only, "--output", str(path)]
    done = run(script, *command)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["row"]: row for row in harness.read_csv(path)}
    for name in expected:
        assert name in done.stdout
        assert rows[name]["ms"] or rows[name]["states"], rows[name]["note"]
        assert rows[name]["command"].startswith(f"python -m benchmarks.{script} --quick")
    assert not [row["note"] for row in rows.values() if row["note"].startswith("wrong")]


def test_a_backend_that_is_not_there_is_one_line() -> None:
    done = run("memory", "--backend", "quantum", "--rows", "policy=None")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[0] == "backend quantum is not measured: there is no such backend"
    assert "policy=None" not in done.stdout


# the gates

KERNELS = {
    "dense": step.adamw(),
    "seeded": step.adamw("zero_grad", step.by_draws),
    "seeded, frozen": step.adamw("frozen", step.by_draws, lambda o: o.drawn_masks(step.KEEP)),
    "bits": step.adamw("frozen", step.by_bits, lambda o: o.masks(step.DENSITY)),
    "threshold": step.adamw("frozen", step.by_scores, lambda o: o.masks(step.DENSITY)),
    "observing": step.adamw(observes=True),
    "two launches": step.two_launches,
    "indexed": step.indexed(0.1),
}


def altered(**verbs: object) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(reference), **verbs})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_gate_of_kernels_passes_the_reference_and_stops_a_wrong_one(
    name: str, dtype: torch.dtype
) -> None:
    setup = KERNELS[name]
    assert gates.wrong_kernel(setup, reference, CPU, dtype, torch.float32) is None

    def heavier(verb):
        return lambda *args, **kwargs: verb(*args, **{**kwargs, "eps": 1e-3})

    wrong = altered(adamw_=heavier(reference.adamw_), adamw_indexed_=heavier(reference.adamw_indexed_))
    problem = gates.wrong_kernel(setup, wrong, CPU, dtype, torch.float32)
    assert problem is not None
    assert problem.startswith("error")


@pytest.mark.parametrize("name", ["seeded, frozen", "bits", "threshold", "indexed"])
def test_the_gate_of_kernels_stops_one_that_moves_other_entries(name: str) -> None:
    def leaks(verb):
        def leaking(params, *args, **kwargs):
            verb(params, *args, **kwargs)
            for p in params:
                # one unit in the last place, everywhere
                p.view(torch.int32).add_(1)

        return leaking

    wrong = altered(adamw_=leaks(reference.adamw_), adamw_indexed_=leaks(reference.adamw_indexed_))
    problem = gates.wrong_kernel(KERNELS[name], wrong, CPU)
    assert problem == "entries that are not selected moved"


def test_the_gate_of_kernels_stops_a_statistic_in_the_wrong_last_bit() -> None:
    def off(statistics, *args, **kwargs):
        reference.accumulate_(statistics, *args, **kwargs)
        statistics[-1].view(torch.int32).view(-1)[-1] += 1

    problem = gates.wrong_kernel(step.two_launches, altered(accumulate_=off), CPU)
    assert problem is not None
    assert "bit for bit" in problem


OPTIMIZERS = {
    "dense": (None, "frozen"),
    "bernoulli": (Bernoulli(0.3), "zero_grad"),
    "bits": (TopK(0.3, schedule=Schedule(observe=1)), "zero_grad"),
    "indexed": (TopK(0.1, schedule=Schedule(observe=1)), "frozen"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_gate_of_optimizers_passes_the_reference_and_stops_a_wrong_step(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, unselected = OPTIMIZERS[name]
    assert gates.wrong_optimizer(policy, unselected, "reference", CPU) is None

    class Heavier(gates.MaskedAdamW):
        def __init__(self, params, lr, **given):
            super().__init__(params, lr, eps=1e-3, **given)

    monkeypatch.setattr(gates, "MaskedAdamW", Heavier)
    problem = gates.wrong_optimizer(policy, unselected, "reference", CPU)
    assert problem is not None
    assert problem.startswith("error")


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_gate_of_selections_passes_the_reference_and_stops_a_wrong_set(
    scope: str, dtype: torch.dtype
) -> None:
    for as_bits, counted in ((False, False), (True, True)):
        found = topk.wrong_selection(reference, CPU, dtype, scope, as_bits=as_bits, counted=counted)
        assert found is None

    def last_ties_first(scores, *, cuts, **given):
        # as many entries, other ones
        flipped = [score.flip(tuple(range(score.dim()))) for score in scores]
        return reference.compact(flipped, cuts=cuts, **given)

    wrong = altered(compact=last_ties_first)
    problem = topk.wrong_selection(wrong, CPU, dtype, scope, as_bits=False, counted=False)
    assert problem is not None
    assert "stable sort" in problem


def test_the_gate_of_selections_stops_a_first_round_that_counts_otherwise() -> None:
    def off(*args, first_counts=None, **kwargs):
        reference.accumulate_(*args, first_counts=first_counts, **kwargs)
        first_counts[0, 0] += 1

    wrong = altered(accumulate_=off)
    problem = topk.wrong_selection(wrong, CPU, torch.float32, "global", as_bits=False, counted=True)
    assert problem == "accumulate_ counts otherwise than the reference's histogram"


def test_wrong_rows_are_not_timed_and_end_the_run_with_an_error() -> None:
    rows = [harness.Row("kernel", 8, lambda: pytest.fail("was set up"), check=lambda: "it is wrong")]
    records = harness.measure("step", "one", rows, parameters=1, anchor="", device=CPU, seconds=0.01)
    assert records[0].ms is None
    assert records[0].note == "wrong, not measured: it is wrong"
    with pytest.raises(SystemExit, match="wrong or failed, not measured: kernel"):
        harness.finish(records)


def test_a_backend_that_raises_ends_the_run_with_an_error_and_leaves_the_other_rows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [
        harness.Row(harness.COPY, 8, lambda: lambda: None),
        harness.Row("kernel", 8, lambda: undefined_name, backend="native"),  # noqa: F821
    ]
    records = harness.measure("step", "one", rows, parameters=1, anchor="", device=CPU, seconds=0.01)
    assert records[0].ms is not None
    assert records[1].note.startswith("failed, not measured: NameError")
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="kernel"):
        harness.finish(records)


# rows


def test_a_row_that_cannot_run_stays_visible_with_its_reason() -> None:
    def make() -> harness.Step:
        raise RuntimeError("needs a machine that is not here")

    rows = [harness.Row(harness.COPY, 8, lambda: lambda: None), harness.Row("kernel", 8, make)]
    record = harness.measure(
        "step", "one", rows, parameters=1, anchor=harness.COPY, device=CPU, seconds=0.01
    )[1]
    assert record.ms is None
    assert record.note == "RuntimeError: needs a machine that is not here"


def test_a_package_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"no_such_package"}
    real = peers.packages

    def all_absent(dtype):
        return {name: ("nobody", *absent, *row[2:]) for name, row in real(dtype).items()}

    monkeypatch.setattr(peers, "packages", all_absent)
    rows = peers.package_rows(operands.Operands(ONE_SHAPE, CPU))
    assert [row.name for row in rows] == ["nobody"]
    record = harness.measure("step", "one", rows, parameters=1, anchor="", device=CPU, seconds=0.01)[0]
    assert record.note == "not installed"
    names = [method.name for method in memory.methods(options())]
    assert names.count("nobody") == 1


def test_bars_compare_with_the_fastest_peer_and_with_the_copy() -> None:
    def timing(name: str, seconds: float, scratch: int | None = None) -> harness._Timing:
        row = harness.Row(name, 8.0, lambda: lambda: None)
        return harness._Timing(row, lambda: None, None, [seconds] * 3, scratch)

    all_timings = [
        timing(harness.COPY, 1.0),
        timing("slow", 8.0),
        timing("quick", 4.0),
        timing("ours", 2.0, 2**19),
    ]
    results = harness._Results({one.row.name: one for one in all_timings})
    assert harness.Faster(2.0, ("slow", "quick")).judge("ours", results) == ("2 x as fast", True)
    assert harness.Faster(2.1, ("slow", "quick")).judge("ours", results) == ("2 x as fast", False)
    assert harness.Faster(1 / 1.5, ("quick",)).judge("slow", results) == ("2 x the time", False)
    assert harness.Faster(1.0, ("not there",)).judge("ours", results) is None
    assert harness.OfCopy(50).judge("ours", results) == ("50 %", True)
    assert harness.OfCopy(51).judge("ours", results) == ("50 %", False)
    assert harness.ScratchBelow(1.0).judge("ours", results) == ("0.5 MiB", True)
    assert harness.ScratchBelow(1.0).judge("quick", results) is None


def test_memory_counts_what_an_optimizer_holds() -> None:
    held = {
        method.name: memory.held(method, ONE_SHAPE, CPU)
        for method in memory.methods(options())
        if method.name in ("torch.optim.AdamW fused, float32", "TopK, indexed, 10 %, bfloat16")
    }
    dense, listed = held.values()
    assert (dense.weights, dense.gradients, dense.states, dense.masks) == (4, 4, 8, 0)
    n = sum(torch.Size(shape).numel() for shape in ONE_SHAPE)
    share = int(0.1 * n) / n
    assert (listed.weights, listed.gradients) == (2, 2)
    assert listed.states == pytest.approx(12 * share)
    assert listed.masks == pytest.approx(4 * share)
    # the float32 statistic comes and goes
    assert listed.peak >= 2 + 2 + 4


def test_scratch_is_what_a_step_gives_back() -> None:
    x = torch.ones(1000)
    assert harness.scratch_bytes(lambda: x + 1, CPU) < 100
    assert 4000 <= harness.scratch_bytes(lambda: (x + 1) + 1, CPU) < 4100
    held = harness.storages([x, x[:10]], {"view": x.view(10, 100)})
    assert list(held.values()) == [4000]


# results and the report


def some_records() -> list[harness.Record]:
    small = operands.Operands(ONE_SHAPE, CPU)
    rows = [row for row in step.float32(small, options()) if "Bernoulli" not in row.name]
    return harness.measure(
        "step", "float32", rows, parameters=small.numel, anchor=step.FUSED, device=CPU, seconds=0.01
    )


def test_results_come_back_as_a_markdown_table(tmp_path: Path) -> None:
    shared = harness.surroundings(CPU)
    records = [harness.Record(**(asdict(record) | shared)) for record in some_records()]
    path = tmp_path / "tiny.csv"
    harness.write_csv(records, path)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.csv"]

    rows = harness.read_csv(path)
    text = report.render(rows)
    assert all(f"| {record.row} |" in text for record in records)
    written = report.replace(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n", text)
    assert text in written
    assert "stale" not in written
    assert report.replace(written, text) == written
    with pytest.raises(ValueError, match="must hold the lines"):
        report.replace("no markers", text)
    assert "everything on a GPU" in report.missing([rows])
    assert "dense steps" not in report.missing([rows])


def test_a_later_run_replaces_its_own_questions_and_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "machine.csv"
    given = options(output=path)

    def run_of(script: str, *questions: str, known: tuple[str, ...] = ("a", "b")) -> None:
        harness.keep(
            script, [harness.Record(script, name, "row", 1, "float32") for name in questions], given, known
        )

    def kept() -> list[tuple[str, str]]:
        return [(row["script"], row["question"]) for row in harness.read_csv(path)]

    run_of("step", "a", "b")
    run_of("topk", "a")
    run_of("step", "b")
    assert kept() == [("step", "a"), ("topk", "a"), ("step", "b")]
    # a question that the script no longer asks
    run_of("step", "b", known=("b",))
    assert kept() == [("topk", "a"), ("step", "b")]


@pytest.mark.skipif(
    not list(importlib.metadata.distributions(name="matplotlib")), reason="not installed: matplotlib"
)
def test_the_figures_are_drawn_from_results(tmp_path: Path) -> None:
    timings = [replace(record, machine="here", device="cpu") for record in some_records()]
    sizes = [memory.held(method, ONE_SHAPE, CPU) for method in memory.methods(options())]
    path = tmp_path / "tiny.csv"
    harness.write_csv([*timings, *sizes], path)
    results = [harness.read_csv(path)]
    assert report.draw_steps(results, tmp_path / "step.png")
    assert report.draw_memory(results, tmp_path / "memory.png")
    assert not report.draw_steps([], tmp_path / "nothing.png")
    assert {file.name for file in tmp_path.iterdir()} == {"tiny.csv", "step.png", "memory.png"}


def test_the_readme_says_what_the_committed_results_say() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert report.replace(readme, report.readme_text(report.all_results())) == readme, (
        "run python -m benchmarks.report"
    )
    for name in (report.STEP_FIGURE, report.MEMORY_FIGURE):
        assert (f"results/{name}" in readme) == (harness.RESULTS / name).is_file()
