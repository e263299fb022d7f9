"""Builds the optional native library `sparse_optim._C` from csrc/. Everything else is said in pyproject.toml.

The package is complete without it. Two variables, both of the build alone:

    SPARSE_OPTIM_BUILD_EXT   unset: a build that fails is one warning; 1: it is an error; 0: nothing is built
    MAX_JOBS                 how many compilers run at a time

torch must be importable while building, so build with `pip install --no-build-isolation .`, or in place with
`python setup.py build_ext --inplace`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from typing import Any

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"error: sparse_optim needs setuptools>=77 to be built, got {setuptools.__version__}; "
        "run `python -m pip install --upgrade setuptools` first."
    )

WANTED = os.environ.get("SPARSE_OPTIM_BUILD_EXT", "")
# setup.py also runs for the metadata alone, where a warning would be a repetition
BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}
BUILDING = not BUILD_COMMANDS.isdisjoint(sys.argv)
# the oldest torch whose stable interface the library uses; one build serves this and every later version
TORCH_TARGET = 0x020A000000000000
SOURCES = ["csrc/ops.cpp", "csrc/cpu/adamw_cpu.cpp", "csrc/cpu/select_cpu.cpp", "csrc/cpu/kernels.cpp"]
HEADERS = ["csrc/host_device.h", "csrc/dtypes.h", "csrc/philox.h", "csrc/adamw.h", "csrc/verbs.h"]
HEADERS += ["csrc/cpu/kernels.h", "csrc/cpu/kernels_body.h"]
# contracting a * b + c into one rounding would make scores, and so masks, differ between backends
COMPILE_FLAGS = [
    "-O3",
    "-g0",
    "-ffile-prefix-map=" + os.getcwd() + "=.",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
]
# no loop with a square root or a choice is vectorised otherwise; neither changes a value
COMPILE_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
# torch's own headers are compiled as part of ours
COMPILE_FLAGS += ["-Wno-unused-parameter", "-Wno-sign-compare"]


def give_up(reason: str, remedy: str) -> None:
    """One warning, or the end when the native library was asked for."""
    message = f"sparse_optim: the native library is not built: {reason}; {remedy}."
    if WANTED == "1":
        raise SystemExit(f"error: {message}")
    print(f"warning: {message} The package works without it, more slowly.", file=sys.stderr, flush=True)


def compiler_complaint() -> str | None:
    """What is wrong with the C++ compiler, or None."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    program = "#include <cstdint>\n"
    try:
        done = subprocess.run(command, input=program, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"the C++ compiler {compiler[0]!r} does not start ({error.strerror})"
    if done.returncode:
        why = next(iter(done.stderr.splitlines()), f"exit status {done.returncode}")
        return f"the C++ compiler {compiler[0]!r} does not compile C++20 ({why})"
    return None


def native() -> dict[str, Any]:
    """The arguments of `setup` that build the library, or none."""
    if WANTED not in ("", "0", "1"):
        raise SystemExit(f"error: SPARSE_OPTIM_BUILD_EXT must be 0, 1 or unset, got {WANTED!r}; unset it.")
    if WANTED == "0" or not BUILDING:
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except (
        Exception
    ) as error:  # whatever a broken installation raises: the package does not need torch to build
        give_up(
            f"torch cannot be imported ({type(error).__name__}: {error})",
            "install torch>=2.10 first and build with `pip install --no-build-isolation .`",
        )
        return {}
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        give_up(f"torch {torch.__version__} is older than 2.10", "upgrade torch and build again")
        return {}
    if complaint := compiler_complaint():
        give_up(complaint, "install one, or name one with CXX=, and build again")
        return {}

    class BuildNative(BuildExtension):
        """torch's command lets a failure escape even from an extension that is marked optional."""

        def build_extension(self, extension: Any) -> None:
            try:
                super().build_extension(extension)
            except Exception as error:
                # else the library of an earlier build would be shipped in its place
                self.extensions = [other for other in self.extensions if other is not extension]
                give_up(
                    f"{extension.name} does not compile ({error})",
                    "see the compiler's messages above, mend what they name and build again",
                )

    library = CppExtension(
        "sparse_optim._C",
        SOURCES,
        depends=HEADERS,
        define_macros=[("TORCH_TARGET_VERSION", f"0x{TORCH_TARGET:016x}")],
        extra_compile_args=COMPILE_FLAGS,
        py_limited_api=True,
    )
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": BuildNative},
        # one wheel for every Python from 3.10 on
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setuptools.setup(**native())
