"""How long will a step take? A linear model, fitted online, that the scheduler uses to size prefill chunks.

    seconds = base + per_row * decode rows + per_token * prefill tokens + per_pair * (query, key) pairs of the prefill

of the rank that has most, since all ranks of a step wait for each other. A chunk of L tokens that starts at position s
attends to L * s + L * L / 2 pairs. Coefficients are never negative, so more work is never predicted to be faster.

The fit is weighted least squares over exponentially forgotten sums (the normal equations, 4 x 4), with a weak pull to
the last solution that decides where the data do not (a feature that does not vary). Coefficients that come out
negative are pinned to 0 and the rest is solved again. Outliers (a page fault, a first compile) weigh 1 / error^2; a
lasting change widens the scale by which outliers are judged, and so is believed within about 100 steps. About 15 us
a step.
"""

from __future__ import annotations

import math

_SCALES = (1.0, 1.0 / 256, 1.0 / 1024, 1.0 / (1 << 20))  # features of like size: well-conditioned sums
_MEMORY_STEPS = 100  # after so many further steps the weight of one has fallen to 1/e
_PULL = 1e-4  # weight of the last solution, in observations
_OUTLIER = 4.0  # an error beyond so many mean absolute errors


class StepTimeModel:
    """Predicts the seconds of a step from its size; learns from `observe`. Before the first observation it says 0."""

    def __init__(self) -> None:
        self._gram = [[0.0] * 4 for _ in range(4)]
        self._moment = [0.0] * 4
        self._theta = [0.0] * 4
        self._mean_error_s = 0.0
        self._num_observed = 0
        self._most_tokens = 0

    @property
    def most_tokens(self) -> int:
        """The largest prefill (tokens of a rank in one step) seen: predictions far beyond it are extrapolated."""
        return self._most_tokens

    def predict(self, decode_rows: int, prefill_tokens: int = 0, pairs: float = 0.0) -> float:
        """Seconds of a step whose fullest rank decodes and prefills so much."""
        theta = self._theta
        return theta[0] + theta[1] * decode_rows * _SCALES[1] + self.prefill_cost(prefill_tokens, pairs)

    def prefill_cost(self, prefill_tokens: int, pairs: float) -> float:
        """The seconds that a rank's prefill adds to a step."""
        return self._theta[2] * prefill_tokens * _SCALES[2] + self._theta[3] * pairs * _SCALES[3]

    def tokens_within(self, room_s: float, start: int, most: int) -> int:
        """The longest chunk, at most `most` tokens, that starts at position `start` and costs at most room_s."""
        if room_s <= 0.0:
            return 0
        if self.prefill_cost(most, most * (start + 0.5 * most)) <= room_s:
            return most
        # per_pair / 2 * L^2 + (per_token + per_pair * start) * L = room_s, in the form that is stable for per_pair -> 0
        half = 0.5 * self._theta[3] * _SCALES[3]
        slope = self._theta[2] * _SCALES[2] + 2.0 * half * start
        return min(most, int(2.0 * room_s / (slope + math.sqrt(slope * slope + 4.0 * half * room_s))))

    def observe(self, decode_rows: int, prefill_tokens: int, pairs: float, seconds: float) -> None:
        """Learn from one measured step."""
        self._most_tokens = max(self._most_tokens, prefill_tokens)
        row = [1.0, decode_rows * _SCALES[1], prefill_tokens * _SCALES[2], pairs * _SCALES[3]]
        weight = self._weight(seconds - self.predict(decode_rows, prefill_tokens, pairs), seconds)
        self._num_observed += 1
        # A short memory at first: the earliest steps are the ones that compile, load and page in.
        keep = 1.0 - max(1.0 / _MEMORY_STEPS, 2.0 / (self._num_observed + 1))
        for i, gram_row in enumerate(self._gram):
            weighted = weight * row[i]
            for j in range(4):
                gram_row[j] = keep * gram_row[j] + weighted * row[j]
            self._moment[i] = keep * self._moment[i] + weighted * seconds
        self._solve()

    def _weight(self, error_s: float, seconds: float) -> float:
        """Weight of an observation; also updates the running scale of errors that it is judged by."""
        size = abs(error_s)
        if self._num_observed < 8:
            self._mean_error_s = max(self._mean_error_s * 0.5, min(size, seconds))
            return 1.0
        scale = max(self._mean_error_s, 0.005 * seconds)
        self._mean_error_s = scale + 0.05 * (min(size, 8.0 * scale) - scale)
        ratio = size / (_OUTLIER * scale)
        return 1.0 if ratio <= 1.0 else 1.0 / (ratio * ratio)

    def _solve(self) -> None:
        """Minimise the weighted squared error plus the pull to the last solution, over coefficients >= 0."""
        old = self._theta
        active = [i for i in range(4) if self._gram[i][i] > 1e-12]  # else never seen, or long forgotten: keep it
        inactive = [i for i in range(4) if i not in active]
        while active:
            rows = []
            for i in active:
                gram = self._gram[i]
                rest = self._moment[i] + _PULL * old[i] - sum(gram[j] * old[j] for j in inactive)
                rows.append([gram[j] + (_PULL if j == i else 0.0) for j in active] + [rest])
            solution = _eliminate(rows)
            negative = [i for i, value in zip(active, solution, strict=True) if value < 0.0]
            if not negative:
                self._theta = list(old)
                for i, value in zip(active, solution, strict=True):
                    self._theta[i] = value
                return
            old = [0.0 if i in negative else value for i, value in enumerate(old)]
            active = [i for i in active if i not in negative]
            inactive += negative
        self._theta = old


def _eliminate(rows: list[list[float]]) -> list[float]:
    """Solve a symmetric positive definite system, given as rows of [matrix | right side], by Gaussian elimination."""
    size = len(rows)
    for i in range(size):
        pivot = rows[i]
        for row in rows[i + 1 :]:
            factor = row[i] / pivot[i]
            for k in range(i, size + 1):
                row[k] -= factor * pivot[k]
    solution = [0.0] * size
    for i in range(size - 1, -1, -1):
        row = rows[i]
        solution[i] = (row[size] - sum(row[k] * solution[k] for k in range(i + 1, size))) / row[i]
    return solution
