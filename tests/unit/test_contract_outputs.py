"""contract_outputs.py: the tensors of a response."""

from __future__ import annotations

import json

import numpy as np

from nmoe_backend.contract_inputs import NUMPY_TYPES
from nmoe_backend.contract_outputs import OUTPUTS, Chunk, ResponseEncoder
from nmoe_backend.text import Text
from nmoe_backend.types import TokenLogprobs
from tests.contracts import encoder


def test_every_output_has_its_declared_type_and_rank_whatever_there_is_to_say(text: Text) -> None:
    logprobs = [TokenLogprobs(3, -0.5, ((4, -1.0), (5, float("-inf"))))]
    chunks = [
        Chunk(text="", token_ids=(), num_input_tokens=0),
        Chunk(
            text="é",
            token_ids=[3],
            num_input_tokens=5000,
            logprobs=logprobs,
            cum_logprob=-0.5,
            prompt_logprobs=logprobs,
            embedding=[1.0, 2.0],
            finish_reason="stop",
        ),
    ]
    for chunk in chunks:
        tensors = encoder(text).encode(chunk, tuple(OUTPUTS))
        assert [name for name, _ in tensors] == list(OUTPUTS)
        for name, array in tensors:
            dtype, dims = OUTPUTS[name]
            assert array.dtype == NUMPY_TYPES[dtype]
            assert array.ndim == len(dims) + 1
            assert all(want in (-1, have) for want, have in zip((1, *dims), array.shape, strict=True))


def test_the_values_of_a_last_response(text: Text) -> None:
    logprobs = [TokenLogprobs(3, -0.5, ((4, -1.0), (5, float("-inf")))), TokenLogprobs(4, float("nan"))]
    chunk = Chunk(
        text="é", token_ids=[3, 4], num_input_tokens=5, logprobs=logprobs, cum_logprob=-0.75,
        prompt_logprobs=[TokenLogprobs(6, -2.0)], finish_reason="length",
    )  # fmt: skip
    values = dict(encoder(text).encode(chunk, tuple(OUTPUTS)))
    assert values["text_output"][0, 0] == "é".encode()
    assert values["output_ids"].tolist() == [[3, 4]]
    assert values["finish_reason"][0, 0] == b"length"
    assert [values[name][0, 0] for name in ("num_input_tokens", "num_output_tokens", "num_cached_tokens")] == [5, 2, 0]
    assert values["cum_log_probs"][0, 0] == -0.75
    assert values["output_log_probs"].tolist() == [[[-0.5, -9999.0]]]
    entries = json.loads(values["logprobs"][0, 0])
    assert [entry["token_id"] for entry in entries] == [3, 4]
    assert bytes(entries[0]["bytes"]) == text.raw_token_bytes(3)
    assert [(top["token_id"], top["logprob"]) for top in entries[0]["top_logprobs"]] == [(4, -1.0), (5, -9999.0)]
    prompt = json.loads(values["prompt_logprobs"][0, 0])
    assert prompt[0] is None
    assert prompt[1]["logprob"] == -2.0


def test_constant_tensors_are_made_once(text: Text) -> None:
    made: list[str] = []

    def make(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
        made.append(name)
        return name, array

    responses = ResponseEncoder(make, text)
    for _ in range(3):
        responses.encode(Chunk(text="a", token_ids=[1], num_input_tokens=9), tuple(OUTPUTS))
    assert [name for name in made if made.count(name) > 1] == ["text_output", "output_ids"] * 2 + [
        "text_output",
        "output_ids",
    ]


def test_no_float_tensor_is_ever_empty(text: Text) -> None:
    """perf_analyzer reads what lies behind an empty one."""
    chunk = Chunk(text="", token_ids=(), num_input_tokens=3)
    for name, array in encoder(text).encode(chunk, list(OUTPUTS)):
        if array.dtype == np.float32:
            assert array.tolist() in ([[0.0]], [[[0.0]]]), name
