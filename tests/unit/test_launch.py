"""The launcher's parts that need no server: options, the effective config, what is shown, the HTTP probe."""

from __future__ import annotations

import dataclasses
import http.server
import json
import logging
import re
import shlex
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from nmoe_backend import __main__ as console, http_probe, launch
from nmoe_backend.config import ServeConfig
from nmoe_backend.event_log import JsonFormatter
from nmoe_backend.server_process import lines_in, progress_of
from nmoe_backend.supervisor_child import Console
from nmoe_backend.types import ConfigError
from tests.model_folder import write_model_folder, write_toml


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return write_toml(tmp_path / "c.toml", write_model_folder(tmp_path / "model"))


def test_what_follows_two_dashes_goes_to_tritonserver() -> None:
    options = launch.parse_arguments(["--config", "a.toml", "--", "--log-verbose=1", "--", "x"])
    assert options.server_flags == ("--log-verbose=1", "--", "x")
    assert options.config == Path("a.toml")
    assert options.overrides == {}
    assert options.verbose  # who asks the server for more wants to see it


@pytest.mark.parametrize("flags", [["--http-port=8100"], ["--log-verbose=1", "--grpc-address", "0.0.0.0"]])
def test_a_server_flag_that_we_must_know_ourselves_is_refused(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        launch.parse_arguments(["--config", "a.toml", "--", *flags])
    assert "behind --, where it would bypass the configuration. Put --h" in capsys.readouterr().err


def test_flags_override_ports_and_paths(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    other = write_model_folder(tmp_path / "other")
    arguments = ["-c", str(toml), "--http-port", "8100", "--host", "0.0.0.0", "--model-path", "other"]
    config = launch.effective_config(launch.parse_arguments(arguments), tmp_path / "run")
    assert (config.http_port, config.host, config.model_path) == (8100, "0.0.0.0", other)
    assert config.config_path == tmp_path / "run" / "c.toml"
    plain = ServeConfig.from_toml(toml, {"http_port": 8100, "host": "0.0.0.0", "model_path": str(other)})
    assert dataclasses.replace(config, config_path=toml) == plain


def test_a_toml_that_is_edited_while_it_serves_changes_nothing(toml: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    config = launch.effective_config(launch.parse_arguments(["-c", str(toml)]), tmp_path / "run")
    toml.write_text("broken")
    assert config.config_path == tmp_path / "run" / "c.toml"
    assert ServeConfig.from_toml(config.config_path) == config


def test_a_bad_override_is_an_error(toml: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="http_port is 8001, and so is|grpc_port is 8001, and so is http_port"):
        launch.effective_config(launch.parse_arguments(["-c", str(toml), "--http-port", "8001"]), tmp_path)


def test_a_config_error_is_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--config", str(tmp_path / "none.toml")]) == 1
    assert "nmoe: cannot read the configuration" in capsys.readouterr().err


def test_a_failing_doctor_stops_the_start(
    toml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = launch.doctor.Finding("shm", "fail", "too small", "make it larger")
    monkeypatch.setattr(launch.doctor, "examine", lambda _config: [finding])
    assert launch.main(["--config", str(toml)]) == 1
    output = capsys.readouterr().out
    assert "fail  shm: too small\n      -> make it larger" in output and "starting Triton" not in output


def test_a_folder_that_is_not_our_repository_is_an_error(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch.doctor, "examine", lambda _config: [])
    assert launch.main(["--config", str(toml), "--model-repository", str(tmp_path)]) == 1
    assert "is not our model repository" in capsys.readouterr().err


def test_the_curl_commands_are_valid_shell_and_json(toml: Path) -> None:
    config = dataclasses.replace(ServeConfig.from_toml(toml), host="0.0.0.0", http_port=8123)
    first, second, chat, page = [shlex.split(line) for line in launch.ready_text(config).splitlines()[1:]]
    assert first[2] == "http://127.0.0.1:8123/v2/models/ensemble/generate"
    assert second[2] == "http://127.0.0.1:8123/v2/models/deepseek_v3/generate_stream"
    request = {"text_input": launch.PROMPT, "max_tokens": 20}
    for command, body in ((first, request), (second, {**request, "stream": True})):
        assert command[0] == "curl" and command[3] == "-d"
        assert json.loads(command[4]) == body
    assert chat[2] == f"http://127.0.0.1:{config.openai_port}/v1/chat/completions"
    assert json.loads(chat[-1])["messages"] == [{"role": "user", "content": launch.PROMPT}]
    assert page[-1] == f"http://127.0.0.1:{config.openai_port}/"


def test_lines_of_several_children_stay_whole_and_events_stay_json(capfd: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "words", None, None)
    event = JsonFormatter().format(record)
    console = Console()

    def print_many() -> None:
        for _ in range(300):
            launch._show(event, False, console)
            launch._show("a model's own line", False, console)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(print_many) for _ in range(4)]:
                done.result()
    finally:
        sys.setswitchinterval(before)
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2400 and lines.count(event) == 1200
    assert sum(re.fullmatch(r"\[ *\d+\.\d s\] a model's own line", line) is not None for line in lines) == 1200


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('I1123 19:14:00.123456 77 model.py:20] "weights 3.1 s"', ("I", "weights 3.1 s")),
        ("I1123 19:14:00.123456 77 model.py:20] loading", ("I", "loading")),
        ("I1123 19:14:00.123456 77 grpc_server.cc:2558] Started GRPCInferenceService", None),
        ("I1123 19:14:00.123456 77 server.cc:604]", None),
        ("W1123 19:14:00.123456 77 metrics.cc:798] unable to get power", ("W", "unable to get power")),
        ("E1123 19:14:00.123456 77 model_lifecycle.cc:642] failed to load", ("E", "failed to load")),
        ("E1123 19:14:00.1 77 cuda.cc:1] CudaDriverHelper has not been initialized.", None),
        ("W1123 19:14:00.1 77 pinned_memory_manager.cc:1] failed to allocate: no pinned memory pool, falling", None),
        (r'E1123 19:14:00.1 77 b.cc:1] "failed\n\nAt:\n  a.py(1)"', ("E", "failed\n\nAt:\n  a.py(1)")),
        ("+-----+----+", None),
        ("| Model | Version |", None),
        ("", None),
        ("Traceback (most recent call last):", ("", "Traceback (most recent call last):")),
    ],
)
def test_progress_shows_what_a_person_wants_to_see(line: str, shown: tuple[str, str] | None) -> None:
    assert progress_of(line) == shown


def test_an_event_behind_an_unfinished_line_is_a_line() -> None:
    event = '{"time": "2026-01-02T03:04:05.678Z", "level": "info", "event": "ready", "text": "{\\"time\\": 1}"}'
    assert lines_in("| Model | Ver" + event) == ["| Model | Ver", event]
    assert lines_in(event) == [event]
    assert lines_in("+----+") == ["+----+"]


@contextmanager
def answering(status: int, body: str) -> Iterator[int]:
    """An HTTP server that gives the same answer to everything; yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "ready", "failure"),
    [
        (200, '{"text_output": ""}', True, None),
        (200, '{"error": "x"}', True, 'no text_output: {"error": "x"}'),
        (200, "oops", True, "no JSON: oops"),
        (400, '{"error": "text_input is required"}', False, 'HTTP 400: {"error": "text_input is required"}'),
    ],
)
def test_ready_means_health_and_a_real_answer(
    toml: Path, status: int, body: str, ready: bool, failure: str | None
) -> None:
    with answering(status, body) as port:
        config = dataclasses.replace(ServeConfig.from_toml(toml), http_port=port)
        assert http_probe.is_ready(config) is ready
        assert http_probe.generate_failure(config, "x") == failure
    assert not http_probe.is_ready(config)
    assert "ConnectionRefusedError" in str(http_probe.generate_failure(config, "x"))


@pytest.mark.parametrize(
    ("text", "heartbeats", "busy"),
    [
        ("nmoe_requests_running 0\nnmoe_requests_waiting 0\nnmoe_engine_heartbeats_total 7", 7.0, False),
        ("nmoe_requests_running 2\nnmoe_requests_waiting 0", None, True),
        ("nmoe_requests_running 0\nnmoe_requests_waiting 1", None, True),
        ("# HELP nmoe_requests_running 1\nnmoe_requests_running_per_rank 1", None, False),
    ],
)
def test_the_probe_reads_series_by_their_whole_name(
    toml: Path, text: str, heartbeats: float | None, busy: bool
) -> None:
    with answering(200, text) as port:
        config = dataclasses.replace(ServeConfig.from_toml(toml), metrics_port=port)
        assert http_probe.engine_heartbeats(config) == heartbeats
        assert http_probe.has_requests(config) is busy


@pytest.mark.parametrize(
    ("host", "url"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("10.0.0.1", "10.0.0.1")]
)
def test_one_connects_to_loopback_where_the_server_listens_everywhere(host: str, url: str) -> None:
    assert http_probe.url_host(host) == url


def test_the_console_command_names_its_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(name in usage for name in ("serve", "drain", "api", "top", "doctor", "bench", "convert"))
    assert console.main([]) == 2
    assert console.main(["sevre"]) == 2
    assert (
        "'sevre' is not a command, needs one of: serve, drain, api, top, doctor, bench, convert"
        in capsys.readouterr().err
    )


def test_the_console_command_hands_over_and_reports_errors(toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["serve", "--config", str(toml.parent / "none.toml")]) == 1
    assert "cannot read the configuration" in capsys.readouterr().err
