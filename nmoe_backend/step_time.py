"""How long will a step take? A linear model, fitted online, that the scheduler uses to size prefill chunks.

    seconds = base + per_row * rows that decode + per_token * tokens that are computed
            + (prefill + per_pair * (query, key) pairs, where there is prefill)

of the rank that has most, since all ranks of a step wait for each other. Tokens that are computed are decode rows,
prefill and padding: what the step's bucket holds. A chunk of L tokens that starts at position s attends to
L * s + L * L / 2 pairs. Coefficients are never negative, so more work is never predicted to be faster.

The fit is weighted least squares over exponentially forgotten sums (the normal equations, 5 x 5), with a weak pull to
the last solution that decides where the data do not (a feature that does not vary). Coefficients that come out
negative are pinned to 0 and the rest is solved again. Outliers (a page fault, a first compile) weigh 1 / error^2; a
lasting change widens the scale by which outliers are judged, and so is believed within about 100 steps. About 20 us
a step.
"""

from __future__ import annotations

from typing import NamedTuple

_ROWS, _TOKENS, _PAIRS = 1.0 / 256, 1.0 / 1024, 1.0 / (1 << 20)  # features of like size: well-conditioned sums
# Smaller than the others: as long as all prefills are of one size, what they cost is put down to their tokens.
_PREFILL = 1.0 / 128
_NUM_FEATURES = 5
_MEMORY_STEPS = 100  # after so many further steps the weight of one has fallen to 1/e
_PULL = 1e-4  # weight of the last solution, in observations
_OUTLIER = 4.0  # an error beyond so many mean absolute errors


class StepSize(NamedTuple):
    """Of a step's fullest rank."""

    rows: int  # that decode
    tokens: int  # that are computed
    pairs: float  # of prefill; 0: there is none


class StepTimeModel:
    """Predicts the seconds of a step from its size; learns from `observe`. Before the first observation it says 0."""

    def __init__(self) -> None:
        self._gram = [[0.0] * _NUM_FEATURES for _ in range(_NUM_FEATURES)]
        self._moment = [0.0] * _NUM_FEATURES
        self._theta = [0.0] * _NUM_FEATURES
        self._mean_error_s = 0.0
        self._num_observed = 0

    def predict(self, size: StepSize) -> float:
        """Seconds of such a step."""
        base, per_row, per_token, prefill, per_pair = self._theta
        seconds = base + per_row * size.rows * _ROWS + per_token * size.tokens * _TOKENS
        return seconds + prefill * _PREFILL + per_pair * size.pairs * _PAIRS if size.pairs else seconds

    def observe(self, size: StepSize, seconds: float) -> None:
        """Learn from one measured step."""
        prefill = _PREFILL if size.pairs else 0.0
        row = [1.0, size.rows * _ROWS, size.tokens * _TOKENS, prefill, size.pairs * _PAIRS]
        weight = self._weight(seconds - self.predict(size), seconds)
        self._num_observed += 1
        # A short memory at first: the earliest steps are the ones that compile, load and page in.
        keep = 1.0 - max(1.0 / _MEMORY_STEPS, 2.0 / (self._num_observed + 1))
        for i, gram_row in enumerate(self._gram):
            weighted = weight * row[i]
            for j in range(_NUM_FEATURES):
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
        # The others were never seen, or long ago: they keep what they have.
        active = [i for i in range(_NUM_FEATURES) if self._gram[i][i] > 1e-12]
        inactive = [i for i in range(_NUM_FEATURES) if i not in active]
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
