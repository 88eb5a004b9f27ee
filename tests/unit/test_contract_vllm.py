"""contract_vllm.py: what the vLLM backend's clients send, read as vLLM reads it, and what they get back."""

from __future__ import annotations

import json
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from nmoe_backend.contract import Call, ParsedRequest
from nmoe_backend.contract_inputs import INPUTS, NUMPY_TYPES, VLLM_INPUTS
from nmoe_backend.contract_outputs import OUTPUTS, Chunk
from nmoe_backend.contract_vllm import guide_tensors
from nmoe_backend.text import Text
from nmoe_backend.types import RequestError, SamplingParams, TokenLogprobs
from tests.contracts import MAX_SEQ_LEN, declared, encoder, make_contract, read_pbtxt

# model.py of triton-inference-server/vllm_backend, auto_complete_config
BACKEND_INPUTS = [
    ("text_input", "BYTES", (1,)),
    ("stream", "BOOL", (1,)),
    ("sampling_parameters", "BYTES", (1,)),
    ("exclude_input_in_output", "BOOL", (1,)),
    ("return_finish_reason", "BOOL", (1,)),
    ("return_cumulative_logprob", "BOOL", (1,)),
    ("return_logprobs", "BOOL", (1,)),
    ("return_num_input_tokens", "BOOL", (1,)),
    ("return_num_output_tokens", "BOOL", (1,)),
]
BACKEND_OUTPUTS = [
    ("text_output", "BYTES", (-1,)),
    ("finish_reason", "BYTES", (-1,)),
    ("cumulative_logprob", "FP32", (-1,)),
    ("logprobs", "BYTES", (-1,)),
    ("num_input_tokens", "UINT32", (1,)),
    ("num_output_tokens", "UINT32", (-1,)),
]
ALWAYS = ("text_output", "cum_log_probs")
# SamplingParams() of vLLM
DEFAULTS = SamplingParams(max_tokens=16, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)


def tensor(name: str, value: object) -> np.ndarray:
    """As the ensemble passes it on: [1, 1]."""
    array = np.empty((1, 1), NUMPY_TYPES[{**INPUTS, **VLLM_INPUTS}[name].dtype])
    array[0, 0] = value.encode() if isinstance(value, str) else value
    return array


def parse(
    text: Text,
    sampling: dict[str, object] | None = None,
    prompt: str | None = "hello",
    parameters: str = "",
    max_orphan_s: float = 0.0,
    **values: object,
) -> ParsedRequest:
    """A call through deepseek_v3_vllm."""
    given = {"vllm_text_input": prompt, "sampling_parameters": None if sampling is None else json.dumps(sampling)}
    call = Call(
        request_id=7,
        tensors={name: tensor(name, value) for name, value in {**given, **values}.items() if value is not None},
        parameters=parameters,
        client_id="",
        requested_outputs=frozenset(read_pbtxt("deepseek_v3_vllm").ensemble_scheduling.step[0].output_map),
        timeout_us=0,
        arrival_s=100.0,
    )
    parsed = make_contract(text, max_orphan_s=max_orphan_s).parse(call)
    assert isinstance(parsed, ParsedRequest)
    return parsed


# --- declarations


def test_the_model_declares_what_the_vllm_backend_declares() -> None:
    config = read_pbtxt("deepseek_v3_vllm")
    assert config.max_batch_size == 0
    assert declared(config.input) == BACKEND_INPUTS
    assert declared(config.output) == [*BACKEND_OUTPUTS, ("prompt_logprobs", "BYTES", (-1,))]
    assert all(one.optional for one in config.input)  # a missing one is our own error and not the ensemble's


def test_its_step_is_the_engine_with_the_types_of_the_backend() -> None:
    config = read_pbtxt("deepseek_v3_vllm")
    (step,) = config.ensemble_scheduling.step
    assert step.model_name == "deepseek_v3"
    known = {**INPUTS, **VLLM_INPUTS}
    assert {value: known[key].dtype for key, value in step.input_map.items()} == {
        name: dtype for name, dtype, _ in BACKEND_INPUTS
    }
    assert {value: OUTPUTS[key][0] for key, value in step.output_map.items()} == {
        name: dtype for name, dtype, _ in declared(config.output)
    }
    assert set(step.input_map) >= set(VLLM_INPUTS)


# --- what is read


def test_what_is_not_said_is_vllms_default_and_not_the_models(text: Text) -> None:
    parsed = parse(text)
    assert parsed.request.sampling == DEFAULTS
    assert parsed.request.prompt_ids == tuple(text.encode("hello"))
    assert parsed.response.outputs == ALWAYS
    assert not parsed.response.stream


def test_the_default_of_16_gives_way_to_max_seq_len_and_a_number_does_not(text: Text) -> None:
    prompt = "a" * (MAX_SEQ_LEN - 8)
    num_prompt = len(text.encode(prompt))
    assert MAX_SEQ_LEN - 16 < num_prompt < MAX_SEQ_LEN
    assert parse(text, prompt=prompt).request.sampling.max_tokens == MAX_SEQ_LEN - num_prompt
    assert parse(text, {"max_tokens": 99}, prompt=prompt).request.sampling.max_tokens == 99  # the engine refuses it
    assert parse(text, {"max_tokens": None}, prompt=prompt).request.sampling.max_tokens is None


EVERYTHING: dict[str, object] = {
    "max_tokens": 9,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": -1,
    "min_p": 0.125,
    "presence_penalty": -2,
    "frequency_penalty": 2.0,
    "repetition_penalty": 1.5,
    "seed": 3,
    "logit_bias": {"3": -100, "4": 1.5},
    "stop": ["END", "\n\n"],
    "stop_token_ids": [5, 6],
    "bad_words": ["we"],
    "ignore_eos": True,
    "prompt_logprobs": 2,
    "n": 1,
    "best_of": 1,
    "use_beam_search": False,
    "early_stopping": False,
    "length_penalty": 1.0,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
}
EXPECTED = SamplingParams(
    max_tokens=9,
    min_tokens=2,
    temperature=0.5,
    top_p=0.25,
    top_k=0,
    min_p=0.125,
    presence_penalty=-2.0,
    frequency_penalty=2.0,
    repetition_penalty=1.5,
    seed=3,
    logit_bias=MappingProxyType({3: -100.0, 4: 1.5}),
    stop=("END", "\n\n"),
    stop_token_ids=(5, 6),
    ignore_eos=True,
    num_prompt_logprobs=2,
)


def expected(text: Text) -> SamplingParams:
    return replace(EXPECTED, bad_words_ids=tuple(text.encode_word("we")))


def test_every_sampling_parameter_reaches_its_field(text: Text) -> None:
    assert parse(text, EVERYTHING).request.sampling == expected(text)


def test_numbers_and_booleans_may_be_strings(text: Text) -> None:
    as_strings = {
        key: str(value).lower() if isinstance(value, int | float) else value for key, value in EVERYTHING.items()
    }
    as_strings |= {"logit_bias": {"3": "-100", "4": "1.5"}, "stop_token_ids": ["5", "6"]}
    assert parse(text, as_strings).request.sampling == expected(text)


def test_request_parameters_are_sampling_parameters(text: Text) -> None:
    """What `parameters=` of tritonclient and /generate make of them; "id" and "timeout" are Triton's."""
    own = {"id": "x", "timeout": 250_000}
    parsed = parse(text, parameters=json.dumps({**own, "temperature": "0", "max_tokens": 4}))
    assert (parsed.request.sampling.temperature, parsed.request.sampling.max_tokens) == (0.0, 4)
    assert parsed.request.deadline_s == 100.25
    both = parse(text, {"top_k": 3}, parameters='{"top_k": 3, "seed": 1}').request.sampling
    assert (both.top_k, both.seed) == (3, 1)
    with pytest.raises(RequestError, match="top_k: got 3 in sampling_parameters and 4 as a request parameter"):
        parse(text, {"top_k": 3}, parameters='{"top_k": 4}')


def test_null_is_as_if_it_were_not_there(text: Text) -> None:
    nulls = {key: None for key in (*EVERYTHING, "logprobs", "guided_decoding", "lora_name") if key != "max_tokens"}
    assert parse(text, nulls).request.sampling == DEFAULTS


@pytest.mark.parametrize(("seed", "read"), [(-1, None), (0, 0), (-2, 2**64 - 2), (2**63, 2**63)])
def test_a_seed_may_be_negative_and_minus_one_is_none(text: Text, seed: int, read: int | None) -> None:
    assert parse(text, {"seed": seed}).request.sampling.seed == read


def test_priority_is_turned_round(text: Text) -> None:
    low, default, high = (parse(text, given).request.priority for given in ({"priority": 5}, {}, {"priority": "-5"}))
    assert (low, default, high) == (-5, 0, 5)


def test_a_lora_name_is_an_adapter(text: Text) -> None:
    assert parse(text, {"lora_name": "mine"}).request.adapter == "mine"
    assert parse(text).request.adapter is None


def test_one_stop_string_needs_no_list(text: Text) -> None:
    assert parse(text, {"stop": "END"}).request.sampling.stop == ("END",)


@pytest.mark.parametrize(
    ("stream", "exclude", "echo"),
    [(None, None, "hello"), (False, False, "hello"), (False, True, ""), (True, None, ""), (True, True, "")],
)
def test_the_prompt_stands_in_front_as_in_the_vllm_backend(
    text: Text, stream: bool | None, exclude: bool | None, echo: str
) -> None:
    parsed = parse(text, stream=stream, exclude_input_in_output=exclude)
    assert (parsed.response.echo, parsed.response.stream) == (echo, bool(stream))


def test_the_bound_for_orphans_holds(text: Text) -> None:
    assert parse(text, max_orphan_s=3.0).request.deadline_s == 103.0
    assert parse(text).request.deadline_s is None


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temprature": 1}, "'temprature': got an unknown sampling parameter.*Did you mean 'temperature'"),
        ({"n": 2}, "n: got 2, need 1.*send more requests"),
        ({"best_of": "4"}, "best_of: got '4', need 1"),
        ({"use_beam_search": True}, "use_beam_search: got True, need false"),
        ({"skip_special_tokens": False}, "skip_special_tokens: got False, need true"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
        ({"temperature": "warm"}, "temperature: got 'warm', need a number"),
        ({"temperature": -1}, "temperature: got -1.0, need a finite number"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": [1]}, r"temperature: got \[1\]"),
        ({"max_tokens": 1.5}, "max_tokens: got 1.5, need a whole number"),
        ({"max_tokens": True}, "max_tokens: got True"),
        ({"max_tokens": "1e3"}, "max_tokens: got '1e3'"),
        ({"top_p": 0}, "top_p: got 0.0"),
        ({"logprobs": 21}, r"logprobs: got 21, need an integer in \[0, 20\]"),
        ({"logprobs": -1}, "logprobs: got -1"),
        ({"stop": [3]}, "stop: got 3, need a string"),
        ({"stop": {}}, "stop: got {}, need a list of strings"),
        ({"stop_token_ids": 5}, "stop_token_ids: got 5, need a list"),
        ({"stop_token_ids": [4000]}, "token id 4000"),
        ({"logit_bias": [1]}, "logit_bias: got .*need a JSON object"),
        ({"ignore_eos": "perhaps"}, "ignore_eos: got 'perhaps', need true or false"),
        ({"seed": 2**64}, "seed"),
        ({"priority": 2**31}, "priority"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens: got 9, need at most max_tokens=3"),
        ({"guided_decoding": {"regex": "a", "json": {}}}, "guided_decoding: got regex and json, need exactly one"),
        ({"guided_decoding": {}}, "guided_decoding: got nothing"),
        ({"guided_decoding": {"regex": ["a"]}}, r"guided_decoding.regex: got \['a'\], need a string"),
        ({"guided_decoding": {"grammar": {"a": 1}}}, "guided_decoding.grammar: got {'a': 1}, need a string"),
        ({"structured_outputs": {"json_object": "no"}}, "structured_outputs.json_object: got 'no', need true"),
        (
            {"guided_decoding": {"regex": "a"}, "structured_outputs": {"regex": "b"}},
            "structured_outputs: got a second guide, need one",
        ),
        ({"guided_decoding": {"structural_tag": "x"}}, "got structural_tag"),
        ({"guided_decoding": "{"}, "guided_decoding: got '{', need a JSON object"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_name(text: Text, sampling: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse(text, sampling)


def test_tensors_that_do_not_belong_together_are_refused(text: Text) -> None:
    with pytest.raises(RequestError, match="max_tokens: got it beside the vLLM backend's names"):
        parse(text, max_tokens=3)
    with pytest.raises(RequestError, match="text_input is required"):
        parse(text, {"temperature": 0}, prompt=None)
    with pytest.raises(RequestError, match="text_input is required: got an empty prompt"):
        parse(text, prompt="")
    with pytest.raises(RequestError, match="exclude_input_in_output: got false for a stream"):
        parse(text, stream=True, exclude_input_in_output=False)
    for broken in ("[1]", "{", "3", '"x"'):
        with pytest.raises(RequestError, match="sampling_parameters: got .*need a JSON object"):
            parse(text, sampling_parameters=broken)


# --- what goes out


@pytest.mark.parametrize(
    ("logprobs", "wants", "num_logprobs", "output"),
    [
        (None, {}, None, None),
        (2, {}, None, None),  # vLLM computes them and does not return them
        (None, {"return_logprobs": True}, None, "vllm:no_logprobs"),
        (False, {"return_logprobs": True}, None, "vllm:no_logprobs"),
        (0, {"return_logprobs": True}, 1, "vllm:sampled_logprobs"),
        (2, {"return_logprobs": True}, 2, "vllm:logprobs"),
        ("2", {"return_logprobs": True}, 2, "vllm:logprobs"),
        (None, {"return_cumulative_logprob": True}, 0, None),
    ],
)
def test_logprobs_are_computed_where_they_are_returned(
    text: Text, logprobs: object, wants: dict[str, object], num_logprobs: int | None, output: str | None
) -> None:
    parsed = parse(text, {"logprobs": logprobs}, **wants)
    assert parsed.request.sampling.num_logprobs == num_logprobs
    assert parsed.response.outputs == (*ALWAYS, *(() if output is None else (output,)))


def test_outputs_are_those_that_were_asked_for(text: Text) -> None:
    wanted = {f"return_{name}": True for name in ("finish_reason", "num_input_tokens", "num_output_tokens")}
    names = [
        name
        for name, _ in encoder(text).encode(
            Chunk(text="", token_ids=(), num_input_tokens=3), parse(text, **wanted).response.outputs
        )
    ]
    assert names == [*ALWAYS, "finish_reason", "num_input_tokens", "num_output_tokens"]
    assert parse(text, **dict.fromkeys(wanted, False)).response.outputs == ALWAYS


def values_of(text: Text, chunk: Chunk, *outputs: str) -> dict[str, object]:
    return {name: array[0, 0] for name, array in encoder(text).encode(chunk, outputs)}


def test_responses_look_like_the_vllm_backends(text: Text) -> None:
    ids = text.encode_plain("hello")[:2]
    first, second = (text.raw_token_bytes(token_id).decode() for token_id in ids)
    chunk = Chunk(
        text="x",
        token_ids=ids,
        num_input_tokens=3,
        logprobs=[
            TokenLogprobs(ids[0], -0.5, ((ids[0], -0.5), (ids[1], -1.0))),
            TokenLogprobs(ids[0], -3.0, ((ids[1], -0.25), (5, float("-inf")))),
        ],
        prompt_logprobs=[TokenLogprobs(ids[1], -2.0)],
    )
    values = values_of(text, chunk, "vllm:finish_reason", "vllm:logprobs", "vllm:prompt_logprobs", "num_output_tokens")
    assert values["finish_reason"] == b"None"
    assert values["num_output_tokens"].dtype == np.uint32  # type: ignore[attr-defined]
    entries = json.loads(values["logprobs"])  # type: ignore[arg-type]
    assert entries[0] == {
        str(ids[0]): {"logprob": -0.5, "rank": 1, "decoded_token": first},
        str(ids[1]): {"logprob": -1.0, "rank": 2, "decoded_token": second},
    }
    assert list(entries[1]) == [str(ids[0]), str(ids[1]), "5"]  # the sampled one first, then k others
    assert [entry["rank"] for entry in entries[1].values()] == [3, 1, 2]
    assert entries[1]["5"]["logprob"] == -9999.0
    assert json.loads(values["prompt_logprobs"])[0] is None  # type: ignore[arg-type]
    assert json.loads(values["prompt_logprobs"])[1][str(ids[1])]["logprob"] == -2.0  # type: ignore[arg-type]
    sampled = json.loads(values_of(text, chunk, "vllm:sampled_logprobs")["logprobs"])  # type: ignore[arg-type]
    assert [(list(entry), entry[str(ids[0])]["rank"]) for entry in sampled] == [([str(ids[0])], 1), ([str(ids[0])], 3)]


def test_a_response_without_logprobs_says_null(text: Text) -> None:
    chunk = Chunk(text="x", token_ids=[3], num_input_tokens=3, finish_reason="length")
    values = values_of(text, chunk, "vllm:finish_reason", "vllm:no_logprobs", "vllm:prompt_logprobs")
    assert values == {"finish_reason": b"length", "logprobs": b"null", "prompt_logprobs": b"null"}


# --- guided decoding


@pytest.mark.parametrize("key", ["guided_decoding", "structured_outputs"])
@pytest.mark.parametrize(
    ("params", "kind", "guide"),
    [
        ({"json": {"type": "object"}, "regex": None, "whitespace_pattern": None}, "json_schema", '{"type": "object"}'),
        ({"json": '{"type": "object"}'}, "json_schema", '{"type": "object"}'),
        ({"regex": "[a-z]+", "json_object": False}, "regex", "[a-z]+"),
        ({"choice": ["a", "b"]}, "choice", '["a", "b"]'),
        ({"grammar": 'root ::= "a"'}, "ebnf_grammar", 'root ::= "a"'),
        ({"json_object": True}, "json", ""),
    ],
)
def test_a_guide_becomes_the_engines_two_tensors(key: str, params: dict[str, object], kind: str, guide: str) -> None:
    for form in (params, json.dumps(params)):
        assert guide_tensors(key, form) == {"guided_decoding_guide_type": kind, "guided_decoding_guide": guide}
