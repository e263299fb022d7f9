"""Contract under test: what is installed, what an import costs, how the native library's build may fail,
and the rules that hold between files: who may import whom, and no file names a place on somebody's machine.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sparse_optim
from sparse_optim.backends import why_not

ROOT = Path(__file__).parent.parent
PACKAGE = Path(sparse_optim.__file__).parent


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "SPARSE_OPTIM_BUILD_EXT"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_import_initialises_no_cuda_and_imports_nothing_optional():
    # torch itself imports some of these where they are installed: what counts is what comes on top of torch
    program = """
import sys
import torch
torch_alone = set(sys.modules)
import sparse_optim
optional = {"triton", "transformers", "accelerate", "datasets", "peft", "matplotlib", "rich", "tqdm", "typer"}
print(sorted(optional & (set(sys.modules) - torch_alone)), torch.cuda.is_initialized())
"""
    imported = run("-c", program, cwd=ROOT)
    assert imported.stdout == "[] False\n", imported.stderr


def test_version_is_that_of_the_metadata():
    try:
        installed = importlib.metadata.version("sparse_optim")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("sparse_optim runs from its source and is not installed")
    assert sparse_optim.__version__ == installed


def test_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_the_report_names_versions_and_what_each_backend_works_on():
    reported = run("-W", "error", "-m", "sparse_optim", cwd=ROOT, TRITON_INTERPRET="0")
    assert (reported.returncode, reported.stderr) == (0, "")
    facts = {line[:19].strip(): line[19:] for line in reported.stdout.splitlines()}
    assert {"Python", "triton", "CUDA runtime", "GPUs", "triton backend"} <= facts.keys()
    assert facts["sparse_optim"] == sparse_optim.__version__
    assert facts["torch"] == torch.__version__
    assert facts["reference backend"] == "works on cpu, cuda"
    if native_lacks := why_not("native"):
        assert facts["native backend"] == f"missing: {native_lacks}"
        assert "vector level" not in facts
    else:
        assert facts["native backend"].startswith("works on cpu")
        assert facts["vector level"] in torch.ops.sparse_optim.vector_levels().split(",")


def compiler_works() -> bool:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    try:
        done = subprocess.run(
            [*compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"], input=b"#include <cstdint>\n",
            capture_output=True, check=False,
        )  # fmt: skip
    except OSError:
        return False
    return done.returncode == 0


needs_compiler = pytest.mark.skipif(not compiler_works(), reason="needs a C++20 compiler")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """All that a build reads, in a place where it may write."""
    pytest.importorskip("setuptools", minversion="77")
    if not (ROOT / "setup.py").is_file():
        pytest.skip("needs the source tree")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(PACKAGE, tmp_path / "sparse_optim", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


@pytest.fixture
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which torch is there but cannot be imported."""
    stub = tmp_path_factory.mktemp("stub")
    (stub / "torch.py").write_text("raise ImportError('no torch here')\n")
    return {"PYTHONPATH": str(stub)}


def build_in_place(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # without nvcc, which takes minutes and has its own test
    environment = {"CUDA_HOME": str(project / "no-cuda")} | environment
    return run("setup.py", "-q", "build_ext", "--inplace", cwd=project, **environment)


def libraries(project: Path) -> list[str]:
    return sorted(path.name for path in (project / "sparse_optim").glob("_*.so"))


def our_warnings(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning: sparse_optim:")]


@needs_compiler
@pytest.mark.slow
def test_native_library_builds_for_every_python_loads_and_is_in_the_wheel(project):
    built = build_in_place(project, SPARSE_OPTIM_BUILD_EXT="1")
    assert built.returncode == 0, built.stderr
    assert our_warnings(built.stderr) == []
    assert libraries(project) == ["_C.abi3.so"]
    program = """
import torch
torch.ops.load_library("sparse_optim/_C.abi3.so")
print(torch.ops.sparse_optim.philox_words(0, 0, 0, 0, 1).item() & 0xFFFFFFFF == 0x6627E8D5)
import sparse_optim._C
"""
    loaded = run("-c", program, cwd=project)
    assert loaded.stdout == "True\n", loaded.stderr
    # what is compiled already is not compiled again
    wheeled = run(
        "setup.py", "-q", "bdist_wheel", "--dist-dir", "dist", cwd=project, SPARSE_OPTIM_BUILD_EXT="1",
        CUDA_HOME=str(project / "no-cuda"),
    )  # fmt: skip
    assert wheeled.returncode == 0, wheeled.stderr
    (wheel,) = (project / "dist").iterdir()
    machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"sparse_optim-{sparse_optim.__version__}-cp310-abi3-{machine}.whl"
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    there = {path.relative_to(project).as_posix() for path in (project / "sparse_optim").rglob("*.py")}
    assert shipped == there | {"sparse_optim/py.typed", "sparse_optim/_C.abi3.so"}


def test_without_a_compiler_the_build_warns_once_and_goes_on(project):
    built = build_in_place(project, CXX="false")
    assert built.returncode == 0, built.stderr
    (warning,) = our_warnings(built.stderr)
    assert "the native library is not built: the C++ compiler 'false' does not compile C++20" in warning
    assert "; install one, or name one with CXX=, and build again." in warning
    assert libraries(project) == []


@needs_compiler
@pytest.mark.slow
def test_code_that_does_not_compile_is_one_warning_and_ships_no_older_library(project):
    older = project / "build" / "lib" / "sparse_optim"
    older.mkdir(parents=True)
    (older / "_C.abi3.so").write_bytes(b"an earlier build")
    (project / "csrc" / "ops.cpp").write_text("#error this text is no program\n")
    built = run(
        "setup.py", "-q", "build_ext", "--inplace", "--build-lib", "build/lib", cwd=project,
        CUDA_HOME=str(project / "no-cuda"),
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (warning,) = our_warnings(built.stderr)
    assert "sparse_optim._C does not compile" in warning
    assert "this text is no program" in built.stdout + built.stderr
    assert libraries(project) == []


def test_a_build_that_was_asked_for_fails_loudly(project):
    built = build_in_place(project, CXX="no-such-compiler", SPARSE_OPTIM_BUILD_EXT="1")
    assert built.returncode != 0
    assert "error: sparse_optim: the native library is not built" in built.stderr
    assert "'no-such-compiler' does not start" in built.stderr


def test_a_build_that_was_declined_is_silent(project):
    built = build_in_place(project, CXX="false", SPARSE_OPTIM_BUILD_EXT="0")
    assert built.returncode == 0, built.stderr
    assert our_warnings(built.stderr) == []
    assert libraries(project) == []


def test_an_unknown_wish_is_an_error(project):
    built = build_in_place(project, SPARSE_OPTIM_BUILD_EXT="yes")
    assert built.returncode != 0
    assert "SPARSE_OPTIM_BUILD_EXT must be 0, 1 or unset, got 'yes'" in built.stderr


def test_without_torch_a_build_that_was_asked_for_fails_loudly(project, without_torch):
    built = build_in_place(project, SPARSE_OPTIM_BUILD_EXT="1", **without_torch)
    assert built.returncode != 0
    assert "torch cannot be imported (ImportError: no torch here)" in built.stderr


def test_without_torch_the_wheel_is_pure_python_and_complete(project, without_torch):
    pytest.importorskip("wheel")
    built = run("setup.py", "-q", "bdist_wheel", "--dist-dir", "dist", cwd=project, **without_torch)
    assert built.returncode == 0, built.stderr
    (warning,) = our_warnings(built.stderr)
    assert "install torch>=2.10 first and build with `pip install --no-build-isolation .`" in warning
    (wheel,) = (project / "dist").iterdir()
    assert wheel.name == f"sparse_optim-{sparse_optim.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    there = {path.relative_to(project).as_posix() for path in (project / "sparse_optim").rglob("*.py")}
    assert shipped == there | {"sparse_optim/py.typed"}


# Which modules of the package each top-level module may import. "public": the names in sparse_optim.__all__.
MAY_IMPORT = {
    "__init__": {
        "methods", "optimizer", "policies", "scores", "masks", "backends", "deltas", "patching", "merging",
        "planning",
    },
    "methods": {"optimizer", "policies", "scores"},
    "optimizer": {"policies", "masks", "backends", "gradient_release", "state"},
    "state": {"backends"},
    "policies": {"scores", "masks", "backends"},
    "scores": {"backends"},
    "masks": set(),
    "backends": {"backends"},
    "gradient_release": {"masks", "backends"},
    "checkpoints": {"state"},
    "deltas": {"checkpoints"},
    "patching": {"checkpoints", "deltas", "backends"},
    "merging": {"checkpoints", "deltas", "patching"},
    "planning": {"public"},
    "plots": {"public"},
    # the command is a program: it may know what users know
    "cli": {"public", "planning", "plots", "checkpoints", "finetuning", "integrations", "__main__"},
    "finetuning": {"public", "checkpoints", "integrations"},
    "__main__": {"public", "backends", "cli"},
    "nn": {"public", "nn"},
    # what is in `sparse_optim.nn` is public too
    "integrations": {"public", "integrations", "nn", "checkpoints", "patching"},
}  # fmt: skip
# each is one line inside a function of optimizer.py
LAZY_EXCEPTIONS = {("optimizer", "integrations.distributed"), ("optimizer", "deltas")}
CORE = {"__init__", "methods", "optimizer", "policies", "scores", "masks", "backends", "gradient_release"}
CORE_DEPENDENCIES = {"torch", "numpy"}


def parts_of(path: Path) -> tuple[str, ...]:
    """("backends", "reference") for sparse_optim/backends/reference.py; a package is named by itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts


def imports_of(path: Path) -> Iterator[tuple[str, str]]:
    """Every module that the file imports, by its absolute name, and when: "import", "call" or "types".

    `from sparse_optim import name` counts as sparse_optim.name.
    """
    tree = ast.parse(path.read_text())
    when = {}
    for outer in ast.walk(tree):
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef):
            when |= dict.fromkeys(ast.walk(outer), "call")
        elif isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test):
            when |= dict.fromkeys(ast.walk(outer), "types")
    # the package that a leading dot stands for
    package = ("sparse_optim", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, when.get(node, "import")
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                named = f"{module}.{alias.name}"
                # what comes from a sub-package may be a module of its own; from a module it is only a name
                file = (PACKAGE.parent / named.replace(".", "/")).with_suffix(".py")
                own = module == "sparse_optim" or file.is_file()
                yield (named if own else module), when.get(node, "import")


MODULES = {".".join(parts_of(path)): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_the_import_rules_cover_every_module():
    assert {name.split(".")[0] for name in MODULES} <= set(MAY_IMPORT)


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_only_what_they_may(name):
    top = name.split(".")[0]
    allowed = MAY_IMPORT[top]
    public = {*sparse_optim.__all__, "__version__"}
    for imported, _ in imports_of(MODULES[name]):
        first, *rest = imported.split(".")
        assert first not in {"benchmarks", "tests"}, f"{name} imports {imported}"
        if first != "sparse_optim":
            continue
        assert rest, f"{name} imports the package as a whole; import the names it needs"
        inner = ".".join(rest)
        fine = rest[0] in allowed or ("public" in allowed and inner in public)
        fine = fine or any(top == who and inner.startswith(what) for who, what in LAZY_EXCEPTIONS)
        assert fine, f"{name} may not import {inner}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] in CORE])
def test_core_modules_need_torch_and_numpy_alone(name):
    allowed = sys.stdlib_module_names | CORE_DEPENDENCIES | {"sparse_optim"}
    # that file is imported only by whoever wants it
    allowed |= {"triton"} if name == "backends.triton_kernels" else set()
    needed = {imported.split(".")[0] for imported, when in imports_of(MODULES[name]) if when != "types"}
    assert needed <= allowed


def test_exceptions_to_the_import_rules_wait_until_they_are_needed():
    for module, exception in LAZY_EXCEPTIONS:
        for imported, when in imports_of(MODULES[module]):
            # what is imported for types alone is never imported
            assert when != "import" or not imported.startswith(f"sparse_optim.{exception}")


TEXT = {".py", ".toml", ".txt", ".md", ".h", ".cpp", ".cu", ".cuh", ".yaml", ".yml", ".csv", ".in", ""}
BUILT = {"build", "dist", "__pycache__"}


def project_files() -> Iterator[Path]:
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name for name in folders
            if name not in BUILT and not name.endswith(".egg-info") and (name[0] != "." or name == ".ci")
        ]  # fmt: skip
        yield from (Path(folder, name) for name in names if Path(name).suffix in TEXT)


def test_no_file_names_a_place_on_one_machine():
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("needs the source tree")
    place = re.compile(
        r"(?<![\w.*<>)}\]-])/(?:home|root|work|mnt|opt|tmp|Users|data|scratch)/\w|\b[A-Z]:\\\\?Users\b"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in project_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if place.search(line)
    ]
    assert found == []
