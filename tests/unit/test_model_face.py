"""deepseek_v3/1/model.py without a server: one request that trips over a bug of ours costs nobody else anything."""

from __future__ import annotations

import importlib.util
import sys
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
    model._metrics = SimpleNamespace(refused=refused.append)
    model._encoder, model._request_ids = None, iter(range(9))
    requests = [FakeRequest() for _ in failures]
    model.execute(requests)
    assert [[(sent.error.code, flags) for sent, flags in one.sender.sent] for one in requests] == [
        [("INTERNAL", 1)],
        [("INVALID_ARG", 1)],
        [("NOT_FOUND", 1)],
    ]
    assert refused == [ErrorKind.ENGINE, ErrorKind.INVALID, ErrorKind.NOT_FOUND]
