"""`python -m sparse_optim`, or `sparse-optim`: says what is installed, and runs the commands of cli.py."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from . import __version__
from .backends import why_not

DEVICES = ("cpu", "cuda")


def version_of(package: str) -> str:
    """That of an installed package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def works_on(backend: str) -> str:
    """The devices whose tensors a backend can update, and why it cannot update those of the others."""
    if missing := why_not(backend):
        return f"missing: {missing}"
    reasons = {device: why_not(backend, torch.device(device)) for device in DEVICES}
    fine = ", ".join(device for device, reason in reasons.items() if not reason)
    words = [f"works on {fine}"] if fine else []
    return "; ".join(words + [f"not on {device}: {reason}" for device, reason in reasons.items() if reason])


def report() -> str:
    """One line for each fact."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    rows = [
        ("sparse_optim", __version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", version_of("triton")),
        ("CUDA runtime", torch.version.cuda or "none: this torch is built without CUDA"),
        ("GPUs", ", ".join(gpus) or "none that torch can use"),
        *((f"{backend} backend", works_on(backend)) for backend in ("reference", "triton", "native")),
    ]
    if not why_not("native"):
        # narrowest first, and the widest is in use
        rows.append(("vector level", torch.ops.sparse_optim.vector_levels().rpartition(",")[2]))
    return "\n".join(f"{name:<19}{value}" for name, value in rows)


def main() -> None:
    """Runs a command; without typer and rich there is only the report."""
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        if sys.argv[1:] not in ([], ["info"]):
            print(
                f"{sys.argv[1]} needs typer and rich, got no {missing}; pip install 'sparse_optim[cli]'.",
                file=sys.stderr,
            )
            sys.exit(2)
        print(report())
        print(f"{'plan':<19}missing: pip install 'sparse_optim[cli]'")
        return
    app(prog_name="sparse-optim")


if __name__ == "__main__":
    main()
