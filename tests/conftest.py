"""What every test runs under: one thread, one seed, and memory that nobody has written yet is poison."""

import functools
import gc
import importlib.util
import logging
import math
import os
import random
import sys
import zlib
from collections import defaultdict

import numpy
import pytest
import torch

if not torch.cuda.is_available():
    # before anything imports Triton: its interpreter then runs the kernels on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

# a program: importing it would switch the interpreter off
collect_ignore = ["compiled_kernels.py"]


def pytest_addoption(parser):
    parser.addoption("--every-case", action="store_true", help="run the cases that `one_in` leaves out, too")


def pytest_configure(config):
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Of each test's cases marked `one_in(n)` keep every n-th, always the same ones, in no order of theirs,
    and none where n is 0; with `by` the name of a parameter, of those for each of its values. Examples that
    draw need matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        for item in items:
            if item.nodeid.startswith("sparse_optim/plots.py"):
                item.add_marker(pytest.mark.skip(reason="not installed: matplotlib"))
    if config.getoption("--every-case"):
        return
    marked = defaultdict(list)
    for item in items:
        for mark in item.iter_markers("one_in"):
            value = item.callspec.params[mark.kwargs["by"]] if mark.kwargs else None
            marked[item.nodeid.partition("[")[0], mark.args, repr(value)].append(item)
    left_out = set()
    for (_, (n,), _), cases in marked.items():
        cases.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        left_out.update(cases[math.ceil(len(cases) / n) if n else 0 :])
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True, scope="module")
def _frozen_heap():
    """What collecting and earlier tests have made stays: collecting garbage then does not look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def every_case(request):
    """Whether tests take the time that they like."""
    return request.config.getoption("--every-case")


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def _poisoned(allocate):
    """`allocate`, filled with NaN, True or the largest integer when called from inside the package."""

    @functools.wraps(allocate)
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or kwargs.get("out") is not None:
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] == "sparse_optim":
            if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
                tensor.fill_(float("nan"))
            else:
                tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)
        return tensor

    return poisoned


@pytest.fixture(autouse=True)
def _poison_uninitialized_memory(monkeypatch):
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture
def torchs_own_bits(monkeypatch):
    """For tests that compare with torch's for-loop bit for bit: the default backend is the reference, which
    promises that. The others promise to be as close to float64 (test_backends.py).
    """
    from sparse_optim import MaskedAdamW

    monkeypatch.setitem(MaskedAdamW.__init__.__kwdefaults__, "backend", "reference")


@pytest.fixture
def quiet_logs(monkeypatch):
    """Logging does not complain, on the stderr of a command, of handlers that libraries made while another
    command ran in this process: what these write to is closed.
    """
    monkeypatch.setattr(logging, "raiseExceptions", False)
