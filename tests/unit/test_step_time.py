"""The model of step times, on synthetic steps: no clock is read."""

from __future__ import annotations

import random

import pytest

from nmoe_backend.step_time import StepSize, StepTimeModel


def truth(size: StepSize) -> float:
    return 0.020 + 4e-5 * size.rows + 1e-4 * size.tokens + 2e-8 * size.pairs + (0.008 if size.pairs else 0.0)


def random_step(rng: random.Random) -> StepSize:
    """Decode rows take the next multiple of 64; beside prefill, 256."""
    prefill, rows = rng.choice([0, 0, 0, 64, 512, 2048]), rng.randrange(100, 257)
    tokens = 256 + prefill if prefill else -(-rows // 64) * 64
    return StepSize(rows, tokens, prefill * (rng.randrange(8000) + 0.5 * prefill))


def train(model: StepTimeModel, rng: random.Random, steps: int, factor: float = 1.0, outliers: float = 0.0) -> None:
    for _ in range(steps):
        step = random_step(rng)
        seconds = factor * truth(step) * rng.gauss(1.0, 0.02)
        model.observe(step, seconds * 20 if rng.random() < outliers else seconds)


def worst_error(model: StepTimeModel, rng: random.Random, factor: float = 1.0) -> float:
    steps = [random_step(rng) for _ in range(100)]
    return max(abs(model.predict(step) / (factor * truth(step)) - 1.0) for step in steps)


def test_an_untrained_model_predicts_nothing() -> None:
    assert StepTimeModel().predict(StepSize(256, 1024, 1e6)) == 0.0


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
    model.observe(StepSize(0, 64, 2048.0), 30.0)  # compiles everything
    train(model, rng, 200)
    assert worst_error(model, rng) < 0.10


def test_more_work_is_never_predicted_to_be_faster() -> None:
    rng, model = random.Random(1), StepTimeModel()
    for _ in range(300):
        size = random_step(rng)
        model.observe(size, max(0.0, 0.1 - 1e-4 * size.rows - 1e-6 * size.tokens))  # against all reason
        assert model.predict(StepSize(10, 16, 0.0)) <= model.predict(StepSize(20, 32, 0.0))
        assert model.predict(StepSize(10, 16, 0.0)) <= model.predict(StepSize(10, 16, 100.0))
        assert model.predict(StepSize(10, 128, 100.0)) <= model.predict(StepSize(10, 256, 200.0))


def test_a_step_with_prefill_costs_what_its_launches_cost_however_little_it_computes() -> None:
    rng, model = random.Random(2), StepTimeModel()
    train(model, rng, 300)
    bare, least = StepSize(200, 256, 0.0), StepSize(200, 256, 1.0)
    assert model.predict(least) - model.predict(bare) == pytest.approx(0.008, rel=0.25)
