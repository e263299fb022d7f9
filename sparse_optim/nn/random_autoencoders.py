"""Random hierarchical autoencoders on the hidden states of a transformer, while it trains (MVCR)."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Placement = Literal["between", "ffn"]
Reconstruction = Literal["all", "chosen"]

# the release's standard deviation
_NOISE = 0.002
# inner path 0 or 1 is a sub-autoencoder, this one is none
_NO_SUB = 2


class RandomAutoencoders(nn.Module):
    r"""Multi-view compressed representations: random autoencoders on chosen layers, in training only.

    `attach` makes n hierarchical autoencoders (HAE) per chosen layer, one per entry of `dims`, and returns
    the handle that owns them. In every training forward, with hidden states h,

    .. math::
        h \leftarrow h + noise \cdot \mathcal N(0, 1), \qquad
        h_t \leftarrow \mathrm{HAE}_v(h_t) \text{ or } h_t, \qquad
        \mathrm{HAE}(h) = up(s_r(drop(\tanh(down(h))))).

    The view v of sequence position t is drawn for all rows of the batch at once, uniformly among 2n - 1
    values: each HAE has probability 1/(2n - 1), "unchanged" has (n - 1)/(2n - 1). So n = 1 always compresses.
    The inner path r is drawn once per HAE and forward, uniformly among three: one of two sub-autoencoders
    tanh(up'(drop(tanh(down'(z))))) of half the width, or none. Positions are gathered by view, so that a
    forward computes the drawn view of each position and nothing else. Draws come from torch's default
    generator.

    In evaluation nothing is added, removed or rounded: outputs are the model's own, bit for bit. The path is
    on where the layer is in training mode *and* the handle is: `model.eval()` suffices, `handle.eval()`
    switches the autoencoders off in a model that trains.

    The handle is a module with its own `parameters()`, `named_parameters()`, `state_dict()` and
    `load_state_dict()`; the model's state dict never contains an autoencoder. They are made with the dtype
    and on the device of their layer, and move to the device of the hidden states; `handle.to(dtype)` changes
    the dtype. Under data parallelism average their gradients across ranks yourself: the wrapped model does
    not know them.

    Two placements. What the sources leave open is marked "ours".

    | | `"between"`: the paper | `"ffn"`: the released code |
    | --- | --- | --- |
    | acts on | a layer's output | its feed-forward block's, after dropout, before residual and norm |
    | `noise` | 0.0 (ours: the paper's figure shows none) | 0.002, also on unchanged positions |
    | `extra_dropout`, after the path | 0.0 (ours) | as the block's own dropout |
    | draws | as the release (ours: the paper says "per token") | as above |
    | reconstruction loss | as the release (ours) | as below |
    | initialisation | torch's for `Linear` (ours) | torch's for `Linear` (ours) |

    **Reconstruction loss.** For each layer the mean over HAEs of MSE(h, HAE(h)) on the noised h, padding
    included, summed over layers; summed, because the release minimises each layer's alone. The release
    evaluates every HAE on every token: `reconstruction="all"`. `"chosen"` averages over the drawn (position,
    HAE) pairs instead: the same in expectation, given that a position was compressed at all, at the cost of
    one view instead of n (ours). The forward only keeps h, detached, one tensor of the size of the hidden
    states per layer; the loss is computed when `reconstruction_loss()` is called, with the inner paths of
    that forward and fresh dropout (ours: the release shares one evaluation, and so one dropout mask, with the
    forward). Because h is detached, parameters of the model receive no gradient from it: the release computes
    those gradients and throws them away.

    What is kept is cleared by `reconstruction_loss()`, and by the next forward of the layer: only the last
    forward's counts, so call it once per forward when accumulating gradients. Recomputation under gradient
    checkpointing is recognised and keeps nothing; it needs checkpointing's `preserve_rng_state`, on by
    default.

    **Two optimizers, as in the release.** The release steps autoencoders twice per batch, by the task loss at
    `lr` and by the reconstruction loss at 50 times `lr`. Its order, step and then backward through modified
    weights, is refused by torch; take both gradients before the first step:

        main = torch.optim.AdamW([*model.parameters(), *handle.parameters()], lr=2e-5, weight_decay=0.0)
        reconstruction = torch.optim.AdamW(handle.parameters(), lr=1e-3, weight_decay=0.0)
        for batch in batches:
            model(**batch).loss.backward()
            own = list(handle.parameters())
            grads = torch.autograd.grad(handle.reconstruction_loss(), own, materialize_grads=True)
            main.step()
            for p, grad in zip(own, grads):
                p.grad = grad
            reconstruction.step()
            main.zero_grad()

    (The release also clips before each reconstruction step, by a norm that counts the discarded gradients.)
    With one optimizer, `(loss + handle.reconstruction_loss()).backward()` and one step.

    Example:
        >>> import torch
        >>> from sparse_optim.nn import RandomAutoencoders
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        >>> handle = RandomAutoencoders.attach(model, layers=[0, 2], dims=(2, 4), hidden_size=8)
        >>> optimizer = torch.optim.AdamW([*model.parameters(), *handle.parameters()], lr=1e-3)
        >>> x = torch.randn(4, 5, 8)
        >>> with handle.warm_start():  # the release: epochs 1 to 4
        ...     _ = model(x)
        ...     handle.reconstruction_loss().backward()
        ...     optimizer.step()
        >>> optimizer.zero_grad()
        >>> loss = model(x).square().mean()
        >>> (loss + handle.reconstruction_loss()).backward()
        >>> optimizer.step()
        >>> handle.detach()

    References:
        Multi-View Compressed Representations, ACL 2023.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: dict[int, _Path],
        hooks: list[RemovableHandle],
        reconstruction: Reconstruction,
    ) -> None:
        """Use `attach`."""
        super().__init__()
        self.autoencoders = nn.ModuleDict({str(index): path for index, path in paths.items()})
        # a tuple, so that the model does not become a submodule of its handle
        self._model = (model,)
        self._hooks = hooks
        self._reconstruction = reconstruction
        self._frozen: list[tuple[nn.Parameter, bool]] | None = None

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        *,
        layers: Iterable[int],
        dims: Sequence[int] = (128, 256, 512),
        placement: Placement = "between",
        dropout: float = 0.2,
        noise: float | None = None,
        extra_dropout: float | None = None,
        share_views: bool = True,
        reconstruction: Reconstruction = "all",
        noise_only: bool = False,
        layer_modules: Sequence[nn.Module] | None = None,
        ffn_name: str | None = None,
        hidden_size: int | None = None,
    ) -> RandomAutoencoders:
        """Make autoencoders for some layers of a model, and put them in its way by forward hooks.

        Args:
            model: a transformer whose layers give hidden states [..., positions, hidden], alone or first in
                a tuple.
            layers: indices of layers, the first is 0. The release's scripts use 6, 8, 11; no default.
            dims: widths d of the HAEs; repeat entries for more of a kind. The release's.
            placement: "between" (the paper's) or "ffn" (the release's), see the table above.
            dropout: inside the autoencoders; the release's.
            noise: standard deviation of Gaussian noise before the path; None as in the table above.
            extra_dropout: after the path; None as in the table above, where `"ffn"` reads it from the block
                now: 0.0 if the block has none.
            share_views: one view per position for all rows of the batch, as in the release; False draws for
                every token.
            reconstruction: "all" or "chosen", see above.
            noise_only: a control, ours after an ablation in the release: noise (0.002 when not given) and
                extra dropout, but no autoencoders, parameters or reconstruction loss.
            layer_modules: the layers, where they are not in the longest ModuleList of the model (of those
                that are not inside another).
            ffn_name: `"ffn"` only: name, in a layer, of the module whose output is the feed-forward branch.
                None finds `output.dropout` beside an `output.dense` (BERT, RoBERTa and relatives), `ffn`
                (DistilBERT), or `mlp` (GPT-2, Llama and relatives).
            hidden_size: last size of the hidden states; None reads `model.config.hidden_size`.

        Returns:
            The handle.

        Raises:
            ValueError: for bad values, layers that do not exist, or already have autoencoders.
            TypeError: for indices and sizes that are not integers.
        """
        _check_settings(placement, dropout, noise, extra_dropout, reconstruction, noise_only, ffn_name)
        dims = [_integer("dims", dim, least=2, remedy="inner autoencoders have half of it") for dim in dims]
        if not dims:
            raise ValueError(
                "dims must hold at least one width, got none; the paper's code uses (128, 256, 512)."
            )
        modules = _list_layers(model, layer_modules)
        indices = _check_layers(layers, len(modules))
        hidden_size = _find_hidden_size(model) if hidden_size is None else hidden_size
        hidden_size = _integer(
            "hidden_size", hidden_size, least=1, remedy="give the last size of the hidden states"
        )
        if noise is None:
            noise = _NOISE if placement == "ffn" or noise_only else 0.0
        sites = {
            i: modules[i] if placement == "between" else _find_ffn(modules[i], i, ffn_name) for i in indices
        }
        for i, site in sites.items():
            if any(
                isinstance(getattr(hook, "__self__", None), _Path) for hook in site._forward_hooks.values()
            ):
                raise ValueError(
                    f"layers must not have random autoencoders yet, got {i}, which has; detach() them first."
                )
        paths = {}
        for i, site in sites.items():
            after = _dropout_of(site) if placement == "ffn" else 0.0
            paths[i] = _Path(
                modules[i],
                hidden_size,
                [] if noise_only else dims,
                dropout=dropout,
                noise=noise,
                extra_dropout=after if extra_dropout is None else extra_dropout,
                share_views=share_views,
            )
        hooks = []
        for i, path in paths.items():
            hooks.append(modules[i].register_forward_pre_hook(path.start))
            hooks.append(sites[i].register_forward_hook(path.transform))
        return cls(model, paths, hooks, reconstruction)

    def reconstruction_loss(self) -> Tensor:
        """The reconstruction loss of the last training forward, once; see the class for what it is.

        Returns:
            A scalar, float32 at least, whose gradient reaches the autoencoders only.

        Raises:
            RuntimeError: when there was no training forward since the last call.
        """
        losses = [path.reconstruction_loss(self._reconstruction) for path in self._paths() if path.kept]
        if not losses:
            raise RuntimeError(
                "reconstruction_loss needs a training forward since its last call, got none; call it once "
                "after each, attached, with model and handle in training mode, and not with noise_only=True."
            )
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()

    def warm_start(self) -> AbstractContextManager[object]:
        """Freeze all parameters of the model, at once; the autoencoders train on.

        The release begins with epochs in which only the autoencoders train, on the reconstruction loss alone.
        `end_warm_start()`, `detach()`, or the end of a `with` block around the call sets each `requires_grad`
        back to what it was. A parameter that still has a gradient is stepped by an optimizer all the same:
        call `zero_grad()` (to None, torch's default) before.

        Returns:
            A context manager that ends the warm start.

        Raises:
            RuntimeError: during a warm start.
        """
        if self._frozen is not None:
            raise RuntimeError(
                "warm_start needs the last one to have ended, got a second; call end_warm_start()."
            )
        self._frozen = [(p, p.requires_grad) for p in self._model[0].parameters()]
        for p, _ in self._frozen:
            p.requires_grad_(False)
        end = ExitStack()
        end.callback(self.end_warm_start)
        return end

    def end_warm_start(self) -> None:
        """Set each `requires_grad` of the model back to what it was before `warm_start`, if there was one."""
        for p, requires_grad in self._frozen or ():
            p.requires_grad_(requires_grad)
        self._frozen = None

    def detach(self) -> None:
        """Take the autoencoders out of the model and end a warm start; the handle keeps their weights.

        Hooks are gone, so the model is what it was before `attach`, with the weights of now. A second call
        does nothing.
        """
        self.end_warm_start()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for path in self._paths():
            path.kept.clear()

    remove = detach

    def _paths(self) -> Iterator[_Path]:
        for path in self.autoencoders.values():
            assert isinstance(path, _Path)
            yield path


class _Autoencoder(nn.Module):
    """Hidden states -> width d -> one of two inner autoencoders, or none -> hidden states. No residual."""

    def __init__(self, hidden_size: int, dim: int, dropout: float, **factory: Any) -> None:
        super().__init__()
        self.dropout = dropout
        self.down = nn.Linear(hidden_size, dim, **factory)
        self.subs = nn.ModuleList(
            nn.ModuleDict(
                {"down": nn.Linear(dim, dim // 2, **factory), "up": nn.Linear(dim // 2, dim, **factory)}
            )
            for _ in range(_NO_SUB)
        )
        self.up = nn.Linear(dim, hidden_size, **factory)

    def forward(self, x: Tensor, r: int) -> Tensor:
        # the path exists in training only, hence dropout always
        z = nn.functional.dropout(torch.tanh(self.down(x.to(self.down.weight.dtype))), self.dropout)
        if r != _NO_SUB:
            sub = self.subs[r]
            assert isinstance(sub, nn.ModuleDict)
            z = torch.tanh(sub["up"](nn.functional.dropout(torch.tanh(sub["down"](z)), self.dropout)))
        y: Tensor = self.up(z)
        return y


class _Kept(NamedTuple):
    """What one forward leaves for the reconstruction loss."""

    x: Tensor  # [..., positions, hidden], noised and detached
    order: Tensor  # [positions] positions sorted by view
    counts: list[int]  # positions per view, "unchanged" last
    inner: list[int]  # r per HAE


class _Path(nn.ModuleList):
    """The HAEs of one layer and the hooks that put them in its way."""

    def __init__(
        self,
        layer: nn.Module,
        hidden_size: int,
        dims: Iterable[int],
        *,
        dropout: float,
        noise: float,
        extra_dropout: float,
        share_views: bool,
    ) -> None:
        like = next((p for p in layer.parameters() if p.is_floating_point()), torch.empty(0))
        super().__init__(
            _Autoencoder(hidden_size, d, dropout, device=like.device, dtype=like.dtype) for d in dims
        )
        # a tuple, so that the layer does not become a submodule
        self.layer = (layer,)
        self.hidden_size = hidden_size
        self.noise = noise
        self.extra_dropout = extra_dropout
        self.share_views = share_views
        self.kept: list[_Kept] = []

    def start(self, layer: nn.Module, args: Any) -> None:
        """Before the layer: forget the last forward."""
        if not _in_backward():
            self.kept.clear()

    def transform(self, site: nn.Module, args: Any, output: Any) -> Any:
        """After the layer or its feed-forward block: send the hidden states through the path."""
        if not (self.training and self.layer[0].training):
            return None
        if isinstance(output, tuple):
            return (self._transform(output[0]), *output[1:])
        return self._transform(output)

    def _transform(self, h: Tensor) -> Tensor:
        shape = tuple(getattr(h, "shape", ()))
        if len(shape) < 2 or shape[-1] != self.hidden_size:
            raise ValueError(
                f"layers must give hidden states [..., positions, {self.hidden_size}], alone or first in a "
                f"tuple, got a {type(h).__name__} of shape {shape}; give hidden_size=, layer_modules= or "
                "ffn_name=."
            )
        if self.noise:
            h = h + self.noise * torch.randn_like(h)
        if len(self):
            h = self._compress(h)
        return nn.functional.dropout(h, self.extra_dropout) if self.extra_dropout else h

    def _compress(self, h: Tensor) -> Tensor:
        if next(self.parameters()).device != h.device:
            self.to(h.device)
        x = h if self.share_views else h.reshape(1, -1, self.hidden_size)
        n = len(self)
        # drawn and sorted on the CPU: sizes are needed here, and a GPU need not be waited for
        views = torch.randint(2 * n - 1, (x.shape[-2],), device="cpu").clamp_(max=n)
        inner: list[int] = torch.randint(_NO_SUB + 1, (n,), device="cpu").tolist()
        counts: list[int] = views.bincount(minlength=n + 1).tolist()
        order = views.argsort(stable=True)
        back = order.argsort().to(h.device, non_blocking=True)
        order = order.to(h.device, non_blocking=True)
        # gradient checkpointing recomputes a forward in the backward: that one has been kept already
        if not _in_backward():
            self.kept.append(_Kept(x.detach(), order, counts, inner))
        parts = list(torch.split(x.index_select(-2, order), counts, -2))
        for j, autoencoder in enumerate(self):
            if counts[j]:
                parts[j] = autoencoder(parts[j], inner[j]).to(h.dtype)
        return torch.cat(parts, -2).index_select(-2, back).reshape(h.shape)

    def reconstruction_loss(self, reconstruction: Reconstruction) -> Tensor:
        """Mean squared error of what was kept, which is forgotten."""
        sums = []
        numel = 0
        # more than one only where a layer calls its feed-forward block in chunks
        for x, order, counts, inner in self.kept:
            parts: Sequence[Tensor] = [x] * len(self)
            if reconstruction == "chosen":
                parts = torch.split(x.index_select(-2, order), counts, -2)
            for autoencoder, part, r in zip(self, parts, inner, strict=False):
                if part.numel():
                    error = autoencoder(part, r) - part
                    sums.append(error.to(torch.promote_types(error.dtype, torch.float32)).square().sum())
                    numel += part.numel()
        self.kept.clear()
        if sums:
            return torch.stack(sums).sum() / numel
        # all positions unchanged: zero, but with a graph, so that backward() works
        zero = next(self.parameters()).sum() * 0
        return zero.to(torch.promote_types(zero.dtype, torch.float32))


def _in_backward() -> bool:
    # torch.utils.checkpoint asks the same question in the same way
    return bool(torch._C._current_graph_task_id() != -1)


def _list_layers(model: nn.Module, layer_modules: Sequence[nn.Module] | None) -> list[nn.Module]:
    if layer_modules is not None:
        known = set(model.modules())
        for module in layer_modules:
            if module not in known:
                raise ValueError(
                    f"layer_modules must be modules of the model, got a {type(module).__name__} that is not; "
                    "take them from the model given."
                )
        return list(layer_modules)
    lists = dict(_outermost_lists("", model))
    longest = [name for name, modules in lists.items() if len(modules) == max(map(len, lists.values()))]
    if len(longest) != 1:
        got = f"{len(longest)} of equal length, {' and '.join(longest)}" if longest else "none"
        raise ValueError(
            f"model must have one longest ModuleList, of its layers, got {got}; give layer_modules=, a list."
        )
    return list(lists[longest[0]])


def _outermost_lists(name: str, module: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    # lists inside a layer, of experts say, can be longer than the list of layers
    if isinstance(module, nn.ModuleList):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _outermost_lists(f"{name}.{child_name}" if name else child_name, child)


def _check_layers(layers: Iterable[int], count: int) -> list[int]:
    indices = [_integer("layers", i, least=0, remedy="layers count from 0, from the first") for i in layers]
    if not indices:
        raise ValueError(
            f"layers must hold at least one index, got none; the model has layers 0 to {count - 1}."
        )
    for i in indices:
        if i >= count:
            raise ValueError(
                f"layers must be at most {count - 1}, got {i}; the model has {count} layers, counted from 0."
            )
        if indices.count(i) > 1:
            raise ValueError(
                f"layers must not repeat, got {i} twice; repeat dims= for more autoencoders on a layer."
            )
    return indices


def _integer(name: str, value: object, *, least: int, remedy: str) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be of integers, got {value!r}; {remedy}.")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}; {remedy}.")
    return number


def _find_hidden_size(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "hidden_size", None)
    if size is None:
        raise ValueError(
            f"hidden_size must be given for a model without config.hidden_size, got a "
            f"{type(model).__name__}; give the last size of its hidden states."
        )
    return int(size)


def _find_ffn(layer: nn.Module, index: int, ffn_name: str | None) -> nn.Module:
    if ffn_name is not None:
        try:
            return layer.get_submodule(ffn_name)
        except AttributeError:
            names = ", ".join(name for name, _ in layer.named_children())
            raise ValueError(
                f"ffn_name must name a module of layer {index}, got {ffn_name!r}; it has {names}."
            ) from None
    output = getattr(layer, "output", None)
    dropout = getattr(output, "dropout", None)
    if isinstance(dropout, nn.Module) and isinstance(getattr(output, "dense", None), nn.Module):
        return dropout
    for name in ("ffn", "mlp"):
        block = getattr(layer, name, None)
        # a single Linear of that name is part of a block, not the block
        if isinstance(block, nn.Module) and not isinstance(block, (nn.Linear, nn.ModuleList)):
            return block
    raise ValueError(
        f"placement='ffn' must find output.dropout, ffn or mlp in layer {index}, got a "
        f"{type(layer).__name__} without; give ffn_name=, the module whose output is the feed-forward branch."
    )


def _dropout_of(site: nn.Module) -> float:
    dropout = site if isinstance(site, nn.Dropout) else getattr(site, "dropout", None)
    return dropout.p if isinstance(dropout, nn.Dropout) else 0.0


def _check_settings(
    placement: str,
    dropout: float,
    noise: float | None,
    extra_dropout: float | None,
    reconstruction: str,
    noise_only: bool,
    ffn_name: str | None,
) -> None:
    if placement not in ("between", "ffn"):
        raise ValueError(
            f"placement must be 'between' or 'ffn', got {placement!r}; 'ffn' is the released code's."
        )
    if reconstruction not in ("all", "chosen"):
        raise ValueError(
            f"reconstruction must be 'all' or 'chosen', got {reconstruction!r}; 'all' is the release's."
        )
    for name, p in (("dropout", dropout), ("extra_dropout", extra_dropout)):
        if p is not None and not 0.0 <= p < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {p!r}; 0.0 switches it off.")
    if noise is not None and not 0.0 <= noise < float("inf"):
        raise ValueError(f"noise must be finite and not negative, got {noise!r}; 0.0 switches it off.")
    if noise_only and noise == 0:
        raise ValueError(
            "noise must be positive with noise_only=True, got 0.0; leave it out for the release's 0.002."
        )
    if ffn_name is not None and placement != "ffn":
        raise ValueError(
            f"ffn_name must not be given for placement={placement!r}, got {ffn_name!r}; use 'ffn'."
        )
