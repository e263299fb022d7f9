"""The benchmark of several processes counts every byte that crosses, and refuses formulas that say other."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch.distributed was built without gloo", allow_module_level=True)

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from benchmarks import distributed, harness, report
from benchmarks.distributed import METHOD, Count, Place, Task, Traffic, Trainer

REPOSITORY = Path(__file__).parents[1]
CPU = torch.device("cpu")
TASK = Task(numel=5_000, seconds=0.01, only="squares", backend="reference")
RELEASED = "released, TopK, 1 %"


# what processes do; the tests read what they saw


def reduced_by_ddp() -> None:
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(64, 63))
    wrapped(torch.ones(2, 64)).sum().backward()


def redistributed() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = distribute_tensor(torch.ones(64, 64), mesh, [Shard(0)], src_data_rank=None)
    whole = sharded.redistribute(mesh, [Replicate()])
    assert whole.to_local().shape == (64, 64)
    partial = torch.distributed.tensor.DTensor.from_local(torch.ones(32, 64), mesh, [Partial()])
    partial.redistribute(mesh, [Shard(0)]).to_local().sum()
    # it takes the sum first, in the middle of the operation
    assert float(partial.relu().to_local().mean()) == dist.get_world_size()


def unwritten() -> str:
    """A collective of which nobody has said what it costs."""
    given, got = torch.ones(4), torch.empty(4)
    try:
        distributed.counted(lambda: dist.all_to_all_single(got, given))
    except distributed.WrongResultError as error:
        return str(error)
    return "not refused"


def spoiled(rank: int) -> list[str]:
    """What the gate says of weights that are off on one rank or on all, and of some that stand still."""
    truth, before = [torch.ones(5)], [torch.zeros(5)]
    cases = [torch.ones(5), torch.ones(5) + 1e-3 * rank, torch.ones(5) + 1e-3]
    found = [distributed.differing("rows", [weights], truth, before) for weights in cases]
    return [*found, distributed.differing("rows", truth, truth, truth)]


def look(rank: int, device: torch.device) -> dict[str, Any]:
    ranks = dist.get_world_size()
    place = Place(rank, ranks, device, "reference")
    torch.manual_seed(0)
    model = distributed.Net(5_000)
    asked = distributed.sizes(model)
    # one of each way to cross is enough in the larger group, and on the wire
    few = (distributed.BASELINE, RELEASED, "FSDP2, TopK, 1 %")
    counts = [
        (name, asked, distributed.count_phases(Trainer(method, model, place), on_wire=name in few))
        for name, method in METHOD.items()
        if ranks == 2 or name in few
    ]
    own: Any = dist.group.WORLD
    past_torch = own._get_backend(device)
    ones = torch.ones(4096)
    result: dict[str, Any] = {"counts": counts, "problems": [], "seconds": {}}
    if ranks == 2:
        result["seen"] = {
            step.__name__: distributed.counted(step, on_wire=True) for step in (reduced_by_ddp, redistributed)
        }
        dist.barrier()
        bypassing = distributed.counted(lambda: past_torch.allreduce([ones]).wait(), on_wire=True)
        result |= {
            "bypassing": bypassing,
            "hidden": distributed.hidden(bypassing, ranks),
            "unwritten": unwritten(),
            "spoiled": spoiled(rank),
        }
        result["examined"] = distributed.examine(place, TASK)
    return result


@pytest.fixture(scope="module")
def pair() -> list[dict[str, Any]]:
    return distributed.in_processes(2, "cpu", look)


def test_collectives_are_seen_whoever_calls_them(pair: list[dict[str, Any]]) -> None:
    for answer in pair:
        seen = {name: Count.read(values) for name, values in answer["seen"].items()}
        # DDP's reducer is C++, and so is what makes parameters equal when it is built
        assert seen["reduced_by_ddp"].traffic.all_reduce == 4 * (64 * 63 + 63)
        assert seen["reduced_by_ddp"].traffic.broadcast >= 4 * (64 * 63 + 63)
        assert seen["redistributed"].traffic.all_gather == 4 * 32 * 64
        assert seen["redistributed"].traffic.reduce_scatter == 4 * 32 * 64
        assert seen["redistributed"].traffic.all_reduce == 4 * 32 * 64
        assert distributed.hidden(seen["redistributed"], 2) == ""


@pytest.mark.skipif(distributed.sent() is None, reason="the kernel does not count what a socket has sent")
def test_a_collective_that_torch_does_not_dispatch_is_seen_on_the_wire(pair: list[dict[str, Any]]) -> None:
    for answer in pair:
        count = Count.read(answer["bypassing"])
        assert count.traffic.handed == 0
        assert count.sent is not None and count.sent > 4 * 4096
        assert "the bytes on the wire must be 0 and headers, got " in answer["hidden"]


def test_a_collective_of_unknown_cost_is_refused(pair: list[dict[str, Any]]) -> None:
    for answer in pair:
        assert "the bytes of a collective must be known, got c10d::alltoall" in answer["unwritten"]


def test_the_gate_stops_weights_that_differ_or_stand_still(pair: list[dict[str, Any]]) -> None:
    for answer in pair:
        right, apart, off, still = answer["spoiled"]
        assert right == ""
        assert apart == "rows: ranks must hold the same weights, got different ones."
        assert "must be those of one process within 1e-06 and move, got 0.001 off" in off
        assert "off after moving by 0." in still


# formulas


@pytest.mark.parametrize("ranks", [2, 4])
def test_formulas_give_the_counted_bytes_of_every_phase(ranks: int, request: pytest.FixtureRequest) -> None:
    answers = request.getfixturevalue("pair") if ranks == 2 else distributed.in_processes(4, "cpu", look)
    assert len(answers) == ranks
    names = [name for name, _, _ in answers[0]["counts"]]
    assert names == list(METHOD) if ranks == 2 else RELEASED in names
    distributed.check(answers, ranks)
    # not because nothing crossed
    _, asked, phases = answers[0]["counts"][names.index(RELEASED)]
    trains = Count.read(phases["trains"]).traffic
    assert trains.all_reduce == 4 * (asked["weights"] // 100) + 28 * asked["tensors"]


WRONG = {
    "a flag a tensor too few": lambda found: found._replace(all_reduce=found.all_reduce - 4),
    "gathers half as large": lambda found: found._replace(all_gather=found.all_gather // 2),
    "one scatter for all micro-batches": lambda found: found._replace(reduce_scatter=0),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_formula_ends_the_run_and_keeps_nothing(
    what: str, pair: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = distributed.predicted
    monkeypatch.setattr(distributed, "predicted", lambda *args, **kwargs: WRONG[what](right(*args, **kwargs)))
    monkeypatch.setattr(distributed, "in_processes", lambda *args: pair)
    path = tmp_path / "tiny.csv"
    with pytest.raises(SystemExit, match=r"nothing is kept: rank 0 of 2, .* must be the predicted Traffic"):
        distributed.main(["--quick", "--device", "cpu", "--output", str(path)])
    assert not path.exists()


def test_bytes_that_nobody_counted_and_wrong_weights_end_the_run(pair: list[dict[str, Any]]) -> None:
    name, asked, phases = pair[0]["counts"][0]
    traffic, calls, _ = phases["trains"]
    more = phases | {"trains": (traffic, calls, 2 * traffic[0])}
    with pytest.raises(distributed.WrongResultError, match="got 84,480; count the collective"):
        distributed.check([pair[0] | {"counts": [(name, asked, more)]}], 2)
    with pytest.raises(distributed.WrongResultError, match="rank 0 of 2, that is wrong"):
        distributed.check([pair[0] | {"problems": ["that is wrong"]}], 2)


def test_what_rings_and_gloo_send() -> None:
    traffic = Traffic(all_reduce=800, all_gather=100, reduce_scatter=400, broadcast=8)
    assert traffic.handed == 1308
    assert traffic.ring(2) == 800 + 100 + 200 + 8
    assert traffic.ring(4) == 1200 + 300 + 300 + 8
    # its reduce-scatter is an all-reduce
    assert traffic.gloo(4) == 1200 + 300 + 600 + 8


def test_bytes_grow_with_what_they_depend_on() -> None:
    model = {"weights": 1_000_000, "tensors": 10, "root": 200_000}
    dense = distributed.predicted("ddp", "trains", ranks=8, **model)
    assert dense == distributed.predicted("ddp", "trains", ranks=8, micro_batches=4, **model)
    assert dense.handed == 4_000_000
    listed = functools.partial(
        distributed.predicted, "released", "trains", statistic="signed", ranks=8, **model
    )
    assert listed(ranks=8, density=0.02).handed - listed(ranks=9, density=0.01).handed == 40_000
    sharded = functools.partial(
        distributed.predicted, "fsdp", "selects", statistic="squares", ranks=8, **model
    )
    assert sharded(element=2).all_gather == 2 * 1_800_000 / 8
    assert sharded(micro_batches=3).reduce_scatter == 3 * 4_000_000
    counts = sharded().all_reduce - 44
    assert counts == 40_968
    assert sharded(scope="tensor").all_reduce - 44 == 10 * counts


# rows


def test_measured_rows_and_those_on_paper_are_kept_and_become_tables(
    pair: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(distributed, "in_processes", lambda *args: [answer["examined"] for answer in pair])
    path = tmp_path / "tiny.csv"
    distributed.main(["--quick", "--device", "cpu", "--rows", TASK.only, "--output", str(path)])
    printed = capsys.readouterr().out
    rows = harness.read_csv(path)
    names = [row["row"] for row in rows if row["question"] == "2 processes"]
    assert names == [distributed.BASELINE, f"{RELEASED}, squares"]
    for row in rows:
        assert row["row"] in printed and row["handed"] and row["ring"]
        assert bool(row["ms"]) == (row["question"] == "2 processes") == (not row["assumed_gb_per_s"])
    paper = [row for row in rows if row["question"] == "on paper, 7B weights" and row["row"] == names[1]]
    assert [int(row["processes"]) for row in paper] == list(distributed.PAPER_RANKS)
    text = report.render(rows)
    assert f"| {RELEASED}, squares, the step that selects | 47.2 GB, 943 ms |" in text
    assert "predicted, not measured, at an assumed 50 GB/s" in text
    assert "| 42,240 | 42,240 | " in text


def test_a_quick_run_prints_and_keeps_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "tiny.csv"
    command = ["--quick", "--device", "cpu", "--backend", "reference", "--rows", "Bernoulli"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.distributed", *command, "--output", str(path)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = harness.read_csv(path)
    for row in rows[:2]:
        assert row["row"] in done.stdout
        assert row["ms"] and row["command"].startswith("python -m benchmarks.distributed --quick")
    assert rows[1]["times_as_fast_as"].startswith(distributed.BASELINE)


def test_gpus_that_are_not_there_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    asked = harness.Options(torch.device("cuda"), 5_000, True, "fsdp2, torch", ("reference",), 0.01, None)
    rows = distributed.measured(2, asked)
    assert [row.note for row in rows] == ["needs 2 GPUs, got 1"] * 2
    assert distributed.measured(2, replace(asked, backends=()))[0].row == distributed.BASELINE
