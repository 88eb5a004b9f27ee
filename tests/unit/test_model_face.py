"""deepseek_v3/1/model.py without a server: one request that trips over a bug of ours costs nobody else anything."""

from __future__ import annotations

import importlib.util
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from nmoe_backend.types import ErrorKind, RequestError

MODEL = Path(__file__).resolve().parents[2] / "model_repository" / "deepseek_v3" / "1" / "model.py"


class FakeSender:
    """Keeps (response, flags)."""

    def __init__(self) -> None:
        self.sent: list[tuple[SimpleNamespace, int]] = []

    def send(self, response: SimpleNamespace, flags: int) -> None:
        self.sent.append((response, flags))


class FakeRequest:
    """A request without tensors."""

    def __init__(self) -> None:
        self.sender = FakeSender()

    def get_response_sender(self) -> FakeSender:
        return self.sender

    def requested_output_names(self) -> list[str]:
        return ["text_output"]

    def inputs(self) -> list[object]:
        return []

    def parameters(self) -> str:
        return ""

    def request_id(self) -> str:
        return ""

    def timeout(self) -> int:
        return 0


@pytest.fixture
def face(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    utils = ModuleType("triton_python_backend_utils")
    codes = {kind: kind for kind in ("INVALID_ARG", "UNAVAILABLE", "CANCELLED", "NOT_FOUND", "INTERNAL")}
    error_class = type("TritonError", (), {**codes, "__init__": lambda self, text, code: vars(self).update(code=code)})
    utils.TritonError = error_class  # type: ignore[attr-defined]
    utils.TritonModelException = type("TritonModelException", (Exception,), {})  # type: ignore[attr-defined]
    utils.InferenceResponse = lambda error: SimpleNamespace(error=error)  # type: ignore[attr-defined]
    utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    spec = importlib.util.spec_from_file_location("deepseek_v3_model", MODEL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_bug_in_one_request_leaves_the_others_of_the_call(face: ModuleType) -> None:
    refused: list[ErrorKind] = []
    failures: list[Exception] = [ZeroDivisionError(), RequestError("no prompt"), RequestError("x", ErrorKind.NOT_FOUND)]

    def parse(call: object) -> None:
        raise failures[len(refused)]

    model = face.TritonPythonModel()
    model._contract = SimpleNamespace(parse=parse)
    model._log_prompts, model._tracer = False, None
    model._observers = SimpleNamespace(
        refused=lambda record: refused.append(record.error.kind), received=lambda record: None
    )
    model._encoder, model._request_ids = None, iter(range(9))
    requests = [FakeRequest() for _ in failures]
    model.execute(requests)
    assert [[(sent.error.code, flags) for sent, flags in one.sender.sent] for one in requests] == [
        [("INTERNAL", 1)],
        [("INVALID_ARG", 1)],
        [("NOT_FOUND", 1)],
    ]
    assert refused == [ErrorKind.ENGINE, ErrorKind.INVALID, ErrorKind.NOT_FOUND]


def face_model(face: ModuleType, submit: object) -> tuple[object, list[object], list[ErrorKind]]:
    """The model over a contract that lets everything through; what was discarded, what was refused."""
    discarded: list[object] = []
    refused: list[ErrorKind] = []
    model = face.TritonPythonModel()
    model._contract = SimpleNamespace(parse=lambda call: SimpleNamespace(request=call, guide=None))
    model._log_prompts, model._tracer = False, None
    model._observers = SimpleNamespace(
        refused=lambda record: refused.append(record.error.kind), received=lambda record: None
    )
    model._engine = SimpleNamespace(submit=submit)
    model._responder = SimpleNamespace(
        open=lambda parsed, channel, record: SimpleNamespace(request=parsed.request), discard=discarded.append
    )
    model._encoder, model._request_ids = None, iter(range(9))
    model._compiling, model._stop_lock = {}, threading.Lock()
    return model, discarded, refused


def test_a_bug_behind_an_open_stream_leaves_no_stream(face: ModuleType) -> None:
    def submit(request: object, stream: object) -> None:
        raise ZeroDivisionError

    model, discarded, refused = face_model(face, submit)
    model.execute([FakeRequest(), FakeRequest()])  # type: ignore[attr-defined]
    assert (len(discarded), refused) == (2, [ErrorKind.ENGINE] * 2)


def test_a_refusal_that_cannot_be_delivered_leaves_the_others_of_the_call(face: ModuleType) -> None:
    def submit(request: object, stream: object) -> None:
        raise RequestError("full", ErrorKind.OVERLOADED)

    def broken(response: object, flags: int) -> None:
        raise sys.modules["triton_python_backend_utils"].TritonModelException("the sender is closed")

    model, discarded, refused = face_model(face, submit)
    gone, present = FakeRequest(), FakeRequest()
    gone.sender.send = broken  # type: ignore[method-assign]
    model.execute([gone, present])  # type: ignore[attr-defined]
    assert [(sent.error.code, flags) for sent, flags in present.sender.sent] == [("UNAVAILABLE", 1)]
    assert (len(discarded), refused) == (2, [ErrorKind.OVERLOADED] * 2)


def _guided(request_id: int) -> SimpleNamespace:
    return SimpleNamespace(
        guide="g",
        request=SimpleNamespace(request_id=request_id),
        with_grammar=lambda grammar: SimpleNamespace(request=grammar),
    )


def test_a_stop_command_reaches_a_request_whose_guide_still_compiles(face: ModuleType) -> None:
    submitted: list[object] = []
    model, _, refused = face_model(face, lambda request, stream: submitted.append(request))
    futures = [Future[str](), Future[str]()]
    waiting, parsed = iter(futures), iter([_guided(0), _guided(1), face.StopCommand(client_id="mine")])
    model._contract = SimpleNamespace(parse=lambda call: next(parsed))  # type: ignore[attr-defined]
    model._grammars = SimpleNamespace(compile=lambda guide: next(waiting))  # type: ignore[attr-defined]
    stopped: list[str] = []
    model._engine.cancel_by_client_id = stopped.append  # type: ignore[attr-defined]
    face._Channel.answer_empty = lambda self, outputs: None
    requests = [FakeRequest() for _ in range(3)]
    requests[0].request_id = lambda: "mine"  # type: ignore[method-assign]
    requests[1].request_id = lambda: "another"  # type: ignore[method-assign]
    model.execute(requests)  # type: ignore[attr-defined]
    assert stopped == ["mine"] and refused == [ErrorKind.CANCELLED]
    for number, future in enumerate(futures):
        future.set_result(f"grammar {number}")
    assert submitted == ["grammar 1"], "the stopped one was answered"
    assert [len(one.sender.sent) for one in requests] == [1, 0, 0]


class NotingLock:
    """A lock that says when somebody finds it taken."""

    def __init__(self, found_taken: threading.Event) -> None:
        self._lock, self._found_taken = threading.Lock(), found_taken

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._found_taken.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_a_stop_command_does_not_pass_a_request_between_its_guide_and_the_engine(face: ModuleType) -> None:
    """It comes while a thread of the compiler submits the request: the engine hears of the request first."""
    told: list[str] = []
    has_come = threading.Event()

    def submit(request: object, stream: object) -> None:
        stopper.start()
        assert has_come.wait(30.0)
        told.append("submitted")

    def cancel(client_id: str) -> None:
        told.append("cancelled")
        has_come.set()

    model, _, refused = face_model(face, submit)
    future, parsed = Future[str](), iter([_guided(0), face.StopCommand(client_id="mine")])
    model._contract = SimpleNamespace(parse=lambda call: next(parsed))  # type: ignore[attr-defined]
    model._grammars = SimpleNamespace(compile=lambda guide: future)  # type: ignore[attr-defined]
    model._engine.cancel_by_client_id = cancel  # type: ignore[attr-defined]
    model._stop_lock = NotingLock(has_come)  # type: ignore[attr-defined]
    face._Channel.answer_empty = lambda self, outputs: None
    stopper = threading.Thread(target=model.execute, args=[[FakeRequest()]])  # type: ignore[attr-defined]
    model.execute([FakeRequest()])  # type: ignore[attr-defined]
    future.set_result("grammar")
    stopper.join()
    assert told == ["submitted", "cancelled"] and refused == []


def test_no_refusal_is_sent_while_stop_commands_have_to_wait(face: ModuleType) -> None:
    """A send is a round trip to the server: neither a guide that fails nor a stop command makes it under the lock."""
    model, _, refused = face_model(face, lambda request, stream: None)
    futures, held = [Future[str](), Future[str]()], list[bool]()
    waiting, parsed = iter(futures), iter([_guided(0), _guided(1), face.StopCommand(client_id="mine")])
    model._contract = SimpleNamespace(parse=lambda call: next(parsed))  # type: ignore[attr-defined]
    model._grammars = SimpleNamespace(compile=lambda guide: next(waiting))  # type: ignore[attr-defined]
    model._engine.cancel_by_client_id = lambda client_id: None  # type: ignore[attr-defined]
    face._Channel.answer_empty = lambda self, outputs: None
    requests = [FakeRequest() for _ in range(3)]
    for one in requests:
        one.sender.send = lambda response, flags: held.append(model._stop_lock.locked())  # type: ignore
    requests[0].request_id = lambda: "mine"  # type: ignore[method-assign]
    model.execute(requests)  # type: ignore[attr-defined]
    futures[1].set_exception(RequestError("no schema"))
    assert refused == [ErrorKind.CANCELLED, ErrorKind.INVALID] and held == [False, False]


def test_a_guided_request_is_submitted_when_its_grammar_is_there_and_holds_nobody_up(face: ModuleType) -> None:
    submitted: list[object] = []
    model, _, refused = face_model(face, lambda request, stream: submitted.append(request))
    futures = [Future[str]() for _ in range(3)]
    waiting = iter(futures)
    guided = [_guided(number) for number in range(3)]
    parsed = iter([*guided, SimpleNamespace(request="plain", guide=None)])
    model._contract = SimpleNamespace(parse=lambda call: next(parsed))  # type: ignore[attr-defined]
    model._grammars = SimpleNamespace(compile=lambda guide: next(waiting))  # type: ignore[attr-defined]
    requests = [FakeRequest() for _ in range(4)]
    model.execute(requests)  # type: ignore[attr-defined]
    assert submitted == ["plain"] and not any(one.sender.sent for one in requests)
    futures[1].set_result("grammar")
    futures[0].set_exception(RequestError("no schema"))
    futures[2].cancel()
    assert submitted == ["plain", "grammar"] and refused == [ErrorKind.INVALID, ErrorKind.UNAVAILABLE]
    assert [len(one.sender.sent) for one in requests] == [1, 0, 1, 0]


def test_a_server_that_does_not_say_whether_a_client_is_there_ends_no_thread(face: ModuleType) -> None:
    def is_cancelled() -> bool:
        raise face.pb_utils.TritonModelException("no shared memory")

    with pytest.raises(face.ChannelError, match="no shared memory"):
        face._Channel(SimpleNamespace(is_cancelled=is_cancelled), None, None).is_cancelled()


def test_a_dead_sender_turns_the_model_not_ready(face: ModuleType) -> None:
    model = face.TritonPythonModel()
    for engine, responder in ((True, True), (True, False), (False, True)):
        model._engine = SimpleNamespace(is_alive=lambda alive=engine: alive)
        model._responder = SimpleNamespace(is_alive=lambda alive=responder: alive)
        assert model.is_ready() is (engine and responder)
