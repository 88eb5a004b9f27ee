"""Calls as clients make them, and the contract that reads them, over the tokenizer of tests/texts.py; config.pbtxt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from nmoe_backend.contract import Call, Contract, ParsedRequest
from nmoe_backend.contract_inputs import INPUTS, NUMPY_TYPES
from nmoe_backend.contract_outputs import OUTPUTS, ResponseEncoder
from nmoe_backend.generation import GenerationDefaults
from nmoe_backend.text import Text

REPOSITORY = Path(__file__).parents[1] / "model_repository"
VOCAB_SIZE = 400
MAX_SEQ_LEN = 64
GENERATION = GenerationDefaults(
    temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.1, max_tokens=None, eos_token_ids=(1,)
)
ALL_OUTPUTS = frozenset(OUTPUTS)


def make_contract(text: Text, max_orphan_s: float = 0.0, **options: bool) -> Contract:
    return Contract(
        text,
        GENERATION,
        vocab_size=VOCAB_SIZE,
        max_seq_len=MAX_SEQ_LEN,
        exclude_input_in_output=options.get("exclude_input_in_output", True),
        allow_stop_by_id=options.get("allow_stop_by_id", False),
        max_orphan_s=max_orphan_s,
    )


def tensor(name: str, value: object) -> np.ndarray:
    """[1, ...] in the declared type; a list is an array of dims [-1], anything else a scalar."""
    dtype = NUMPY_TYPES[INPUTS[name].dtype]
    items = value if isinstance(value, list) else [value]
    if dtype is np.object_:
        items = [item.encode() if isinstance(item, str) else item for item in items]
    array = np.empty((1, len(items)), dtype)
    array[0, :] = items
    return array


def call(
    parameters: str = "", client_id: str = "", timeout_us: int = 0, outputs: object = None, **values: object
) -> Call:
    tensors = {name: value if isinstance(value, np.ndarray) else tensor(name, value) for name, value in values.items()}
    return Call(
        request_id=7,
        tensors=tensors,
        parameters=parameters,
        client_id=client_id,
        requested_outputs=ALL_OUTPUTS if outputs is None else frozenset(outputs),  # type: ignore[call-overload]
        timeout_us=timeout_us,
        arrival_s=100.0,
    )


def parse(text: Text, **values: object) -> ParsedRequest:
    parsed = make_contract(text).parse(call(**values))  # type: ignore[arg-type]
    assert isinstance(parsed, ParsedRequest)
    return parsed


def encoder(text: Text) -> ResponseEncoder[tuple[str, np.ndarray]]:
    return ResponseEncoder(lambda name, array: (name, array), text)


def read_pbtxt(model: str) -> model_config_pb2.ModelConfig:
    source = (REPOSITORY / model / "config.pbtxt").read_text()
    return text_format.Parse(source, model_config_pb2.ModelConfig())


def declared(tensors: object) -> list[tuple[str, str, tuple[int, ...]]]:
    names = model_config_pb2.DataType.Name
    return [
        (one.name, names(one.data_type).removeprefix("TYPE_").replace("STRING", "BYTES"), tuple(one.dims))
        for one in tensors  # type: ignore[attr-defined]
    ]
