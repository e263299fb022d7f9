"""The CUDA backend without a GPU: csrc/cuda compiled by the C++ compiler against cuda_on_cpu.h, and a second
copy of the module `native` that calls it. Everything but the GPU is what users run.
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch
from torch.utils import cpp_extension

from sparse_optim.backends import native

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc/cuda/ops_cuda.cpp", "csrc/cuda/adamw_cuda.cu", "csrc/cuda/select_cuda.cu")
FLAGS = (
    "-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-DSPARSE_OPTIM_EMULATED",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DPy_LIMITED_API=0x030A0000", "-Wno-unknown-pragmas",
)  # fmt: skip
COMPILER = shlex.split(os.environ.get("CXX", "c++"))


def why_not() -> str:
    """Why the library cannot be built here; empty where it can."""
    if not all((ROOT / source).is_file() for source in SOURCES):
        return "needs the source tree"
    return "" if shutil.which(COMPILER[0]) else f"needs the compiler {COMPILER[0]}"


def _build(target: Path) -> None:
    include = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"], str(ROOT / "tests")]
    places = [f"-I{path}" for path in include]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    # one compiler after the other: other tests want the cores too
    objects = []
    for source in SOURCES:
        objects.append(target.with_suffix(f".{len(objects)}.o"))
        command = [*COMPILER, *FLAGS, *places, "-x", "c++", "-c", str(ROOT / source), "-o", str(objects[-1])]
        subprocess.run(command, check=True, capture_output=True, text=True)
    part = target.with_suffix(".part")
    link = [*COMPILER, "-shared", "-o", str(part), *map(str, objects), *libraries]
    subprocess.run([*link, "-ltorch", "-ltorch_cpu", "-lc10"], check=True, capture_output=True, text=True)
    for made in objects:
        made.unlink()
    part.rename(target)


@functools.cache
def library() -> Path:
    """The emulated library, built when its sources have changed, by whoever needs it first."""
    contents = hashlib.sha256(torch.__version__.encode())
    for path in sorted([*ROOT.glob("csrc/**/*.*"), ROOT / "tests" / "cuda_on_cpu.h"]):
        contents.update(path.read_bytes())
    target = ROOT / "build" / "emulated" / f"{contents.hexdigest()[:16]}.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            for old in target.parent.glob("*.so"):
                old.unlink()
            try:
                _build(target)
            except subprocess.CalledProcessError as error:
                raise RuntimeError(f"the CUDA sources do not compile for the CPU:\n{error.stderr}") from None
    return target


@functools.cache
def load():
    """`native` as it is for CUDA tensors, with CPU tensors in their place."""
    torch.ops.load_library(str(library()))
    spec = importlib.util.spec_from_file_location("sparse_optim.backends._emulated", native.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._ops = torch.ops.sparse_optim_emulated
    module._is_there = lambda clock, draws: not draws.one_word
    # as OnGPU in test_backends: steps lie on the device where the learning rate does
    numbers = module._Numbers

    class Numbers(numbers):
        def __init__(self, steps, lr, *others):
            module._counted_there = lambda steps: isinstance(lr, torch.Tensor)
            super().__init__(steps, lr, *others)

    module._Numbers = Numbers
    return module
