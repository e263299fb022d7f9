"""Builds the optional native libraries from csrc/: `sparse_optim._C` for the CPU and, where nvcc is found,
`sparse_optim._cuda`. Everything else is said in pyproject.toml.

The package is complete without them. Variables, all of the build alone:

    SPARSE_OPTIM_BUILD_EXT   unset: a build that fails is one warning; 1: it is an error; 0: nothing is built
    MAX_JOBS                 how many compilers run at a time
    CUDA_HOME                where bin/nvcc is; unset: it is looked for in PATH and in /usr/local/cuda
    TORCH_CUDA_ARCH_LIST     the GPUs to build for, such as "8.0;9.0+PTX"; unset: all from 7.5 on

torch must be importable while building, so build with `pip install --no-build-isolation .`, or in place with
`python setup.py build_ext --inplace`.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
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
CUDA_SOURCES = ["csrc/cuda/adamw_cuda.cu", "csrc/cuda/select_cuda.cu"]
CUDA_HEADERS = [*HEADERS[:5], "csrc/cuda/entries.cuh", "csrc/cuda/launch.h"]
# machine code of 8.0 runs on 8.6 and 8.9 too, and so on within a generation
CUDA_ARCHITECTURES = (75, 80, 90, 100, 120)
CUDA_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xfatbin", "-compress-all"]
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
CUDA_FLAGS += ["-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"]
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


def find_nvcc() -> Path | None:
    """CUDA's compiler, where there is one."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        places = [Path(home) / "bin" / "nvcc"]
    else:
        places = [Path(shutil.which("nvcc") or "nvcc"), Path("/usr/local/cuda/bin/nvcc")]
    return next((place for place in places if place.exists()), None)


def cuda_libraries(nvcc: Path) -> list[str]:
    """Where CUDA's libraries lie. Not a place beside nvcc, which may be a script that calls another."""
    command = [str(nvcc), "--dryrun", "-c", CUDA_SOURCES[0]]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return [path for path in re.findall(r'"-L([^"]+)"', said) if not path.endswith("stubs")]


def architectures(nvcc: Path) -> list[str]:
    """What nvcc is told to build for."""
    if wanted := os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split():
        flags = []
        for name in wanted:
            found = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
            if found is None:
                raise ValueError(
                    f"TORCH_CUDA_ARCH_LIST must hold versions such as 8.0 or 9.0+PTX, got {name!r}"
                )
            number = found[1] + found[2]
            codes = f"sm_{number}" + (f",compute_{number}" if found[3] else "")
            flags.append(f"-gencode=arch=compute_{number},code=[{codes}]")
        return flags
    listed = subprocess.run([str(nvcc), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = [number for number in CUDA_ARCHITECTURES if f"sm_{number}" in listed.split()]
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in known]
    # the newest also as PTX, which the driver compiles for GPUs that are newer still
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


def cuda_mismatch(nvcc: Path, torch_cuda: str | None) -> str | None:
    """Why this compiler does not go with this torch, or None. A torch without CUDA goes with any."""
    version = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", version)
    if found is None or int(found[1]) < 12:
        return f"nvcc is older than 12.0 ({version.strip().splitlines()[-1]})"
    if torch_cuda is not None and torch_cuda.split(".")[0] != found[1]:
        return f"nvcc is of CUDA {found[1]}, torch of CUDA {torch_cuda}"
    return None


def compile_cuda(nvcc: Path, directory: Path) -> list[str]:
    """Objects of the CUDA sources; those that are newer than all they are made of are kept."""
    flags = [*CUDA_FLAGS, *architectures(nvcc)]
    directory.mkdir(parents=True, exist_ok=True)
    said = directory / "cuda_flags"
    same_flags = said.exists() and said.read_text() == " ".join(flags)
    newest = max(Path(path).stat().st_mtime for path in [*CUDA_SOURCES, *CUDA_HEADERS])
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    threads = max(jobs // len(CUDA_SOURCES), 1)

    def compile_one(source: str) -> str:
        target = directory / f"{Path(source).stem}.o"
        if not (same_flags and target.exists() and target.stat().st_mtime > newest):
            command = [str(nvcc), *flags, f"--threads={threads}", "-c", source, "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"nvcc does not compile {source}: {done.stderr.strip()}")
        return str(target)

    print("sparse_optim: compiling the CUDA kernels, which takes minutes", file=sys.stderr, flush=True)
    with concurrent.futures.ThreadPoolExecutor(max_workers=min(jobs, len(CUDA_SOURCES))) as pool:
        objects = list(pool.map(compile_one, CUDA_SOURCES))
    said.write_text(" ".join(flags))
    return objects


def native() -> dict[str, Any]:
    """The arguments of `setup` that build the libraries, or none."""
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
                if nvcc is not None and extension.name == "sparse_optim._cuda":
                    extension.extra_objects = compile_cuda(nvcc, Path(self.build_temp) / "cuda")
                super().build_extension(extension)
            except Exception as error:
                # else the library of an earlier build would be shipped in its place
                self.extensions = [other for other in self.extensions if other is not extension]
                give_up(
                    f"{extension.name} does not compile ({error})",
                    "see the compiler's messages above, mend what they name and build again",
                )

    macros = [("TORCH_TARGET_VERSION", f"0x{TORCH_TARGET:016x}")]
    libraries = [
        CppExtension(
            "sparse_optim._C",
            SOURCES,
            depends=HEADERS,
            define_macros=macros,
            extra_compile_args=COMPILE_FLAGS,
            py_limited_api=True,
        )
    ]
    nvcc = find_nvcc()
    if nvcc is not None and (mismatch := cuda_mismatch(nvcc, torch.version.cuda)):
        give_up(mismatch, "install the CUDA toolkit that torch was built with, and build again")
        nvcc = None
    if nvcc is not None:
        libraries.append(
            CppExtension(
                "sparse_optim._cuda",
                ["csrc/cuda/ops_cuda.cpp"],
                depends=["csrc/ops.cpp", *CUDA_SOURCES, *CUDA_HEADERS],
                define_macros=macros,
                extra_compile_args=COMPILE_FLAGS,
                library_dirs=cuda_libraries(nvcc),
                libraries=["cudart_static", "dl", "rt", "pthread"],
                # torch's CUDA build need not be at hand here: where the library is used, libtorch brings it
                extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"],
                py_limited_api=True,
            )
        )
    return {
        "ext_modules": libraries,
        "cmdclass": {"build_ext": BuildNative},
        # one wheel for every Python from 3.10 on
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setuptools.setup(**native())
