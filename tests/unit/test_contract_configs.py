"""config.pbtxt of the models against the tables of contract_inputs.py and contract_outputs.py."""

from __future__ import annotations

import pytest
from tritonclient.grpc import model_config_pb2

from nmoe_backend.contract_inputs import INPUTS, VLLM_INPUTS
from nmoe_backend.contract_outputs import OUTPUTS
from tests.contracts import declared, read_pbtxt

# an ensemble has one name space for inputs and outputs, and always asks its steps for all outputs; that it is one is
# what its first step says
LEFT_OUT = {"deepseek_v3": (), "ensemble": ("prompt_logprobs", "embedding", "uncancellable", *VLLM_INPUTS)}


@pytest.mark.parametrize("model", ["deepseek_v3", "ensemble"])
def test_config_declares_exactly_the_inputs_of_the_table(model: str) -> None:
    config = read_pbtxt(model)
    expected = [(spec.name, spec.dtype, spec.dims) for spec in (*INPUTS.values(), *VLLM_INPUTS.values())]
    assert declared(config.input) == [row for row in expected if row[0] not in LEFT_OUT[model]]
    assert all(one.optional for one in config.input)
    assert all(one.allow_ragged_batch == (-1 in one.dims) for one in config.input)


def test_config_declares_exactly_the_outputs_of_the_table() -> None:
    expected = [(name, dtype, dims) for name, (dtype, dims) in OUTPUTS.items()]
    assert declared(read_pbtxt("deepseek_v3").output) == expected
    assert declared(read_pbtxt("ensemble").output) == [row for row in expected if row[0] not in LEFT_OUT["ensemble"]]


def test_ensemble_passes_every_tensor_on() -> None:
    config = read_pbtxt("ensemble")
    first, second = config.ensemble_scheduling.step
    assert all(name == tensor_name for name, tensor_name in first.input_map.items())
    assert set(first.input_map) == {one.name for one in read_pbtxt("preprocessing").input}
    assert dict(second.input_map) == {
        one.name: one.name for one in config.input if one.name not in ("text_input", "input_ids")
    } | {name: first.output_map[name] for name in ("input_ids", "uncancellable")}
    assert dict(second.output_map) == {one.name: one.name for one in config.output}


def test_engine_model_is_one_decoupled_process_with_a_short_queue_delay() -> None:
    config = read_pbtxt("deepseek_v3")
    assert config.model_transaction_policy.decoupled
    assert [(group.kind, group.count) for group in config.instance_group] == [
        (model_config_pb2.ModelInstanceGroup.KIND_MODEL, 1)
    ]
    assert config.dynamic_batching.max_queue_delay_microseconds <= 1000
