"""Where the arithmetic runs: one module per backend, all with the same function names, and the choice
between them.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from . import reference

NAMES = ("auto", "reference", "native", "triton")
_FILES = {"triton": "triton_kernels", "native": "native"}  # fastest first


@functools.cache
def _load(name: str) -> ModuleType | str:
    """An accelerated backend, or why this installation lacks it. Imported when first asked for."""
    try:
        return importlib.import_module(f".{_FILES[name]}", __package__)
    except ImportError as error:
        return f"it cannot be imported ({error})"


def why_not(name: str, device: torch.device | None = None) -> str:
    """Why a backend cannot update tensors on `device` (None: on any); empty when it can."""
    if name == "reference":
        return ""
    module = _load(name)
    return module if isinstance(module, str) else str(module.why_not(device))


def available(device: torch.device | None = None) -> tuple[str, ...]:
    """The backends that work in this installation, fastest first."""
    return tuple(name for name in (*_FILES, "reference") if not why_not(name, device))


def check(backend: str, *, fused: bool | None, foreach: bool | None, differentiable: bool) -> None:
    """Refuse a backend that is unknown, missing, or at odds with torch's own switches.

    Raises:
        ValueError: for a name that no backend has, or switches that contradict each other.
        RuntimeError: for a backend that this installation lacks.
    """
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {backend!r}; use backend='auto'.")
    # torch's own words, which programs match on
    if fused and differentiable:
        raise RuntimeError("`fused` does not support `differentiable`")
    if fused and foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if backend in _FILES and why_not(backend):
        raise RuntimeError(f"backend={backend!r} cannot be used: {why_not(backend)}; use backend='auto'.")
    if fused and backend == "reference":
        raise ValueError(
            "fused=True needs an accelerated backend, got backend='reference'; leave one of the two out."
        )
    if fused and available() == ("reference",):
        raise RuntimeError(_no_accelerated_backend(None))
    wants_reference = foreach is not None or fused is False or differentiable
    if wants_reference and backend not in ("auto", "reference"):
        raise ValueError(
            f"foreach, fused=False and differentiable run the reference backend, got backend={backend!r}; "
            "leave one of the two out."
        )


def resolve(
    backend: str, device: torch.device, *, wants_reference: bool, wants_accelerated: bool = False
) -> ModuleType:
    """The module whose verbs update tensors on `device`; `check` has accepted the name.

    "auto" takes Triton, then native, then the reference on a GPU, and native, then the reference on the CPU.

    Raises:
        RuntimeError: for a backend that cannot run on this device.
    """
    if wants_reference or backend == "reference":
        return reference
    # the interpreter, which lets Triton run on the CPU, is for tests alone
    names = [backend] if backend != "auto" else ["native"] if device.type == "cpu" else list(_FILES)
    for name in names:
        module = _load(name)
        if not isinstance(module, str) and not why_not(name, device):
            return module
    if backend != "auto":
        raise RuntimeError(
            f"backend={backend!r} cannot be used: {why_not(backend, device)}; use backend='auto'."
        )
    if wants_accelerated:
        raise RuntimeError(_no_accelerated_backend(device))
    return reference


def _no_accelerated_backend(device: torch.device | None) -> str:
    reasons = ", ".join(f"{name} ({why_not(name, device)})" for name in reversed(_FILES))
    if device is None:
        return f"fused=True needs an accelerated backend and there is none: {reasons}; use fused=None."
    # torch's own words, which programs match on
    return (
        "`fused=True` requires all the params to be floating point Tensors of supported devices, got "
        f"{device.type} tensors, for which there is no accelerated backend: {reasons}; use fused=None."
    )
