"""The one table of input tensors: TensorRT-LLM's names, the aliases that tools send, and our extensions.

Every name that a known client may send is declared, because an undeclared one is a 500 over gRPC and silently ignored
over /generate. What we cannot do is declared too, and accepted with its neutral value only. `config.pbtxt` of
`deepseek_v3` and of `ensemble` hold the same names, types and dims (a test compares them).

Values that mean "not given", for clients that always send every tensor: `top_k` 0 or -1, `end_id` and `pad_id` -1,
`deadline_ms` and `min_response_interval_ms` 0, `top_logprobs` and `prompt_logprobs` 0, `lora_task_id` 0, `adapter` "",
empty strings in `stop_words` and `bad_words`, empty arrays, and an empty `text_input` or `input_ids` beside the other
one. There is none for `seed` (0 is a seed) and `max_tokens` (0 generates nothing): leave them out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import get_args

import numpy as np
import numpy.typing as npt

from nmoe_backend.types import MAX_TOP_LOGPROBS, ErrorKind, GuideType, RequestError

Array = npt.NDArray[np.generic]
# (tensor's name, one value or, where dims are (-1,), a list of them) -> the field's value, or RequestError
Reader = Callable[[str, object], object]

NUMPY_TYPES: Mapping[str, type[np.generic]] = MappingProxyType(
    {
        "BOOL": np.bool_,
        "INT32": np.int32,
        "UINT32": np.uint32,
        "UINT64": np.uint64,
        "FP16": np.float16,
        "FP32": np.float32,
        "BYTES": np.object_,
    }
)
MAX_STOP_WORDS = 16  # every one is looked for in every delta of the stream
MAX_BAD_WORDS = 64
MAX_WORD_LEN = 256  # characters
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_GUIDE_LEN = 2**18  # characters: grammar.py's stack holds what a longer one can nest
GUIDE_TYPES: tuple[GuideType, ...] = get_args(GuideType)


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSpec:
    """One input tensor of rank len(dims) + 1: the batch dimension, always 1, stands in front."""

    name: str
    dtype: str  # a key of NUMPY_TYPES
    dims: tuple[int, ...]
    read: Reader
    field: str  # what it sets; aliases share one
    default: str  # for people: what holds where it is not sent


def read_tensor(spec: InputSpec, array: Array) -> object:
    """The checked value of a tensor. RequestError for a wrong type, shape or value."""
    if array.dtype.type is not NUMPY_TYPES[spec.dtype]:
        raise refusal(spec.name, f"type {array.dtype}", spec.dtype, "Send that type.")
    if array.ndim > 0 and array.shape[0] != 1:
        raise refusal(spec.name, f"a batch dimension of {array.shape[0]}", "1", "Send one request per prompt.")
    fits = array.ndim == len(spec.dims) + 1 and all(
        want in (-1, have) for want, have in zip(spec.dims, array.shape[1:], strict=True)
    )
    if not fits:
        raise refusal(spec.name, f"shape {list(array.shape)}", str([1, *spec.dims]), "Send that shape.")
    values = array[0].tolist()
    return spec.read(spec.name, values[0] if spec.dims == (1,) else values)


def refusal(name: str, got: object, need: str, do: str, kind: ErrorKind = ErrorKind.INVALID) -> RequestError:
    """Got, need, do; what was got is cut to a readable length."""
    shown = str(got)
    return RequestError(f"{name}: got {shown[:80] + '...' if len(shown) > 83 else shown}, need {need}. {do}", kind)


def _boolean(name: str, value: object) -> object:
    return value


def _integer(low: int, high: int, do: str = "Send a value in that range.") -> Reader:
    def read(name: str, value: object) -> object:
        assert isinstance(value, int), f"{name}: an integer tensor holds {value!r}"
        if not low <= value <= high:
            raise refusal(name, value, f"an integer in [{low}, {high}]", do)
        return value

    return read


def _number(low: float, high: float, open_low: bool = False, do: str = "Send a value in that range.") -> Reader:
    def read(name: str, value: object) -> object:
        assert isinstance(value, float), f"{name}: a float tensor holds {value!r}"
        above = value > low if open_low else value >= low
        if not (math.isfinite(value) and above and value <= high):
            bounds = f"{'(' if open_low else '['}{low:g}, {high:g}{']' if math.isfinite(high) else ')'}"
            raise refusal(name, value, f"a finite number in {bounds}", do)
        return value

    return read


def _string(name: str, value: object) -> object:
    if isinstance(value, str):
        return value
    assert isinstance(value, bytes), f"{name}: a BYTES tensor holds {value!r}"
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refusal(
            name, f"invalid UTF-8 at byte {error.start}", "UTF-8 text", "Send the text in that encoding."
        ) from error


def _words(limit: int) -> Reader:
    def read(name: str, value: object) -> object:
        assert isinstance(value, list), f"{name}: needs dims [-1]"
        words = tuple(word for word in (str(_string(name, item)) for item in value[: limit + 1]) if word)
        if len(value) > limit:
            raise refusal(name, f"{len(value)} strings", f"at most {limit}", "Send fewer.")
        for word in words:
            if len(word) > MAX_WORD_LEN:
                raise refusal(name, f"a string of {len(word)} characters", f"at most {MAX_WORD_LEN}", "Shorten it.")
        return words

    return read


def _ids(limit: int | None) -> Reader:
    def read(name: str, value: object) -> object:
        assert isinstance(value, list), f"{name}: needs dims [-1]"
        if limit is not None and len(value) > limit:
            raise refusal(name, f"{len(value)} token ids", f"at most {limit}", "Send fewer.")
        return tuple(value)

    return read


def _logit_bias(name: str, value: object) -> object:
    """A JSON object {"token id": bias}; "" is none."""
    text = str(_string(name, value))
    if not text:
        return {}
    form = 'a JSON object such as {"42": -5.0}'
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refusal(name, repr(text), form, "Send the object as a string.") from error
    if not isinstance(entries, dict):
        raise refusal(name, repr(text), form, "Send the object as a string.")
    if len(entries) > MAX_LOGIT_BIAS:
        raise refusal(name, f"{len(entries)} entries", f"at most {MAX_LOGIT_BIAS}", "Send fewer.")
    bias: dict[int, float] = {}
    for key, number in entries.items():
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not (key.isdecimal() and len(key) < 12 and is_number and -100.0 <= number <= 100.0):
            raise refusal(name, f"{key!r}: {number!r}", "a token id with a bias in [-100, 100]", "Correct the entry.")
        bias[int(key)] = float(number)
    return bias


def _guide_type(name: str, value: object) -> object:
    kind = str(_string(name, value))
    if kind and kind not in GUIDE_TYPES:
        do = "Write structural tags as lark." if kind == "structural_tag" else "Send one of these."
        raise refusal(name, repr(kind), f"one of {', '.join(GUIDE_TYPES)}", do)
    return kind


def _guide(name: str, value: object) -> object:
    text = str(_string(name, value))
    if len(text) > MAX_GUIDE_LEN:
        raise refusal(name, f"{len(text)} characters", f"at most {MAX_GUIDE_LEN}", "Shorten it.")
    return text


def _only(*accepted: object, do: str, kind: ErrorKind = ErrorKind.INVALID) -> Reader:
    """What this server cannot do: accepted with a value that asks for nothing."""

    def read(name: str, value: object) -> object:
        got = _string(name, value) if isinstance(value, bytes) else value
        if got not in accepted:
            raise refusal(name, got, " or ".join(repr(item) for item in accepted), do, kind)
        return None

    return read


def _only_empty(do: str, kind: ErrorKind = ErrorKind.INVALID) -> Reader:
    """Arrays and strings that this server cannot use: accepted while they hold nothing."""

    def read(name: str, value: object) -> object:
        items = value if isinstance(value, list) else [value]
        if any(item not in (b"", "", []) for item in items):
            raise refusal(name, "a value", "none", do, kind)
        return None

    return read


def _row(name: str, dtype: str, read: Reader, default: str, dims: tuple[int, ...] = (1,), field: str = "") -> InputSpec:
    return InputSpec(name=name, dtype=dtype, dims=dims, read=read, field=field or name, default=default)


_MAX_INT32 = 2**31 - 1
_SEED = _integer(0, 2**64 - 1)
_MIN_TOKENS = _integer(0, _MAX_INT32)
_ONE_SEQUENCE = "This server samples one sequence per request: send more requests with different seeds."
_NO_LOGITS = "Raw logits are not returned; ask for return_log_probs and top_logprobs."
_NO_BIAS_WORDS = "Use logit_bias with token ids."
_NO_PROMPT_TABLE = "Prompt tables are not available on this server."
_NO_LORA = "This server holds no adapter of that kind; leave it out for the base model."

_ROWS = (
    # the prompt and what may stand in it
    _row("text_input", "BYTES", _string, "this or input_ids is required"),
    _row("input_ids", "INT32", _ids(None), "this or text_input is required", (-1,)),
    _row("exclude_input_in_output", "BOOL", _boolean, "exclude_input_in_output of the TOML"),
    # length and the end
    _row("max_tokens", "INT32", _integer(0, _MAX_INT32), "the model's default, else what remains of max_seq_len"),
    _row("min_tokens", "INT32", _MIN_TOKENS, "0"),
    _row("min_length", "INT32", _MIN_TOKENS, "0", field="min_tokens"),
    _row("stop_words", "BYTES", _words(MAX_STOP_WORDS), "none", (-1,)),
    _row("stop_token_ids", "INT32", _ids(MAX_STOP_TOKEN_IDS), "none", (-1,)),
    _row("end_id", "INT32", _integer(-1, _MAX_INT32, "-1 means none."), "-1"),
    _row("pad_id", "INT32", _integer(-1, _MAX_INT32, "It has no effect: nothing is padded."), "-1"),
    _row("ignore_eos", "BOOL", _boolean, "false"),
    # the choice of a token
    _row("temperature", "FP32", _number(0.0, math.inf, do="0 is greedy."), "the model's default"),
    _row("top_k", "INT32", _integer(-1, _MAX_INT32, "0 and -1 turn it off."), "the model's default"),
    _row("top_p", "FP32", _number(0.0, 1.0, open_low=True, do="1 turns it off."), "the model's default"),
    _row("min_p", "FP32", _number(0.0, 1.0, do="0 turns it off."), "0"),
    _row("repetition_penalty", "FP32", _number(0.0, math.inf, open_low=True, do="1 turns it off."), "model's default"),
    _row("presence_penalty", "FP32", _number(-2.0, 2.0), "0"),
    _row("frequency_penalty", "FP32", _number(-2.0, 2.0), "0"),
    _row("logit_bias", "BYTES", _logit_bias, "none"),
    _row("bad_words", "BYTES", _words(MAX_BAD_WORDS), "none", (-1,)),
    _row("seed", "UINT64", _SEED, "drawn for every request"),
    _row("random_seed", "UINT64", _SEED, "drawn for every request", field="seed"),
    # what comes back
    _row("stream", "BOOL", _boolean, "false: one response at the end"),
    _row("streaming", "BOOL", _boolean, "false", field="stream"),
    _row("return_log_probs", "BOOL", _boolean, "false"),
    _row("top_logprobs", "INT32", _integer(0, MAX_TOP_LOGPROBS), "0"),
    _row("prompt_logprobs", "INT32", _integer(0, MAX_TOP_LOGPROBS), "0"),
    _row("return_num_input_tokens", "BOOL", _boolean, "counts are always returned"),
    _row("return_num_output_tokens", "BOOL", _boolean, "counts are always returned"),
    # how it is served
    _row("priority", "UINT32", _integer(0, 2**32 - 1), "0; higher goes first"),
    _row("deadline_ms", "UINT32", _integer(0, 2**32 - 1), "0: none"),
    _row("min_response_interval_ms", "UINT32", _integer(0, 60_000), "0: none"),
    _row("stop", "BOOL", _boolean, "false; true ends the live requests with the same id"),
    _row("adapter", "BYTES", _string, "the base model"),
    _row("uncancellable", "BOOL", _boolean, "false; `ensemble` sets it: max_orphan_s holds"),
    # the form of the text
    _row("guided_decoding_guide_type", "BYTES", _guide_type, "none"),
    _row("guided_decoding_guide", "BYTES", _guide, "none"),
    # TensorRT-LLM's names for what this server does not do
    _row("beam_width", "INT32", _only(1, do=_ONE_SEQUENCE), "1"),
    _row("num_return_sequences", "INT32", _only(1, do=_ONE_SEQUENCE), "1"),
    _row("length_penalty", "FP32", _only(0.0, 1.0, do="It belongs to beam search."), "1"),
    _row("return_context_logits", "BOOL", _only(False, do=_NO_LOGITS), "false"),
    _row("return_generation_logits", "BOOL", _only(False, do=_NO_LOGITS), "false"),
    _row("return_perf_metrics", "BOOL", _only(False, do="Read the metrics endpoint."), "false"),
    _row("embedding_bias_words", "BYTES", _only_empty(_NO_BIAS_WORDS), "none", (-1,)),
    _row("embedding_bias_weights", "FP32", _only_empty(_NO_BIAS_WORDS), "none", (-1,)),
    _row("decoder_text_input", "BYTES", _only("", do="This is a decoder-only model: use text_input."), "none"),
    _row("prompt_embedding_table", "FP16", _only_empty(_NO_PROMPT_TABLE), "none", (-1, -1)),
    _row("prompt_vocab_size", "INT32", _only(0, do=_NO_PROMPT_TABLE), "0"),
    _row("prompt_table_extra_id", "UINT64", _only(0, do=_NO_PROMPT_TABLE), "0"),
    _row("lora_task_id", "UINT64", _only(0, do=_NO_LORA, kind=ErrorKind.NOT_FOUND), "0: the base model"),
    _row("lora_weights", "FP16", _only_empty(_NO_LORA, ErrorKind.NOT_FOUND), "none", (-1, -1)),
    _row("lora_config", "INT32", _only_empty(_NO_LORA, ErrorKind.NOT_FOUND), "none", (-1, 3)),
)
INPUTS: Mapping[str, InputSpec] = MappingProxyType({row.name: row for row in _ROWS})
# What deepseek_v3 declares for `deepseek_v3_vllm` alone (contract_vllm.py).
VLLM_INPUTS: Mapping[str, InputSpec] = MappingProxyType(
    {
        row.name: row
        for row in (
            _row("vllm_text_input", "BYTES", _string, "none"),
            _row("sampling_parameters", "BYTES", _string, "none"),
            _row("return_finish_reason", "BOOL", _boolean, "false"),
            _row("return_cumulative_logprob", "BOOL", _boolean, "false"),
            _row("return_logprobs", "BOOL", _boolean, "false"),
        )
    }
)
