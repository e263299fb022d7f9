"""What lets state survive: names, swapped parameter objects, saving and loading. No policy and no arithmetic.

`torch.optim.Optimizer` casts state to the parameter's dtype when it loads, forgets attributes when it is
copied, and keys state by the parameter object. This class keeps dtypes, attributes and state through all of
that.
"""

from __future__ import annotations

import operator
import re
import sys
import zlib
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .backends.reference import pack_bits, unpack_bits

# the optimizer's own numbers, equal in every group: so they survive every way of saving
CLOCK = ("seed", "clock", "phase", "draw", "epoch")
# words of a constructor that a group cannot override
_CONSTRUCTOR_ONLY = {
    *("policy", "unselected", "backend", "state_dtype", "stochastic_rounding", "release_gradients"),
    *("observe_unit", "statistic_dtype", "statistic_device"),
    *("max_grad_norm", "variant", "fidelity", "keep", "density", "observe_steps", "statistic", "schedule"),
}
# how the arithmetic runs is the running program's choice, not the checkpoint's
_SWITCHES = ("foreach", "capturable", "differentiable", "fused")
_WRAPPERS = re.compile(r"^module\.|(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module)\.")
_PARAMETRIZED = re.compile(r"(?:^|(?<=\.))parametrizations\.([^.]+)\.original(\d*)$")


def clean_name(name: str) -> str:
    """A parameter's name in the plain model, without what DDP, torch.compile, checkpointing and
    parametrizations add.
    """
    # the number stays: weight normalisation makes two parameters, original0 and original1, of one
    while (shorter := _PARAMETRIZED.sub(r"\1\2", _WRAPPERS.sub("", name))) != name:
        name = shorter
    return name


class SurvivingOptimizer(Optimizer):
    """An optimizer whose numbers live in every group, and whose state follows names and positions.

    Groups hold the numbers `seed`, `clock`, `phase`, `draw` and `epoch`, and the string `masking`, which says
    what has to be the same for a saved state to mean the same.
    """

    # attributes that the constructor sets, and that copies and pickles keep
    _configuration: ClassVar[tuple[str, ...]] = ()
    # save every parameter's state in tensors of its shape, the same ones in every phase
    dense_state_dict: bool
    _loading: dict[str, Any] | None = None
    # the clock on each device where steps are counted without the host, 0-dim int64
    _clocks: dict[torch.device, Tensor]
    _names: dict[Tensor, str] | None = None
    _known: list[list[Tensor]]
    _lists: list[list[Tensor]]  # the groups' own, which others may edit
    _once: list[Tensor]  # every parameter, in order
    _is_sharded: bool  # whether any is spread over processes

    @abstractmethod
    def _masking(self) -> str:
        """What must be the same for a saved state to mean the same."""

    def _number(self, name: str) -> int:
        """One of the optimizer's own numbers, which every group holds."""
        return int(self.param_groups[0][name])

    def _set_numbers(self, **numbers: int) -> None:
        for group in self.param_groups:
            group.update(numbers)

    def _name(self, param: Tensor) -> str:
        """The parameter's clean name, or its ordinal over all groups where no names were given."""
        return self._all_names()[param]

    def _all_names(self) -> dict[Tensor, str]:
        """Every parameter once, in order, with its name; the first of several that a tied parameter has."""
        if self._names is None:
            params = [p for group in self.param_groups for p in group["params"]]
            given = [str(ordinal) for ordinal in range(len(params))]
            if self._named:
                given = [clean_name(name) for group in self.param_groups for name in group["param_names"]]
            self._names = {}
            for p, name in zip(params, given, strict=True):
                self._names.setdefault(p, name)
        return self._names

    @property
    def _named(self) -> bool:
        return "param_names" in self.param_groups[0]

    def _tensor_key(self, p: Tensor) -> int:
        """The 32 bits that tell this tensor's random words from others'; fixed at the first step, and
        saved.
        """
        saved = self.state.get(p, {}).get("key")
        name = self._name(p)
        return int(saved) if saved is not None else zlib.crc32(name.encode()) if self._named else int(name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; it inherits the optimizer's clock. See `torch.optim.Optimizer`."""
        if isinstance(param_group, dict):
            param_group = self._checked_group(param_group)
        if self.param_groups:
            self._follow_swapped_parameters()
        super().add_param_group(param_group)
        self.param_groups[-1].update({name: self.param_groups[0][name] for name in (*CLOCK, "masking")})
        self._remember_parameters()

    def _checked_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """Refuse what a group cannot say, so that nothing is ignored."""
        own = (*CLOCK, "masking")
        if "masking" in group:
            # a group of another optimizer of ours: its clock and policy stay there
            group = {key: value for key, value in group.items() if key not in own}
        # groups of a torch optimizer name all switches; those that are off ask for nothing
        asked = [key for key in group if key in own or (key in _SWITCHES and key != "foreach" and group[key])]
        misplaced = [
            k for k in group if k in _CONSTRUCTOR_ONLY or (k in asked and group[k] != self.defaults[k])
        ]
        if misplaced:
            raise ValueError(
                f"a parameter group must override numbers and `masked` only, got {misplaced[0]!r}; "
                "give it to the optimizer, or make a second optimizer."
            )
        if not isinstance(group.get("masked", True), bool):
            raise ValueError(
                f"masked must be True or False in a parameter group, got {group['masked']!r}; "
                "False trains the group densely."
            )
        return group

    def _remember_parameters(self) -> None:
        self._known = [list(group["params"]) for group in self.param_groups]
        self._lists = [group["params"] for group in self.param_groups]
        self._once = list(dict.fromkeys(p for known in self._known for p in known))
        self._is_sharded = any(map(is_dtensor, self._once))
        self._names = None

    def _follow_swapped_parameters(self) -> None:
        """Let state follow a parameter object that somebody replaced in its group, by (group, position)."""
        if len(self._known) == len(self.param_groups) and all(
            len(known) == len(group["params"]) and all(map(operator.is_, known, group["params"]))
            for known, group in zip(self._known, self.param_groups, strict=True)
        ):
            return
        present = {p for group in self.param_groups for p in group["params"]}
        before = {p for known in self._known for p in known}
        self._refuse_partitions(before)
        swaps = [
            (old, new)
            # groups may have come or gone by hand, as torch allows
            for known, group in zip(self._known, self.param_groups, strict=False)
            # a list of another length was edited, and in an edited list parameters only change places
            if len(known) == len(group["params"])
            for old, new in zip(known, group["params"], strict=True)
            if old not in present and new not in before and self.state.get(old)
        ]
        for old, new in swaps:
            if new.shape != old.shape or is_dtensor(new) != is_dtensor(old):
                raise RuntimeError(
                    f"a parameter that has state must keep its shape and kind when it is replaced, got "
                    f"{type(new).__name__} {tuple(new.shape)} for {type(old).__name__} {tuple(old.shape)}; "
                    "shard or reshape the model before the first step."
                )
        for old, new in swaps:
            state = self.state.pop(old)
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = value.to(self._home(key, new))
            if new.dtype != old.dtype:
                # the new object's values are what somebody made of the old one's
                state.pop("master", None)
            match_dtype(new, state)
            self.state[new] = state
        self._remember_parameters()

    def _refuse_partitions(self, before: set[Tensor]) -> None:
        """DeepSpeed's ZeRO puts one flat tensor in the place of a group's parameters, or of a rank's share of
        them: nothing says any more which entry is which.
        """
        if "deepspeed" not in sys.modules:
            return
        for known, group in zip(self._known, self.param_groups, strict=False):
            new = [p for p in group["params"] if p not in before]
            flat = bool(new) and len(new) == len(group["params"]) and all(p.dim() == 1 for p in new)
            if flat and known and [p.shape for p in known] != [p.shape for p in new]:
                raise RuntimeError(
                    f"parameters must keep their shapes and names, got {len(new)} flat partition(s) for "
                    f"{len(known)} parameters, as DeepSpeed's ZeRO makes them; use its stage 0, "
                    "DistributedDataParallel, or release_gradients=True to save memory."
                )

    @abstractmethod
    def _dense_form(self, p: Tensor) -> dict[str, torch.dtype | int]:
        """What may belong to a parameter in any phase: the dtypes of tensors, and numbers as they begin."""

    @abstractmethod
    def _spread(self, p: Tensor, shard: Tensor) -> Tensor:
        """What each process holds, put together as the parameter is."""

    @abstractmethod
    def _held(self, p: Tensor, tensor: Tensor) -> Tensor:
        """What this process holds of a tensor in a parameter's shape."""

    def state_dict(self) -> dict[str, Any]:
        """See `MaskedAdamW.state_dict`."""
        self._follow_swapped_parameters()
        if not (self.dense_state_dict or self._is_sharded):
            return super().state_dict()

        def make_dense(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            # called first, so that this is the dict that users' own hooks see
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            states = {
                number: self._dense_state(p)
                for number, p in zip(numbers, params, strict=True)
                if p.requires_grad or self.state.get(p)
            }
            others = {k: v for k, v in saved["state"].items() if k not in states and not isinstance(k, int)}
            return {**saved, "state": states | others}

        handle = self.register_state_dict_post_hook(make_dense, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _dense_state(self, p: Tensor) -> dict[str, Any]:
        step = torch.zeros((), dtype=step_dtype(), device=self._home("step", p))
        held = local(p.detach())
        dense = to_dense(
            {"step": step, **self.state.get(p, {})}, held.shape, held.device, self._dense_form(p)
        )
        # what is live stays where it is; what is made for saving waits in the host's memory
        home = torch.device("cpu") if "parts" in dense else held.device
        return {
            key: self._spread(p, value).to(home) if key in _DENSE else value for key, value in dense.items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state dict, of this class or (without a policy) of `torch.optim.AdamW`, keeping every dtype.

        It may be dense or not, and of any number of processes, as long as its tensors are whole or DTensors.

        How the arithmetic runs (`foreach`, `fused`, `capturable`, `differentiable`) stays as constructed.

        Raises:
            ValueError: when the groups do not match, or the policy or `unselected` is another than the saved
                one.
        """
        self._follow_swapped_parameters()

        def capture(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            # registered last, so that this is the dict that users' own hooks have left
            for saved in final["param_groups"]:
                masking = saved.get("masking", "policy=None")
                if masking != self._masking():
                    raise ValueError(
                        f"the saved masking must be this optimizer's ({self._masking()}), got ({masking}); "
                        "construct the optimizer as it was when saved."
                    )
                misfits = [name for name in CLOCK if not isinstance(saved.get(name, 0), int)]
                if misfits:
                    raise ValueError(
                        f"saved {misfits[0]} must be an integer, got {saved[misfits[0]]!r}; load an "
                        "unchanged state dict."
                    )
            for p, state in self._saved_states(final):
                if state:
                    check_saved_state(self._name(p), p, state)
            if self.dense_state_dict or self._is_sharded:
                self._check_saved_maxima(final)
            saved = [number for group in final["param_groups"] for number in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            kept = {
                number: self._own_state(p, final["state"][number])
                for number, p in zip(saved, params, strict=False)
                if final["state"].get(number)
            }
            final = {**final, "state": final["state"] | kept}
            self._check_saved_masks(final, self._saved_states(final))
            self._loading = final
            return final

        handle = self.register_load_state_dict_pre_hook(capture)
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            handle.remove()
            self._loading = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but hooks, as torch has it, and what the constructor was given."""
        self._follow_swapped_parameters()
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._configuration}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a loaded or unpickled state, restoring what torch's loading casts to the parameter's
        dtype.
        """
        switches = [
            {name: group[name] for name in _SWITCHES} for group in self.__dict__.get("param_groups", [])
        ]
        super().__setstate__(state)
        for i, group in enumerate(self.param_groups):
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            if self._loading is not None:
                group.update(switches[i])
        if self._loading is not None:
            self._restore_dtypes(self._loading)
        for p, p_state in self.state.items():
            if isinstance(p, Tensor) and p_state and not isinstance(p_state["step"], Tensor):
                home = self._home("step", p)
                p_state["step"] = torch.tensor(float(p_state["step"]), dtype=step_dtype(), device=home)
        for clock in self.__dict__.setdefault("_clocks", {}).values():
            # in place: a captured graph goes on from what was loaded
            clock.fill_(self._number("clock"))
        self._remember_parameters()

    def _check_saved_maxima(self, final: dict[str, Any]) -> None:
        """Refuse amsgrad whose maxima torch.distributed.checkpoint has left out."""
        for saved in final["param_groups"]:
            for number in saved["params"] if saved.get("amsgrad") else ():
                state = final["state"].get(number, {})
                if "exp_avg" in state and "max_exp_avg_sq" not in state and float(state["step"]):
                    raise ValueError(
                        "saved state of a group with amsgrad=True must have max_exp_avg_sq, got "
                        f"{sorted(state)}; construct the optimizer with amsgrad=True before loading."
                    )

    def _own_state(self, p: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        """A parameter's saved state as this optimizer keeps it, and of that what this process holds."""
        if is_dtensor(p):
            if "parts" not in saved and not {"indices", "bits", "statistic"}.isdisjoint(saved):
                # of a whole parameter
                saved = to_dense(saved, p.shape, torch.device("cpu"), {"mask": torch.uint8})
            saved = {key: self._held(p, value) if key in _DENSE else value for key, value in saved.items()}
        if "parts" in saved:
            return from_dense(saved)
        shows = self.dense_state_dict or self._is_sharded
        if shows and "exp_avg" in saved and set(saved) <= _OF_ALL and not saved["step"]:
            # moments that no step has made yet
            return {key: saved[key] for key in ("step", "key") if "key" in saved}
        return saved

    def _restore_dtypes(self, final: dict[str, Any]) -> None:
        for p, state in self._saved_states(final):
            for key, value in state.items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.to(self._home(key, p))

    def _home(self, key: str, p: Tensor) -> torch.device:
        """Where an entry of a parameter's state lies."""
        return torch.device("cpu") if key == "step" else p.device

    def _saved_states(self, final: dict[str, Any]) -> list[tuple[Tensor, Any]]:
        """Every parameter with its saved state; a wrong number of them is refused by torch, in its own
        words.
        """
        saved = [number for group in final["param_groups"] for number in group["params"]]
        current = [p for group in self.param_groups for p in group["params"]]
        return [(p, final["state"].get(number, {})) for number, p in zip(saved, current, strict=False)]

    def _check_saved_masks(self, final: dict[str, Any], states: list[tuple[Tensor, Any]]) -> None:
        """Refuse a saved state that lacks the masks it was trained with."""


_PER_ENTRY = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "age", "statistic", "curvature")
# those that are kept for selected entries only, where these are listed
_LISTED = _PER_ENTRY[:5]
_DENSE = (*_PER_ENTRY, "count", "mask")
# which of them there are is a bit each of a dense state's `parts`
_PARTS = ("exp_avg", "indices", "bits", "age", "statistic", "count", "curvature")
_GO_ALONG = {"exp_avg_sq": "exp_avg", "max_exp_avg_sq": "exp_avg", "master": "exp_avg"}
# the state of a parameter that nothing is selected of
_OF_ALL = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "key"}
_SELECTED, _NONFINITE = 1, 2


def to_dense(
    state: Mapping[str, Any], shape: torch.Size, device: torch.device, form: Mapping[str, torch.dtype | int]
) -> dict[str, Any]:
    """A parameter's state in tensors of its shape, all that `form` names; see `from_dense`.

    `mask` is a byte an entry, 1 where it is selected, plus 2 in all of a shard whose gradients were not all
    finite. `parts` says what of this the state really had.
    """
    numel, indices, bits = shape.numel(), state.get("indices"), state.get("bits")
    numbers = {key: value for key, value in form.items() if not isinstance(value, torch.dtype)}
    dense = numbers | dict(state)
    for key, dtype in form.items():
        if key not in dense and isinstance(dtype, torch.dtype):
            dense[key] = torch.zeros(shape, dtype=dtype, device=device)
    if "mask" not in form:
        return dense
    for key in _DENSE:
        if key in state:
            value = state[key].to(device)
            if indices is not None and key in _LISTED:
                value = value.new_zeros(numel).index_copy_(0, indices.to(device).long(), value).view(shape)
            dense[key] = value.expand(shape).contiguous() if key == "count" else value
    mask = torch.zeros(numel, dtype=torch.uint8, device=device)
    if indices is not None:
        mask[indices.to(device).long()] = _SELECTED
    elif bits is not None:
        mask += unpack_bits(bits.to(device), numel)
    if bool(state.get("nonfinite", False)):
        mask |= _NONFINITE
    dense["mask"] = mask.view(shape)
    dense["parts"] = sum(1 << i for i, part in enumerate(_PARTS) if part in state)
    for key in ("indices", "bits", "nonfinite"):
        dense.pop(key, None)
    return dense


def from_dense(dense: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `to_dense`, of a whole state or of a shard of each tensor."""
    parts = {part for i, part in enumerate(_PARTS) if dense["parts"] >> i & 1}
    mask = dense["mask"].reshape(-1)
    state = {
        key: value
        for key, value in dense.items()
        if key not in ("mask", "parts") and (key not in _DENSE or _GO_ALONG.get(key, key) in parts)
    }
    chosen = mask & _SELECTED != 0
    if "indices" in parts:
        places = chosen.nonzero().squeeze(1)
        state["indices"] = places if mask.numel() >= 1 << 31 else places.int()
        state |= {key: state[key].reshape(-1)[places] for key in _LISTED if key in state}
    if "bits" in parts:
        state["bits"] = pack_bits(chosen)
    if "statistic" in parts:
        state["nonfinite"] = (mask & _NONFINITE != 0).any()
    # a parameter without state keeps at most its key
    return state if parts or state["step"] or "key" in state else {}


def check_saved_state(name: str, p: Tensor, state: Any) -> None:
    """Refuse a parameter's saved state that could not be stepped with, before anything is changed."""

    def need(holds: bool, what: str, got: object) -> None:
        if not holds:
            raise ValueError(
                f"saved state of {name!r} must have {what}, got {got}; load an unchanged state dict of the "
                "same model."
            )

    need(isinstance(state, dict), "a dict for each parameter", type(state).__name__)
    if any(value == {} for key, value in state.items() if key in ("indices", "bits", "nonfinite")):
        raise ValueError(
            f"a flat checkpoint must be loaded into an optimizer that has not stepped, got one with state of "
            f"{name!r}; construct a new one, or leave out flatten_optimizer_state_dict=True."
        )
    need("step" in state, "a step", sorted(state))
    step = state["step"]
    need(
        isinstance(step, int | float) or (isinstance(step, Tensor) and step.numel() == 1),
        "one number as step",
        step,
    )
    # a mask's bytes say what was not finite
    pairs = [("mask", "parts"), ("exp_avg", "exp_avg_sq")]
    if "parts" not in state:
        pairs.append(("statistic", "nonfinite"))
    for one, other in pairs:
        need((one in state) == (other in state), f"{one} and {other} together", sorted(state))
    for key in (*_DENSE, "indices", "bits", "nonfinite"):
        if key in state:
            need(isinstance(state[key], Tensor), f"a tensor as {key}", type(state[key]).__name__)
            spread = is_dtensor(state[key])
            need(not spread or is_dtensor(p), f"a whole tensor as {key}", "a DTensor")
    if "parts" in state:
        parts = state["parts"]
        known = isinstance(parts, int) and 0 <= parts < 1 << len(_PARTS)
        need(known, f"an integer below {1 << len(_PARTS)} as parts", parts)
        named = [part for i, part in enumerate(_PARTS) if parts >> i & 1]
        there = all(part in state or part in ("indices", "bits") for part in named)
        need(there and not {"indices", "bits"} <= set(named), f"what parts={parts} names", sorted(state))
        # a step is never taken without moments
        need("exp_avg" in named or not float(state["step"]), "the moments of its steps", f"parts={parts}")
        mask, shape = state["mask"], tuple(p.shape)
        fits = mask.dtype == torch.uint8 and mask.shape == p.shape
        need(fits, f"bytes of shape {shape} as mask", f"{mask.dtype} of shape {tuple(mask.shape)}")
        fits = "count" not in state or state["count"].shape == p.shape
        need(fits, f"count of shape {shape}", tuple(state.get("count", mask).shape))
    if "indices" in state:
        indices = state["indices"]
        whole = indices.dtype in (torch.int32, torch.int64) and indices.dim() == 1
        need(whole, "flat integers as indices", f"{indices.dtype} of shape {tuple(indices.shape)}")
        ascending = bool((indices[1:] > indices[:-1]).all())
        inside = not indices.numel() or (int(indices[0]) >= 0 and int(indices[-1]) < p.numel())
        need(ascending and inside, f"ascending indices below {p.numel()}", indices[:8].tolist())
    if "bits" in state:
        size = -(-p.numel() // 32) * 4
        fits = state["bits"].dtype == torch.uint8 and tuple(state["bits"].shape) == (size,)
        need(fits, f"{size} bytes as bits", f"{state['bits'].dtype} of shape {tuple(state['bits'].shape)}")
    for key in _PER_ENTRY:
        if key in state:
            compact = "indices" in state and key not in ("statistic", "curvature")
            shape = state["indices"].shape if compact else p.shape
            need(state[key].shape == shape, f"{key} of shape {tuple(shape)}", tuple(state[key].shape))
            number = state[key].is_floating_point() or state[key].is_complex() or key == "age"
            need(number, f"floating numbers as {key}", state[key].dtype)


def match_dtype(p: Tensor, state: dict[str, Any]) -> None:
    """Fit compact state to a parameter whose dtype has changed; a master starts from the parameter."""
    if "indices" not in state or "exp_avg" not in state:
        return
    if state["exp_avg"].dtype != compact_dtype(p):
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if key in state:
                state[key] = state[key].to(compact_dtype(p))
    if p.dtype == compact_dtype(p):
        state.pop("master", None)
    elif "master" not in state:
        make_master(p, state)


def make_master(p: Tensor, state: dict[str, Any]) -> None:
    """Give the selected entries of a low-precision parameter a float32 value of their own."""
    if p.dtype != compact_dtype(p):
        state["master"] = local(p.detach()).reshape(-1)[state["indices"].long()].to(compact_dtype(p))


def compact_dtype(p: Tensor) -> torch.dtype:
    """The dtype of moments that are kept for selected entries only."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def step_dtype() -> torch.dtype:
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: a view of its shard, or all of it."""
    if not is_dtensor(tensor):
        return tensor
    shard: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return shard


def is_dtensor(tensor: Tensor) -> bool:
    # importing it here would cost every user of plain tensors a second
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
