"""From bodies to the engine's inputs, and from its errors to answers; no server, no engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import orjson
import pytest

from nmoe_backend.api import bodies
from nmoe_backend.api.bodies import checked
from nmoe_backend.api.errors import ApiError, of_connection, of_engine, renamed
from nmoe_backend.api.guides import Guide
from nmoe_backend.api.prompts import Prompts, template_variables
from nmoe_backend.api.sampling import response_guide, sampling_inputs, seeds
from nmoe_backend.api.schemas import ChatRequest, CompletionRequest, ResponseFormat, StructuredOutputs
from nmoe_backend.types import ErrorKind
from tests.api import in_process
from tests.api.fake_engine import FakeEngine, deltas

USER = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> ChatRequest:
    """A checked body."""
    return ChatRequest.model_validate({"model": "m", "messages": USER, **fields})


def complaint(body: object, model: Any = ChatRequest, content_type: str = "application/json") -> ApiError:
    """What the client is told of a body that does not fit; bytes are the body as it is."""
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    with pytest.raises(ApiError) as caught:
        checked(model, raw, content_type)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param", "parts"),
    [
        ({"model": 5}, "model", ("got 5", "valid string")),
        ({"model": None}, "model", ("is required",)),
        ({"n": "2"}, "n", ("got '2'", "valid integer")),
        ({"n": 1.5}, "n", ("got 1.5",)),
        ({"temperature": 3}, "temperature", ("got 3", "less than or equal to 2")),
        ({"logprobs": 1}, "logprobs", ("got 1", "boolean")),
        ({"stop_token_ids": [1] * 2000}, "stop_token_ids", ("need a list of at most ",)),
        ({"messages": "hi"}, "messages", ("got 'hi'", "list")),
        ({"messages": []}, "messages", ("got [], need a list of at least 1 item. Correct",)),
        ({"stop": ["x"] * 17}, "stop", ("need a list of at most 16 items. Correct",)),
        ({"messages": [{"content": "x"}]}, "messages[0].role", ("is required",)),
        ({"messages": [*USER, {"role": "user", "content": 5}]}, "messages[1].content", ("got 5",)),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}, "colour": 1}]},
            "tools[0].colour",
            ("not a known field",),
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function", ("is required",)),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools", ("is required",)),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", ("function or allowed_tools",)),
        ({"stop": [1]}, "stop[0]", ("got 1",)),
        ({"max_token": 1}, "max_token", ("Did you mean 'max_tokens'",)),
        ({"functions": [{}]}, "functions", ("Send tools.",)),
        ({"use_beam_search": 0}, "use_beam_search", ("one sequence",)),  # false is harmless, 0 is no boolean
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking.budget_tokens", ("send max_tokens",)),
        ({"x" * 500: 1}, "x" * 80 + "...", ("not a known parameter",)),
        ({"top-k": 1}, "top-k", ("Did you mean 'top_k'",)),
        ({"web_search_options": {}}, "web_search_options", ("offer a tool",)),
        ({"user": "x" * 10, "seed": "y" * 500}, "seed", ("yyy...",)),
    ],
    ids=str,
)
def test_a_complaint_names_the_field_and_what_it_needs(
    fields: dict[str, Any], param: str, parts: tuple[str, ...]
) -> None:
    error = complaint({"model": "m", "messages": USER, **fields})
    assert (error.status, error.param) == (400, param)
    assert error.message.startswith(f"{param}: ") and all(part in error.message for part in parts), error.message
    assert len(error.message) < 400, "what a client sent is not sent back whole"


def test_a_missing_field_a_missing_body_and_broken_json_are_told_apart() -> None:
    assert complaint({"messages": USER}).message == "model: is required. Add it."
    for body in (b"", None, [], "text"):
        missing = complaint(body)
        assert "the body is missing" in missing.message and missing.param is None, body
    broken = complaint(b'{"model": ')
    assert broken.message.startswith("the body is not valid JSON: ") and broken.message.endswith(". Correct it.")


@pytest.mark.parametrize(
    ("content_type", "is_json"),
    [
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("application/vnd.api+json", True),
        ("", False),
        ("text/plain", False),
        ("application/jsonlines", False),
        ("text/x+json", False),
    ],
)
def test_only_what_says_that_it_is_json_is_read_as_json(content_type: str, is_json: bool) -> None:
    """A page of another origin can send text/plain without asking first."""
    if is_json:
        assert checked(ChatRequest, orjson.dumps({"model": "m", "messages": USER}), content_type).model == "m"
    else:
        assert (
            "Content-Type: application/json"
            in complaint({"model": "m", "messages": USER}, ChatRequest, content_type).message
        )


def rpc_error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    """As gRPC raises it."""
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (ErrorKind.INVALID, 400),
        (ErrorKind.OVERLOADED, 429),
        (ErrorKind.DEADLINE, 504),
        (ErrorKind.CANCELLED, 499),
        (ErrorKind.NOT_FOUND, 404),
        (ErrorKind.UNAVAILABLE, 503),
        (ErrorKind.ENGINE, 503),
    ],
)
def test_every_kind_of_the_engine_s_errors_has_its_status(kind: ErrorKind, status: int) -> None:
    error = of_engine(f"{kind.value}: top_k: got -5, need 1: two colons")
    assert (error.status, error.message) == (status, "top_k: got -5, need 1: two colons")
    assert ("Retry-After" in error.headers()) is (status in (429, 503))
    if kind is ErrorKind.INVALID:
        assert error.param == "top_k"


def test_errors_that_are_not_the_engine_s_are_503_or_504() -> None:
    gone = of_connection(rpc_error(grpc.StatusCode.UNAVAILABLE, "failed to connect: refused"))
    assert gone.status == 503 and "UNAVAILABLE" in gone.message
    late = of_connection(rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))
    assert late.status == 504
    unknown = of_engine("Request for unknown model: 'deepseek_v3' has no available versions")
    assert unknown.status == 503 and "no available versions" in unknown.message
    sentence = of_engine("invalid: the whole request is odd: really")
    assert (sentence.status, sentence.param) == (400, None)


def test_the_engine_s_names_become_the_body_s() -> None:
    error = of_engine("invalid: stop_words: got 17 strings")
    assert (error.param, error.message) == ("stop", "stop: got 17 strings")
    both = of_engine("invalid: stop_token_ids or end_id: got 9")
    assert both.param == "stop_token_ids"
    other = ApiError(400, "n: got 0", param="n")
    assert renamed(other, "stop_words", "stop") is other


def test_only_what_a_client_set_is_sent_to_the_engine() -> None:
    assert sampling_inputs(chat(), max_tokens=None, guide=None) == {"stream": True}
    body = chat(temperature=0, top_k=5, stop="x", min_tokens=2, logit_bias={"7": -1}, priority=3, presence_penalty=None)
    inputs = sampling_inputs(body, max_tokens=9, guide=Guide("regex", "a+"))
    assert inputs == {
        "stream": True,
        "temperature": 0,
        "top_k": 5,
        "min_tokens": 2,
        "priority": 3,
        "max_tokens": 9,
        "stop_words": ["x"],
        "logit_bias": '{"7":-1.0}',
        "guided_decoding_guide_type": "regex",
        "guided_decoding_guide": "a+",
    }


def test_a_top_p_of_0_is_greedy() -> None:
    assert sampling_inputs(chat(top_p=0, temperature=1), max_tokens=None, guide=None) == {
        "stream": True,
        "temperature": 0.0,
    }


@pytest.mark.parametrize("key", ["", "-1", "1.0", "x", "\u0663"])
def test_a_bias_is_for_token_ids(key: str) -> None:
    with pytest.raises(ApiError) as caught:
        sampling_inputs(chat(logit_bias={key: 1}), max_tokens=None, guide=None)
    assert caught.value.param == "logit_bias"


def test_choices_get_seeds_apart_and_stay_in_range() -> None:
    assert list(seeds(chat(), 2)) == [{}, {}]
    assert list(seeds(chat(seed=5), 3)) == [{"seed": 5}, {"seed": 6}, {"seed": 7}]
    assert list(seeds(chat(seed=2**64 - 1), 2)) == [{"seed": 2**64 - 1}, {"seed": 0}]
    assert list(seeds(chat(seed=-2), 1)) == [{"seed": 2**64 - 2}]
    assert list(seeds(chat(seed=-1), 2)) == [{}, {}], "none, as in vLLM"


def test_formats_become_guides() -> None:
    def of(form: dict[str, Any] | None = None, **wishes: Any) -> Guide | None:
        structured = StructuredOutputs.model_validate(wishes) if wishes else None
        return response_guide(ResponseFormat.model_validate(form) if form else None, structured)

    assert of() is None and of({"type": "text"}) is None
    assert of({"type": "json_object"}) == Guide("json", "") == of(json_object=True)
    schema = {"type": "integer"}
    assert of({"type": "json_schema", "json_schema": {"schema": schema}}) == Guide("json_schema", '{"type":"integer"}')
    assert of(json=schema) == Guide("json_schema", '{"type":"integer"}') == of(json='{"type":"integer"}')
    assert of(regex="a") == Guide("regex", "a") and of(grammar="g") == Guide("ebnf_grammar", "g")
    assert of(choice=["a", "b"]) == Guide("choice", '["a","b"]')
    assert of(regex="a", json_object=False) == Guide("regex", "a")
    for form, wishes in (({"type": "json_object"}, {"regex": "a"}), (None, {"regex": "a", "choice": ["b"]})):
        with pytest.raises(ApiError) as caught:
            of(form, **wishes)
        assert caught.value.param == "structured_outputs"


def test_thinking_reaches_the_template_under_both_names() -> None:
    def thinking(**fields: Any) -> dict[str, Any]:
        return template_variables(chat(**fields))

    on, off = ({"thinking": value, "enable_thinking": value} for value in (True, False))
    assert thinking() == {}
    assert thinking(reasoning_effort="low") == on == thinking(thinking={"type": "enabled"})
    assert thinking(reasoning_effort="minimal") == off == thinking(thinking={"type": "disabled"})
    assert thinking(thinking={"type": "disabled"}, reasoning_effort="high") == off, "the plain wish goes first"
    assert thinking(reasoning_effort="low", chat_template_kwargs={"thinking": False, "x": 1})["thinking"] is False


@pytest.fixture
def prompts(tmp_path: Path) -> Prompts:
    return in_process.make_service(tmp_path).prompts


def test_prompts_that_cannot_fit_are_refused_before_and_behind_the_tokenizer(prompts: Prompts, tmp_path: Path) -> None:
    async def refusal(text: str) -> ApiError:
        with pytest.raises(ApiError) as caught:
            await prompts.of_many([text], "input")
        return caught.value

    assert "empty" in asyncio.run(refusal("")).message
    for size in (5_000, 10_000_000):
        error = asyncio.run(refusal("x " * size))
        assert (error.status, error.param, error.code) == (400, "input", "context_length_exceeded")
        assert "This model's maximum context length is 4096 tokens" in error.message, "words that clients know"
    assert [prompt.ids for prompt in asyncio.run(prompts.of_many([[0, 1], [2]], "prompt"))] == [[0, 1], [2]]
    for ids in ([10**6], [1] * 4096):
        with pytest.raises(ApiError) as caught:
            asyncio.run(prompts.of_many([ids], "prompt"))
        assert caught.value.param == "prompt"


def test_prompts_that_are_tokenised_in_a_thread_get_the_same_ids(tmp_path: Path) -> None:
    roomy = Prompts(in_process.make_service(tmp_path).text, 100_000)
    line = "the quick brown fox\n"

    def count(copies: int) -> int:
        (prompt,) = asyncio.run(roomy.of_many([line * copies], "prompt"))
        return len(prompt.ids)

    per_line = count(2) - count(1)
    assert len(line * 900) > 16_384 and count(900) == count(1) + 899 * per_line


def test_messages_reach_the_template_as_text(prompts: Prompts) -> None:
    body = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "refusal": "no"},
            {"role": "user", "content": "c"},
        ]
    )
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    turns = f"<｜User｜>ab<｜Assistant｜></think>no{eos}<｜User｜>c<｜Assistant｜></think>"
    assert asyncio.run(prompts.of_chat(body)).text == f"{bos}be brief{turns}"


def posted(tmp_path: Path, messages: list[dict[str, Any]]) -> list[Any]:
    """What is sent back for a body that arrives as these messages, and then nothing more."""
    app = in_process.application(in_process.make_service(tmp_path, "max_request_bytes = 1024"), FakeEngine())
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0) if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 10))
    return sent


def piece(body: bytes, more: bool = True) -> dict[str, Any]:
    """A part of a body."""
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_that_never_arrives_is_408_and_ends_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "BODY_S", 0.01)
    sent = posted(tmp_path, [piece(b"{")])
    assert sent[0]["status"] == 408 and (b"connection", b"close") in sent[0]["headers"]
    assert b"did not arrive within 0.01 s" in sent[1]["body"]


def test_a_body_without_a_length_is_counted_as_it_arrives(tmp_path: Path) -> None:
    sent = posted(tmp_path, [piece(b" " * 512)] * 3)  # the rest never comes, and is not waited for
    assert sent[0]["status"] == 413 and b"at most 1024 bytes" in sent[1]["body"]
    assert posted(tmp_path, [piece(b" " * 512), piece(b" " * 512, more=False)])[0]["status"] == 400, "it fits"


def test_a_client_that_leaves_while_it_sends_is_no_bug_of_ours(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert posted(tmp_path, [piece(b"{"), {"type": "http.disconnect"}])[0]["status"] == 499
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_best_of_picks_by_the_mean_and_not_by_the_sum(tmp_path: Path) -> None:
    def script(text: str, *logprobs: float) -> list[Any]:
        made = deltas(*[text] * len(logprobs))
        for delta, value in zip(made, logprobs, strict=True):
            delta.logprobs = delta.logprobs.replace(b"-0.5", str(value).encode())
        return made

    engine = FakeEngine(script("short", -3.0), script("long", -1.0, -1.0, -1.0, -1.0), script("middle", -1.5, -1.5))
    service = in_process.make_service(tmp_path)

    async def ask() -> Any:
        async with in_process.client(in_process.application(service, engine)) as client:
            return await client.completions.create(model=in_process.MODEL, prompt="x", best_of=3, n=2)

    answer = asyncio.run(ask())
    assert [choice.text for choice in answer.choices] == ["long" * 4, "middle" * 2]
    assert answer.usage.completion_tokens == 7
    assert CompletionRequest.model_fields["max_tokens"].default == 16, "OpenAI's default"
    assert all(call.inputs["return_log_probs"] for call in engine.calls)
