"""Fixtures of the gate tests: the tiny reference model, and the devices that a test runs on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scripts.make_tiny_checkpoint import make_checkpoint
from tests.gates.replica import hf_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Rank threads share the machine; more threads inside an operation only get in their way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device that a test of the data plane has to pass on."""
    return request.param


@pytest.fixture(scope="session")
def tiny_model() -> torch.nn.Module:
    """transformers' DeepseekV3ForCausalLM with tiny random weights, fp32, on the CPU. Not to be changed."""
    return hf_model()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random checkpoint in the hub's form, fp32, with tokenizer. Not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), preset="tiny", dtype="float32")
