"""Where the arithmetic runs: one module per backend, all with the same function names, and the choice
between them.
"""

from __future__ import annotations

from types import ModuleType

import torch

from . import reference

NAMES = ("auto", "reference", "native", "triton")
_MODULES: dict[str, ModuleType] = {"reference": reference}
_MISSING = {
    "native": "the C++ and CUDA verbs are not part of this version",
    "triton": "the Triton kernels are not part of this version",
}


def available() -> tuple[str, ...]:
    """The backends that work in this installation, fastest first."""
    return tuple(name for name in ("triton", "native", "reference") if name in _MODULES)


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
    if backend in _MISSING:
        raise RuntimeError(f"backend={backend!r} cannot be used: {_MISSING[backend]}; use backend='auto'.")
    if fused:
        if backend == "reference":
            raise ValueError(
                "fused=True needs an accelerated backend, got backend='reference'; leave one of the two out."
            )
        raise RuntimeError(
            f"fused=True needs an accelerated backend and there is none: native ({_MISSING['native']}), "
            f"triton ({_MISSING['triton']}); use fused=None."
        )
    wants_reference = foreach is not None or fused is False or differentiable
    if wants_reference and backend not in ("auto", "reference"):
        raise ValueError(
            f"foreach, fused=False and differentiable run the reference backend, got backend={backend!r}; "
            "leave one of the two out."
        )


def resolve(backend: str, device: torch.device, *, wants_reference: bool) -> ModuleType:
    """The module whose verbs update tensors on `device`; `check` has accepted the name."""
    del device
    return reference if wants_reference or backend == "auto" else _MODULES[backend]
