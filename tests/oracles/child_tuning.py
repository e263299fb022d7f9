"""Child-Tuning in float64 NumPy, written from methods.md 1.1 and 1.2; it shares no code with the package.

Weights and gradients are dictionaries of arrays by parameter name.
"""

import numpy as np


class Adam:
    """AdamW by name. `decay_last`: the release's order, moments, step, then decay of what the step left."""

    def __init__(self, weights, weight_decay, decay_last, betas=(0.9, 0.999), eps=1e-8):
        self.weights = {name: w.astype(np.float64) for name, w in weights.items()}
        self.m = {name: np.zeros_like(w) for name, w in self.weights.items()}
        self.v = {name: np.zeros_like(w) for name, w in self.weights.items()}
        self.t, self.weight_decay, self.decay_last, self.betas, self.eps = (
            0,
            weight_decay,
            decay_last,
            betas,
            eps,
        )

    def step(self, grads, lr, moves=None):
        """`moves`: by name, where a weight may change at all; everywhere where it says nothing."""
        self.t += 1
        b1, b2 = self.betas
        for name, g in grads.items():
            w = self.weights[name]
            self.m[name] = b1 * self.m[name] + (1 - b1) * g
            self.v[name] = b2 * self.v[name] + (1 - b2) * g**2
            m_hat, v_hat = self.m[name] / (1 - b1**self.t), self.v[name] / (1 - b2**self.t)
            change = lr * m_hat / (np.sqrt(v_hat) + self.eps)
            shrink = lr * self.weight_decay if "bias" not in name and "LayerNorm.weight" not in name else 0.0
            new = (w - change) * (1 - shrink) if self.decay_last else w * (1 - shrink) - change
            self.weights[name] = new if moves is None else np.where(moves.get(name, True), new, w)


def step_f(adam, grads, masks, keep, lr):
    """Variant F: every tensor is masked, survivors are divided by keep, decay acts on the whole tensor."""
    adam.step({name: g * masks[name] / keep for name, g in grads.items()}, lr)


def fisher(gradients, names, clip):
    """Mean of squared batch gradients by name; `clip` is the norm of each tensor in the release, or None."""
    total = {name: np.zeros(gradients[0][name].shape) for name in names}
    for grads in gradients:
        for name in names:
            g = grads[name].astype(np.float64)
            norm = np.sqrt((g**2).sum())
            if clip is not None and norm > clip:
                g = g * clip / norm
            total[name] += g**2 / len(gradients)
    return total


def child(scores, density, release):
    """The child: in the release what reaches NumPy's percentile, in the paper the int(density n) highest."""
    flat = np.concatenate([s.ravel() for s in scores.values()])
    if release:
        chosen = flat >= np.percentile(flat, (1 - density) * 100)
    else:
        chosen = np.zeros(flat.size, bool)
        chosen[np.argsort(-flat, kind="stable")[: int(density * flat.size)]] = True
    masks, start = {}, 0
    for name, s in scores.items():
        masks[name] = chosen[start : start + s.size].reshape(s.shape)
        start += s.size
    return masks


def step_d(adam, grads, masks, lr, release):
    """Variant D: gradients outside the child are zero; in the paper nothing moves those weights."""
    adam.step({name: g * masks.get(name, 1.0) for name, g in grads.items()}, lr, None if release else masks)
