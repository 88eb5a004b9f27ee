"""contract.py and contract_inputs.py: what is read of a call, what is refused and with which words."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from nmoe_backend.contract import Call, Contract, ParsedRequest, StopCommand
from nmoe_backend.contract_outputs import OUTPUTS
from nmoe_backend.text import Text
from nmoe_backend.types import ErrorKind, RequestError, SamplingParams
from tests.contracts import ALL_OUTPUTS, GENERATION, MAX_SEQ_LEN, VOCAB_SIZE, call, make_contract, parse, tensor
from tests.texts import BOS


def test_a_plain_prompt_gets_the_models_defaults(text: Text) -> None:
    parsed = parse(text, text_input="hello")
    assert parsed.request.prompt_ids == tuple(text.encode("hello"))
    assert parsed.request.sampling == SamplingParams(
        temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=pytest.approx(1.1)
    )
    assert (parsed.request.request_id, parsed.request.arrival_s, parsed.request.deadline_s) == (7, 100.0, None)
    assert not parsed.response.stream
    assert parsed.response.echo == ""
    assert parsed.response.outputs == tuple(OUTPUTS)


def test_every_sampling_tensor_reaches_its_parameter(text: Text) -> None:
    sampling = parse(
        text,
        text_input="hello",
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias='{"3": -100, "4": 1.5}',
        bad_words=["we", ""],
        seed=2**64 - 1,
        stop_words=["END", "", "\n\n"],
        stop_token_ids=[5, 6],
        end_id=7,
        ignore_eos=True,
        top_logprobs=4,
        prompt_logprobs=2,
    ).request.sampling
    assert sampling == SamplingParams(
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias=MappingProxyType({3: -100.0, 4: 1.5}),
        bad_words_ids=tuple(text.encode_word("we")),
        seed=2**64 - 1,
        stop=("END", "\n\n"),
        stop_token_ids=(5, 6, 7),
        ignore_eos=True,
        num_logprobs=4,
        num_prompt_logprobs=2,
    )


def test_aliases_set_the_same_field_and_may_agree(text: Text) -> None:
    sampling = parse(text, text_input="a", min_length=3, min_tokens=3, random_seed=5).request.sampling
    assert (sampling.min_tokens, sampling.seed) == (3, 5)
    assert parse(text, text_input="a", streaming=True).response.stream
    with pytest.raises(RequestError, match="min_tokens and min_length: got .*need one value"):
        parse(text, text_input="a", min_length=3, min_tokens=4)


def test_a_client_that_sends_every_tensor_with_neutral_values_gets_the_defaults(text: Text) -> None:
    neutral: dict[str, object] = {
        "text_input": "hello",
        "input_ids": [],
        "top_k": -1,
        "end_id": -1,
        "pad_id": -1,
        "deadline_ms": 0,
        "min_response_interval_ms": 0,
        "priority": 0,
        "min_length": 0,
        "top_logprobs": 0,
        "prompt_logprobs": 0,
        "lora_task_id": 0,
        "adapter": "",
        "stop_words": [""],
        "bad_words": [""],
        "stop_token_ids": [],
        "logit_bias": "",
        "beam_width": 1,
        "num_return_sequences": 1,
        "length_penalty": 1.0,
        "return_log_probs": False,
        "return_context_logits": False,
        "return_generation_logits": False,
        "return_perf_metrics": False,
        "return_num_input_tokens": True,
        "return_num_output_tokens": False,
        "guided_decoding_guide_type": "",
        "guided_decoding_guide": "",
        "embedding_bias_words": [""],
        "embedding_bias_weights": [],
        "decoder_text_input": "",
        "prompt_vocab_size": 0,
        "prompt_table_extra_id": 0,
        "stop": False,
        "ignore_eos": False,
    }
    sampling = parse(text, **neutral).request.sampling
    assert sampling == SamplingParams(temperature=0.6, top_p=0.95, top_k=0, repetition_penalty=pytest.approx(1.1))


def test_ids_are_taken_as_they_are(text: Text) -> None:
    assert parse(text, input_ids=[3, 4, 5]).request.prompt_ids == (3, 4, 5)
    assert parse(text, input_ids=[3], text_input="").request.prompt_ids == (3,)


def test_a_stream_may_name_a_least_time_between_its_responses(text: Text) -> None:
    assert parse(text, text_input="a").response.min_interval_s == 0.0
    assert parse(text, text_input="a", min_response_interval_ms=250).response.min_interval_s == 0.25


def test_the_nearest_of_all_deadlines_counts(text: Text) -> None:
    assert parse(text, text_input="a", deadline_ms=1500).request.deadline_s == 101.5
    assert parse(text, text_input="a", deadline_ms=1500, timeout_us=500_000).request.deadline_s == 100.5
    assert parse(text, text_input="a", parameters='{"timeout": 250000}').request.deadline_s == 100.25
    contract = make_contract(text, max_orphan_s=2.0)
    for given, deadline_s in (
        ({}, None),
        ({"uncancellable": True}, 102.0),
        ({"uncancellable": True, "deadline_ms": 1}, 100.001),
    ):
        parsed = contract.parse(call(text_input="a", **given))
        assert isinstance(parsed, ParsedRequest)
        assert parsed.request.deadline_s == deadline_s


def test_the_prompt_stands_in_front_only_when_asked_for(text: Text) -> None:
    assert parse(text, text_input=BOS + "hello", exclude_input_in_output=False).response.echo == "hello"
    included = make_contract(text, exclude_input_in_output=False)
    first, second = (
        included.parse(call(text_input="hello")),
        included.parse(call(text_input="a", exclude_input_in_output=True)),
    )
    assert isinstance(first, ParsedRequest) and first.response.echo == "hello"
    assert isinstance(second, ParsedRequest) and second.response.echo == ""


@pytest.mark.parametrize(
    ("outputs", "embeds"),
    [
        (["embedding"], True),
        (["embedding", "num_input_tokens"], True),
        (["embedding", "text_output"], False),
        (list(OUTPUTS), False),
    ],
)
def test_only_a_request_for_nothing_but_the_embedding_embeds(text: Text, outputs: list[str], embeds: bool) -> None:
    assert parse(text, text_input="a", outputs=outputs).request.embed is embeds


def test_stop_needs_the_toml_and_an_id(text: Text) -> None:
    with pytest.raises(RequestError, match="allow_stop_by_id"):
        parse(text, stop=True, client_id="a")
    allowed = make_contract(text, allow_stop_by_id=True)
    assert allowed.parse(call(stop=True, client_id="a")) == StopCommand(client_id="a")
    with pytest.raises(RequestError, match="no request id"):
        allowed.parse(call(stop=True))
    assert isinstance(allowed.parse(call(stop=False, text_input="a")), ParsedRequest)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "text_input is required"),
        ({"text_input": ""}, "text_input is required: got an empty prompt"),
        ({"input_ids": []}, "empty prompt"),
        ({"text_input": "a", "input_ids": [1]}, "both text_input and input_ids"),
        ({"text_input": b"ab\xff"}, "text_input: got invalid UTF-8 at byte 2, need UTF-8"),
        ({"text_input": "a" * 40_000}, "max_seq_len=64"),
        ({"text_input": np.array([[b"a"], [b"b"]], object)}, "batch dimension of 2, need 1"),
        ({"text_input": np.array([b"a"], object)}, r"shape \[1\], need \[1, 1\]"),
        ({"max_tokens": -1}, r"max_tokens: got -1, need an integer in \[0"),
        ({"max_tokens": np.ones((1, 1), np.int64)}, "max_tokens: got type int64, need INT32"),
        ({"max_tokens": np.ones((1, 2), np.int32)}, r"max_tokens: got shape \[1, 2\], need \[1, 1\]"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens: got 5, need at most max_tokens=4"),
        ({"temperature": float("nan")}, r"temperature: got nan, need a finite number in \[0"),
        ({"temperature": float("inf")}, "temperature: got inf"),
        ({"temperature": -0.5}, "0 is greedy"),
        ({"top_p": 0.0}, r"top_p: got 0.0, need a finite number in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"top_k": -2}, "top_k: got -2"),
        ({"min_p": -0.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty: got 2.5"),
        ({"frequency_penalty": float("-inf")}, "frequency_penalty"),
        ({"stop_words": ["x"] * 17}, "stop_words: got 17 strings, need at most 16"),
        ({"stop_words": ["x" * 257]}, "stop_words: got a string of 257 characters, need at most 256"),
        ({"stop_words": [b"\xff"]}, "stop_words: got invalid UTF-8"),
        ({"bad_words": ["x"] * 65}, "bad_words: got 65 strings"),
        ({"stop_token_ids": [VOCAB_SIZE]}, r"token id 400, need ids in \[0, 400\)"),
        ({"stop_token_ids": [-1]}, "token id -1"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids: got 65 token ids"),
        ({"end_id": VOCAB_SIZE}, "token id 400"),
        ({"logit_bias": "[1]"}, "logit_bias: .*need a JSON object"),
        ({"logit_bias": "{"}, "logit_bias: .*need a JSON object"),
        ({"logit_bias": '{"x": 1}'}, "logit_bias: .*need a token id with a bias"),
        ({"logit_bias": '{"1": NaN}'}, "need a token id with a bias"),
        ({"logit_bias": '{"1": 101}'}, "need a token id with a bias"),
        ({"logit_bias": '{"1": true}'}, "need a token id with a bias"),
        ({"logit_bias": '{"400": 1}'}, "logit_bias: got token id 400"),
        ({"top_logprobs": 21}, "top_logprobs: got 21"),
        ({"beam_width": 2}, "beam_width: got 2, need 1. This server samples one sequence"),
        ({"num_return_sequences": 2}, "num_return_sequences: got 2"),
        ({"return_context_logits": True}, "return_context_logits: got True, need False"),
        ({"guided_decoding_guide": "{}"}, "guided_decoding_guide_type: got none beside a guided_decoding_guide"),
        ({"guided_decoding_guide_type": "xml"}, "guided_decoding_guide_type: got 'xml', need one of json, json_schema"),
        ({"guided_decoding_guide_type": "structural_tag"}, "Write structural tags as lark"),
        ({"guided_decoding_guide_type": "regex"}, "guided_decoding_guide: got none for the type 'regex'"),
        ({"guided_decoding_guide_type": "json", "ignore_eos": True}, "ignore_eos: got true together with a guide"),
        ({"guided_decoding_guide": "x" * (2**18 + 1)}, "guided_decoding_guide: got 262145 characters"),
        ({"embedding_bias_words": ["a"]}, "embedding_bias_words: got a value, need none. Use logit_bias"),
        ({"prompt_embedding_table": np.ones((1, 1, 1), np.float16)}, "prompt_embedding_table"),
        ({"parameters": '{"temprature": "1"}'}, "unknown parameter 'temprature'.*Did you mean 'temperature'"),
        ({"parameters": '{"timeout": "x"}'}, "timeout: got 'x', need microseconds"),
        ({"parameters": '{"timeout": -1}'}, "timeout: got -1"),
    ],
)
def test_what_cannot_be_served_is_refused_with_got_need_do(text: Text, values: dict[str, object], words: str) -> None:
    if "text_input" not in values and "input_ids" not in values and values:
        values = {"text_input": "hello", **values}
    with pytest.raises(RequestError, match=words) as refused:
        parse(text, **values)
    assert refused.value.kind is ErrorKind.INVALID
    assert len(str(refused.value)) < 400


def test_an_embedding_takes_no_guide(text: Text) -> None:
    with pytest.raises(RequestError, match="guided_decoding_guide_type: got 'json' with an embedding, need none"):
        parse(text, text_input="a", outputs=["embedding"], guided_decoding_guide_type="json")


def test_adapters_that_do_not_exist_are_not_found(text: Text) -> None:
    assert parse(text, text_input="a", adapter="law").request.adapter == "law"  # the engine knows which exist
    for values in ({"lora_task_id": 3}, {"lora_weights": np.ones((1, 1, 1), np.float16)}):
        with pytest.raises(RequestError) as refused:
            parse(text, text_input="a", **values)
        assert refused.value.kind is ErrorKind.NOT_FOUND


def test_an_undeclared_tensor_is_refused_with_the_nearest_name(text: Text) -> None:
    tensors = {"text_inputs": tensor("text_input", "a")}
    unknown = Call(
        request_id=1,
        tensors=tensors,
        parameters="",
        client_id="",
        requested_outputs=ALL_OUTPUTS,
        timeout_us=0,
        arrival_s=0.0,
    )
    with pytest.raises(RequestError, match="unknown input 'text_inputs'.*Did you mean 'text_input'"):
        make_contract(text).parse(unknown)


def test_an_input_that_the_ensemble_lacks_names_the_model_that_has_it(text: Text) -> None:
    with pytest.raises(RequestError, match="prompt_logprobs: got a request parameter, need a tensor.*deepseek_v3"):
        parse(text, text_input="a", parameters='{"prompt_logprobs": 2}')


def test_a_default_max_tokens_is_cut_to_what_remains_and_a_given_one_is_not(text: Text) -> None:
    contract = Contract(
        text,
        replace(GENERATION, max_tokens=MAX_SEQ_LEN - 10),
        vocab_size=VOCAB_SIZE,
        max_seq_len=MAX_SEQ_LEN,
        exclude_input_in_output=True,
        allow_stop_by_id=False,
    )
    for num_prompt, default in ((5, MAX_SEQ_LEN - 10), (MAX_SEQ_LEN - 4, 4), (MAX_SEQ_LEN, 1), (2 * MAX_SEQ_LEN, 1)):
        for given, expected in (({}, default), ({"max_tokens": 1000}, 1000)):
            parsed = contract.parse(call(input_ids=[5] * num_prompt, **given))
            assert isinstance(parsed, ParsedRequest)
            assert parsed.request.sampling.max_tokens == expected
