"""Second-order selection (SAM of Fu et al.) in float64 NumPy: the published rule, and the released code's.

Written from descriptions of the two; shares no code with the package.
"""

import numpy as np


class SecondOrder:
    """Burn in on `observe` gradients, select by the size of their signed sum, train that for ever.

    "paper": the int(density n) largest of all maskable entries; nothing else ever moves.
    "release": gradients clipped to norm 1 all together, then int(density n) in each tensor; the gradient of
    every other entry is zero, which leaves them their weight decay.
    """

    def __init__(
        self, weights, *, fidelity, density, observe, lr, decay, heads, betas=(0.9, 0.999), eps=1e-8
    ):
        self.weights = {name: np.array(w, dtype=np.float64) for name, w in weights.items()}
        self.release = fidelity == "release"
        self.density, self.observe, self.lr, self.decay, self.heads = density, observe, lr, decay, set(heads)
        self.betas, self.eps = betas, eps
        self.sums = {name: np.zeros_like(w) for name, w in self.weights.items() if name not in self.heads}
        self.first = {name: np.zeros_like(w) for name, w in self.weights.items()}
        self.second = {name: np.zeros_like(w) for name, w in self.weights.items()}
        self.calls = 0
        self.selected = {}
        self.gap = np.inf  # distance of the threshold to the next score, relative to it

    def step(self, grads):
        self.calls += 1
        if self.release:
            norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
            grads = {name: g * min(1.0, 1.0 / (norm + 1e-6)) for name, g in grads.items()}
        if self.calls <= self.observe:
            for name in self.sums:
                self.sums[name] += grads[name]
            if self.calls == self.observe:
                self._select()
            return
        for name in self.weights:
            self._adamw(name, grads[name], self.calls - self.observe)

    def masks(self):
        """What the last call trained."""
        if self.calls <= self.observe:
            return {name: np.zeros(w.shape, dtype=bool) for name, w in self.weights.items()}
        return {
            name: self.selected.get(name, np.ones(w.shape, dtype=bool)) for name, w in self.weights.items()
        }

    def _select(self):
        scores = {name: np.abs(total).ravel() for name, total in self.sums.items()}
        if self.release:
            flat = {name: self._top(score) for name, score in scores.items()}
        else:
            chosen = self._top(np.concatenate(list(scores.values())))
            ends = np.cumsum([score.size for score in scores.values()])[:-1]
            flat = dict(zip(scores, np.split(chosen, ends), strict=True))
        self.selected = {name: mask.reshape(self.weights[name].shape) for name, mask in flat.items()}

    def _top(self, scores):
        k = int(self.density * scores.size)
        order = np.argsort(-scores, kind="stable")
        if 0 < k < scores.size:
            self.gap = min(self.gap, 1 - scores[order[k]] / scores[order[k - 1]])
        mask = np.zeros(scores.size, dtype=bool)
        mask[order[:k]] = True
        return mask

    def _adamw(self, name, g, t):
        w, m, v = self.weights[name], self.first[name], self.second[name]
        beta1, beta2 = self.betas
        trained = self.selected.get(name, np.ones(w.shape, dtype=bool))
        g = np.where(trained, g, 0.0)
        moved = np.ones_like(trained) if self.release else trained
        new_m, new_v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        update = (new_m / (1 - beta1**t)) / (np.sqrt(new_v / (1 - beta2**t)) + self.eps)
        new_w = w * (1 - self.lr * self.decay[name]) - self.lr * update
        self.weights[name] = np.where(moved, new_w, w)
        self.first[name], self.second[name] = np.where(moved, new_m, m), np.where(moved, new_v, v)
