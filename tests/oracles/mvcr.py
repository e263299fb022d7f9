"""Random autoencoders, position by position in float64 NumPy, given everything that was drawn.

Weights are dictionaries of arrays in torch's Linear layout, [out, in]: `down.weight`, `down.bias`, `up.*`,
and `subs.{0,1}.{down,up}.*`. Dropout masks hold 0 or 1 / (1 - p).
"""

import numpy as np


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def autoencode(x, weights, inner, outer_mask, inner_mask):
    """x: [..., hidden]. inner: 0 or 1 for a sub-autoencoder, 2 for none."""
    z = np.tanh(linear(x, weights, "down")) * outer_mask
    if inner in (0, 1):
        narrow = np.tanh(linear(z, weights, f"subs.{inner}.down")) * inner_mask
        z = np.tanh(linear(narrow, weights, f"subs.{inner}.up"))
    return linear(z, weights, "up")


def transform(h, autoencoders, draws, inners, masks, extra_mask):
    """h: [batch, positions, hidden], noised. draws: [positions], the first n of 2n - 1 values are views.

    masks: for each autoencoder its two masks, [batch, positions, width], read where it was drawn.
    """
    out = np.empty_like(h)
    for t, draw in enumerate(draws):
        if draw < len(autoencoders):
            outer, inner = masks[draw]
            out[:, t] = autoencode(h[:, t], autoencoders[draw], inners[draw], outer[:, t], inner[:, t])
        else:
            out[:, t] = h[:, t]
    return out * extra_mask


def reconstruction_loss(h, autoencoders, inners, masks):
    """Mean over autoencoders of the mean squared error on every position."""
    errors = []
    for weights, inner, (outer_mask, inner_mask) in zip(autoencoders, inners, masks, strict=True):
        errors.append(np.mean((h - autoencode(h, weights, inner, outer_mask, inner_mask)) ** 2))
    return np.mean(errors)


def reconstruction_loss_chosen(h, autoencoders, draws, inners, masks):
    """Mean of squared errors on the positions that an autoencoder was drawn for, each by that one."""
    errors = []
    for t, draw in enumerate(draws):
        if draw < len(autoencoders):
            outer, inner = masks[draw]
            out = autoencode(h[:, t], autoencoders[draw], inners[draw], outer[:, t], inner[:, t])
            errors.append((h[:, t] - out) ** 2)
    return np.mean(errors) if errors else 0.0


def layer_norm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias
