"""Killed in a backward pass, in a selection, in a checkpoint: torchrun starts the processes again, they go on
from the last whole checkpoint, and every later one has the bits of a run that nothing disturbed.

As a program this is torchrun, and what its processes run.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from multiprocessing import get_all_start_methods, set_forkserver_preload
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

if not (distributed.is_available() and distributed.is_gloo_available()):
    pytest.skip("torch.distributed was built without gloo", allow_module_level=True)
if "forkserver" not in get_all_start_methods() or not hasattr(signal, "SIGKILL"):
    pytest.skip("processes would each load torch anew", allow_module_level=True)

from torch.distributed import checkpoint
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparse_optim import MaskedAdamW, Schedule, TopK

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
ROOT = Path(__file__).parent.parent
SAVE_EVERY = 3  # in any phase: these change every two steps
# "writing" is the later part of "checkpoint", where there are files already
KINDS = ("backward", "selection", "checkpoint", "writing")


# what each process does


class Killer:
    """Kills its process at a random moment of what the first kill of a plan that is still to come names."""

    def __init__(self, folder, rank):
        self.folder, self.rank, self.step = folder, rank, 0
        kills = json.loads((folder / "plan.json").read_text())
        self.kills = [kill for kill in kills if not (folder / f"killed_{kill['number']}").exists()]
        known = folder / f"usual_{rank}.json"
        # how long each takes
        self.usual = json.loads(known.read_text()) if known.exists() else {}
        self.lock, self.now = threading.Lock(), []

    def is_due(self, kind):
        kill = self.kills[0] if self.kills else {"kind": None}
        return kill["kind"] == kind and kill["rank"] == self.rank and kill["step"] <= self.step

    def die(self, kind, delay):
        with self.lock:
            if kind in self.now:
                frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
                told = {"step": self.step, "delay": delay, "in": [frame.name for frame in frames[-3:]]}
                # so that it happens once
                path = self.folder / f"killed_{self.kills[0]['number']}"
                path.write_text(json.dumps(self.kills[0] | told))
                os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def moment(self, kind):
        self.now.append(kind)
        started, timer = time.perf_counter(), None
        if self.is_due(kind):
            # the first time in a process takes longer than usual; one that comes too late comes another time
            delay = random.uniform(0, 1.2 * self.usual[kind])
            timer = threading.Timer(delay, self.die, (kind, delay))
            timer.start()
        try:
            yield
        finally:
            # one that has begun is waited for
            with self.lock:
                self.now.remove(kind)
            if timer is not None:
                timer.cancel()
            self.usual[kind] = time.perf_counter() - started


class Writer(checkpoint.FileSystemWriter):
    """Tells when it begins to write files."""

    def __init__(self, path, on_writing):
        super().__init__(path)
        self.on_writing = on_writing

    def write_data(self, *args, **kwargs):
        self.on_writing()
        return super().write_data(*args, **kwargs)


def whole(folder):
    """Steps of the checkpoints that are whole: the list of contents is written when all else is."""
    return sorted(int(path.parent.name) for path in folder.glob("*/.metadata"))


def made(mesh=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    if mesh is not None:
        for layer in model[::2]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    policy = TopK(0.3, schedule=Schedule(observe=2, train=2))
    return model, MaskedAdamW(model.named_parameters(), lr=0.02, policy=policy)


def saved(model, optimizer):
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


def loss_of(model, step, rank=0, world=1):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 24, generator=generator)
    own = inputs.tensor_split(world)[rank]
    return (model(own) - own[:, :8].sin()).square().mean()


def train(folder, steps, killer, mesh):
    model, optimizer = made(mesh)
    first = max(whole(folder), default=0)
    if first:
        state = saved(model, optimizer)
        checkpoint.load(state, checkpoint_id=folder / str(first))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    until, select = ExitStack(), optimizer._selection

    def selection(*args, **kwargs):
        until.enter_context(killer.moment("selection"))
        return select(*args, **kwargs)

    optimizer._selection = selection
    for step in range(first + 1, steps + 1):
        killer.step = step
        loss = loss_of(model, step, mesh.get_local_rank(), mesh.size())
        with killer.moment("backward"):
            loss.backward()
        with until:
            optimizer.step()
        optimizer.zero_grad()
        if step % SAVE_EVERY == 0 or step == steps:
            with killer.moment("checkpoint"), until:
                writer = Writer(folder / str(step), lambda: until.enter_context(killer.moment("writing")))
                checkpoint.save(saved(model, optimizer), storage_writer=writer)
            # the undisturbed run knows of no kills
            if mesh.get_local_rank() == 0 and killer.kills:
                # at once: the other process may die meanwhile, and this one with it
                written = killer.folder / "saved.new"
                written.write_text(str(step))
                written.replace(killer.folder / "saved")


def work(folder):
    """One life of a process."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "nothing was selected in parameter group")
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-4)  # a kill does not wait for its turn
    # of a killed process the other hears soon
    distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
    try:
        mesh, rank = init_device_mesh("cpu", (2,)), distributed.get_rank()
        steps = json.loads((folder / "steps.json").read_text())
        undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
        killer = Killer(folder, rank)
        if steps not in whole(undisturbed):
            kills, killer.kills = killer.kills, []
            train(undisturbed, steps, killer, mesh)
            (folder / f"usual_{rank}.json").write_text(json.dumps(killer.usual))
            killer.kills = kills
        if rank == 0:
            disturbed.mkdir(exist_ok=True)
            there = [int(path.name) for path in disturbed.iterdir() if path.is_dir()]
            said = folder / "saved"
            life = {
                "whole": whole(disturbed),
                "unfinished": sorted(set(there) - set(whole(disturbed))),
                "saved": int(said.read_text()) if said.exists() else 0,
            }
            number = os.environ["TORCHELASTIC_RESTART_COUNT"]
            (folder / f"life_{number}.json").write_text(json.dumps(life))
        train(disturbed, steps, killer, mesh)
    finally:
        distributed.destroy_process_group()


def launch(folder):
    """Torchrun, which starts processes that have loaded what they need."""
    from torch.distributed.run import main

    # what processes that are dead left in the store that torchrun keeps would mislead those that come
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    set_forkserver_preload(["__main__", "torch._dynamo"])
    restarts = len(json.loads((folder / "plan.json").read_text()))
    words = f"--standalone --nproc-per-node 2 --max-restarts {restarts} --monitor-interval 0.05"
    main([*words.split(), "--start-method", "forkserver", "--run-path", __file__, str(folder)])


# the tests


@pytest.fixture(scope="module")
def ran(request, tmp_path_factory):
    """The folder of a run with kills of each kind, and the kills."""
    folder = tmp_path_factory.mktemp("elastic")
    times = {"backward": 20, "selection": 20, "checkpoint": 10, "writing": 10}
    dice, every_case = random.Random(0), request.config.getoption("--every-case")
    kinds = [kind for kind in KINDS for _ in range(times[kind] if every_case else 1)]
    if every_case:
        dice.shuffle(kinds)
    # the only selection, if there is but one, is that of step 10: what has been observed is then in the
    # checkpoint of step 9
    plan = [
        {"number": number, "kind": kind, "rank": dice.randrange(2), "step": 4 * number + dice.randint(3, 4)}
        for number, kind in enumerate(kinds)
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    # some are later than planned, and after the last there are two selections
    (folder / "steps.json").write_text(json.dumps(6 * len(plan) + 42))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "launch", str(folder)]
    seconds = 240 + 10 * len(plan)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-8000:]
    return folder, plan


def contents(folder, step, into):
    """All tensors and numbers of a checkpoint, by their names."""
    dcp_to_torch_save(folder / str(step), into)

    def leaves(name, value):
        if isinstance(value, dict):
            for key in value:
                yield from leaves(f"{name}/{key}", value[key])
        elif isinstance(value, list | tuple):
            yield from leaves(name, dict(enumerate(value)))
        else:
            yield name, value

    return dict(leaves("", torch.load(into, weights_only=True)))


def differences(one, other):
    assert one.keys() == other.keys()
    return [
        key
        for key, value in one.items()
        if not (torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key])
    ]


@pytest.mark.slow
def test_processes_die_of_every_kill_and_start_again_after_each(ran):
    folder, plan = ran
    killed = [json.loads((folder / f"killed_{kill['number']}").read_text()) for kill in plan]
    assert Counter(kill["kind"] for kill in killed) == Counter(kill["kind"] for kill in plan)
    assert len(list(folder.glob("life_*.json"))) == len(plan) + 1


@pytest.mark.slow
def test_after_each_kill_training_goes_on_from_the_last_checkpoint_that_was_saved(ran):
    folder, plan = ran
    lives = [json.loads((folder / f"life_{i}.json").read_text()) for i in range(len(plan) + 1)]
    killed = [json.loads((folder / f"killed_{kill['number']}").read_text()) for kill in plan]
    assert lives[0] == {"whole": [], "unfinished": [], "saved": 0}
    for kill, before, life in zip(killed, lives, lives[1:], strict=False):
        last = max(life["whole"], default=0)
        known = max(life["saved"], *before["whole"], 0)
        # one whose process was killed when all was written is whole, too
        assert last in (known, kill["step"]) and last >= known
        # nothing that was saved is lost
        assert life["whole"] == list(range(SAVE_EVERY, last + 1, SAVE_EVERY))
        # and what is not whole is what comes next
        assert life["unfinished"] in ([], [last + SAVE_EVERY])
        if kill["kind"] == "writing":
            assert kill["step"] in (*life["whole"], *life["unfinished"])
    if len(plan) > len(KINDS):
        assert sum(bool(life["unfinished"]) for life in lives) > 2


@pytest.mark.slow
def test_every_checkpoint_of_a_run_with_kills_is_that_of_a_run_without_to_the_bit(ran, tmp_path):
    folder, _ = ran
    steps = whole(folder / "undisturbed")
    assert steps == whole(folder / "disturbed") and len(steps) > 9
    for step in steps:
        one, other = (contents(folder / name, step, tmp_path / name) for name in ("undisturbed", "disturbed"))
        assert not differences(one, other), step
    # weights move until the end
    assert differences(one, contents(folder / "undisturbed", steps[-2], tmp_path / "before"))


class _Killed(BaseException):
    """What nothing handles."""


@pytest.fixture
def killed_at(monkeypatch):
    """Saving that ends at a number of file operations; what is open then is not closed."""
    left = [None]

    def counted(owner, name):
        call = getattr(owner, name)

        def counting(*args, **kwargs):
            if left[0] == 0:
                raise _Killed
            if left[0] is not None:
                left[0] -= 1
            return call(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    for name in ("mkdir", "create_stream", "rename", "rm_file"):
        counted(filesystem.FileSystem, name)
    counted(os, "fsync")
    counted(filesystem, "_write_item")

    def save(state, path, operations):
        left[0] = operations
        try:
            checkpoint.save(state, checkpoint_id=path)
            return True
        # torch makes one exception of what it catches
        except checkpoint.CheckpointException as error:
            if not all(isinstance(each, _Killed) for each, _ in error.failures.values()):
                raise
        except _Killed:
            pass
        finally:
            left[0] = None
        return False

    return save


def test_a_checkpoint_that_is_cut_off_anywhere_is_not_taken_for_a_whole_one(killed_at, tmp_path):
    model, optimizer = made()
    optimizer.dense_state_dict = True
    for step in (1, 2):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        checkpoint.save(saved(model, optimizer), checkpoint_id=tmp_path / "unharmed" / str(step))
    kept = [contents(tmp_path / "unharmed", step, tmp_path / "tensors") for step in (1, 2)]
    folder, operations = tmp_path / "harmed", 0
    shutil.copytree(tmp_path / "unharmed" / "1", folder / "1")
    # each time over what the time before has left
    while not killed_at(saved(model, optimizer), folder / "2", operations):
        assert whole(folder) == [1]
        operations += 1
    # a folder, streams, tensors, the disk, a list and its name
    assert whole(folder) == [1, 2] and operations > 10
    for step in (1, 2):
        assert not differences(kept[step - 1], contents(folder, step, tmp_path / "tensors"))


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        launch(Path(sys.argv[2]))
    else:
        work(Path(sys.argv[1]))
