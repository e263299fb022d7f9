"""Dynamic parameter selection in float64 NumPy, dense and mix, paper and release.

Written from descriptions of the paper and the released code; shares no code with the package. AdamW is
torch's: decay before the update.
"""

import math

import numpy as np


def mix(weight, anchor, active, q):
    """The effective weight of DPS Mix and Mixout: `active` is [in] for stage I, [out, in] for stage II."""
    m = np.asarray(active, dtype=np.float64)
    return (m * weight + (1 - m) * anchor - q * anchor) / (1 - q)


class DPS:
    """Fed with gradients, and in mix with the columns that were active in each backward pass of the step."""

    def __init__(
        self, weights, *, masked, variant, fidelity, density, u, lr, decay, betas=(0.9, 0.999), eps=1e-8
    ):
        self.weights = {name: np.array(w, dtype=np.float64) for name, w in weights.items()}
        self.initial = {name: w.copy() for name, w in self.weights.items()}
        self.masked, self.mixes, self.release = set(masked), variant == "mix", fidelity == "release"
        self.q, self.u, self.lr, self.decay, self.betas, self.eps = 1 - density, u, lr, decay, betas, eps
        self.first = {name: np.zeros_like(w) for name, w in self.weights.items()}
        self.second = {name: np.zeros_like(w) for name, w in self.weights.items()}
        self.t = 0
        self.selected, self.start, self.trained = {}, {}, {}
        self.selections = 0
        self.gap = np.inf  # smallest distance of a threshold to the next score below, relative to it

    def stage_two(self):
        """Whether the coming step belongs to stage II."""
        return math.ceil((self.t + 1) / self.u) % 2 == 0

    def effective(self, name, columns):
        """What the forward pass of the coming step uses for a linear weight."""
        w = self.weights[name]
        if not self.mixes or (self.stage_two() and not self.release):
            return w
        if self.stage_two():
            return mix(w, self.start[name], self.selected[name], self.q)
        return mix(w, self.initial[name], columns, self.q)

    def gradient(self, name, columns, g):
        """The gradient of the raw weight, from that of the effective one."""
        if not self.mixes or (self.stage_two() and not self.release):
            return g
        m = self.selected[name] if self.stage_two() else columns
        return g * m / (1.0 if self.release else 1 - self.q)

    def step(self, grads, columns=None):
        """`columns`: by name, a list of 0/1 vectors [in], one per backward pass."""
        two, u = self.stage_two(), self.u
        self.t += 1
        if not two and (self.t - 1) % (2 * u) == 0:
            self.squares = {name: np.zeros_like(self.weights[name]) for name in self.masked}
            self.counts = {name: np.zeros(self.weights[name].shape[-1]) for name in self.masked}
        for name, g in grads.items():
            trained = np.ones(g.shape, dtype=bool)
            if name in self.masked and two:
                trained = self.selected[name]
            elif name in self.masked:
                self.squares[name] += g**2 / 1000
                for m in (columns or {}).get(name, []):
                    self.counts[name] += m
            self.trained[name] = trained
            self._adamw(name, np.where(trained, g, 0.0), np.ones_like(trained) if self.release else trained)
        if not two and self.stage_two():
            self.selections += 1
            self.selected = {name: self._select(self._score(name)) for name in self.masked}
            self.start = {name: self.weights[name].copy() for name in self.masked}

    def _score(self, name):
        squares, counts = self.squares[name], self.counts[name]
        if not self.mixes:
            return squares
        score = squares / np.maximum(counts, 1)
        return score if self.release and self.u < 50 else score * np.exp(-counts / self.u)

    def _select(self, score):
        flat, n = score.ravel(), score.size
        order = np.argsort(-flat, kind="stable")
        if self.release:
            # the rounding keeps 0.7 * 10 at 7
            k = math.ceil(round(n * (1 - self.q), 9))
            chosen = flat >= flat[order[k - 1]]
        else:
            k = int(round(n * (1 - self.q), 9))
            chosen = np.zeros(n, dtype=bool)
            chosen[order[:k]] = True
        if 0 < k < n:
            self.gap = min(self.gap, 1 - flat[order[k]] / flat[order[k - 1]])
        return chosen.reshape(score.shape)

    def _adamw(self, name, g, moves):
        b1, b2 = self.betas
        w, lr = self.weights[name], self.lr
        m, v = b1 * self.first[name] + (1 - b1) * g, b2 * self.second[name] + (1 - b2) * g**2
        change = lr * (m / (1 - b1**self.t)) / (np.sqrt(v / (1 - b2**self.t)) + self.eps)
        new = w * (1 - lr * self.decay[name]) - change
        self.weights[name] = np.where(moves, new, w)
        self.first[name] = np.where(moves, m, self.first[name])
        self.second[name] = np.where(moves, v, self.second[name])
