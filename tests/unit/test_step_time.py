"""The model of step times, on synthetic steps: no clock is read."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from nmoe_backend.step_time import StepTimeModel

Truth = Callable[[int, int, float], float]


def truth(rows: int, tokens: int, pairs: float) -> float:
    return 0.020 + 4e-5 * rows + 1e-4 * tokens + 2e-8 * pairs


def random_step(rng: random.Random) -> tuple[int, int, float]:
    tokens = rng.choice([0, 0, 0, 64, 512, 2048])
    return rng.randrange(100, 257), tokens, tokens * (rng.randrange(8000) + 0.5 * tokens)


def train(model: StepTimeModel, rng: random.Random, steps: int, factor: float = 1.0, outliers: float = 0.0) -> None:
    for _ in range(steps):
        step = random_step(rng)
        seconds = factor * truth(*step) * rng.gauss(1.0, 0.02)
        model.observe(*step, seconds * 20 if rng.random() < outliers else seconds)


def worst_error(model: StepTimeModel, rng: random.Random, factor: float = 1.0) -> float:
    steps = [random_step(rng) for _ in range(100)]
    return max(abs(model.predict(*step) / (factor * truth(*step)) - 1.0) for step in steps)


def test_an_untrained_model_predicts_nothing() -> None:
    assert StepTimeModel().predict(256, 1024, 1e6) == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_learns_a_linear_truth_from_noisy_steps(seed: int) -> None:
    rng, model = random.Random(seed), StepTimeModel()
    train(model, rng, 300)
    assert worst_error(model, rng) < 0.05


@pytest.mark.parametrize("seed", range(4))
def test_outliers_hardly_move_it(seed: int) -> None:
    rng, model = random.Random(seed), StepTimeModel()
    train(model, rng, 600, outliers=0.03)
    assert worst_error(model, rng) < 0.10


@pytest.mark.parametrize("seed", range(4))
def test_a_lasting_change_is_believed(seed: int) -> None:
    rng, model = random.Random(seed), StepTimeModel()
    train(model, rng, 300)
    train(model, rng, 400, factor=2.0)
    assert worst_error(model, rng, factor=2.0) < 0.10


def test_a_slow_first_step_is_forgotten() -> None:
    rng, model = random.Random(0), StepTimeModel()
    model.observe(0, 64, 2048.0, 30.0)  # compiles everything
    train(model, rng, 200)
    assert worst_error(model, rng) < 0.10


def test_more_work_is_never_predicted_to_be_faster() -> None:
    rng, model = random.Random(1), StepTimeModel()
    for _ in range(300):
        rows, tokens, pairs = random_step(rng)
        model.observe(rows, tokens, pairs, max(0.0, 0.1 - 1e-4 * rows - 1e-6 * tokens))  # against all reason
        assert model.predict(10) <= model.predict(20)
        assert 0.0 <= model.prefill_cost(10, 100.0) <= model.prefill_cost(20, 200.0)


@pytest.mark.parametrize("start", [0, 100, 8000])
@pytest.mark.parametrize("room_s", [0.001, 0.01, 0.05])
def test_tokens_within_is_the_longest_chunk_that_fits(start: int, room_s: float) -> None:
    rng, model = random.Random(2), StepTimeModel()
    train(model, rng, 300)
    length = model.tokens_within(room_s, start, 4096)
    assert 0 < length < 4096
    assert model.prefill_cost(length, length * (start + 0.5 * length)) <= room_s * (1 + 1e-9)
    longer = length + 1
    assert model.prefill_cost(longer, longer * (start + 0.5 * longer)) > room_s


def test_no_room_means_no_tokens() -> None:
    assert StepTimeModel().tokens_within(0.0, 0, 100) == 0
    assert StepTimeModel().tokens_within(-1.0, 0, 100) == 0
