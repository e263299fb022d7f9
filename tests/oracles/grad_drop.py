"""GradDrop in float64 NumPy: gradients times a mask, before AdamW sees them. Shares no code with the package.

The masks are random and come from outside; whether they are constant for as long as they should be, and
equal within a layer, is for the caller to check.
"""

import numpy as np


class GradDrop:
    """The optimizer sees g * mask, or g * mask / keep; a dropped entry coasts on momentum and decays.

    Heads see g as it is.
    """

    def __init__(self, weights, *, keep, rescale, lr, decay, heads, betas=(0.9, 0.999), eps=1e-8):
        self.weights = {name: np.array(w, dtype=np.float64) for name, w in weights.items()}
        self.scale = 1 / keep if rescale else 1.0
        self.lr, self.decay, self.heads, self.betas, self.eps = lr, decay, set(heads), betas, eps
        self.first = {name: np.zeros_like(w) for name, w in self.weights.items()}
        self.second = {name: np.zeros_like(w) for name, w in self.weights.items()}
        self.steps = 0

    def step(self, grads, masks):
        self.steps += 1
        beta1, beta2 = self.betas
        for name, w in self.weights.items():
            g = grads[name] if name in self.heads else np.where(masks[name], grads[name] * self.scale, 0.0)
            m = self.first[name] = beta1 * self.first[name] + (1 - beta1) * g
            v = self.second[name] = beta2 * self.second[name] + (1 - beta2) * g * g
            corrected = np.sqrt(v / (1 - beta2**self.steps)) + self.eps
            update = m / (1 - beta1**self.steps) / corrected
            self.weights[name] = w - self.lr * self.decay[name] * w - self.lr * update
