"""The supervisor's parts that need no server: watches, back-off, one child's states, the control socket."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from nmoe_backend import environ, grpc_probe
from nmoe_backend.server_process import ChildProcess
from nmoe_backend.supervisor_child import Advance, Backoff, Console, GaveUp, Part, SupervisedChild, Watch
from nmoe_backend.supervisor_config import SupervisorConfig, read_supervisor
from nmoe_backend.supervisor_control import ControlSocket, drain
from nmoe_backend.toml_table import Table
from nmoe_backend.types import ConfigError

WALL_CLOCK_FOR_PEOPLE = {  # dates in answers and prompts
    *(f"nmoe_backend/api/{name}.py" for name in ("chat", "completions", "responses", "server")),
    "nmoe_backend/text.py",
    "nmoe_backend/tracing.py",
}


class Clock:
    """Moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now


def test_a_sign_is_missed_after_the_limit_and_not_before() -> None:
    clock, counter = Clock(), [None]
    watch = Watch(Advance(lambda: counter[0]), every_s=0.5, limit_s=3.5, complaint="has no heartbeat", clock=clock)
    clock.now = 100.0
    assert watch.complaint() is None  # nothing was ever pushed: a repository without the metric is not watched
    counter[0] = 1.0
    clock.now = 101.0
    assert watch.complaint() is None
    clock.now = 104.4
    assert watch.complaint() is None
    counter[0] = None  # no answer is no sign either
    clock.now = 104.5
    assert watch.complaint() == "has no heartbeat"
    counter[0] = 1.0
    clock.now = 105.0
    assert watch.complaint() == "has no heartbeat"
    counter[0] = 0.0  # it was reset: something is alive
    clock.now = 105.5
    assert watch.complaint() is None


def test_a_sign_is_looked_for_at_its_interval_and_before_judging_after_a_pause() -> None:
    """The supervisor may have been held up, by the end of another child or by a stop of its own."""
    clock, looks = Clock(), []

    def look() -> bool:
        looks.append(clock.now)
        return True

    watch = Watch(look, every_s=5.0, limit_s=20.0, complaint="is silent", clock=clock)
    for now in (0.0, 0.1, 4.9, 5.0, 5.1, 9.9, 10.0, 100.0):
        clock.now = now
        assert watch.complaint() is None
    assert looks == [0.0, 5.0, 10.0, 100.0]


def test_a_grpc_port_that_is_closed_or_silent_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_probe, "_TIMEOUT_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert not grpc_probe.answers(address)  # nobody listens
        silent.listen()  # the kernel accepts connections, and that is all
        assert not grpc_probe.answers(address)


def test_delays_double_up_to_a_bound_and_the_limit_ends_it() -> None:
    clock = Clock()
    backoff = Backoff(SupervisorConfig(restart_limit=5, restart_delay_s=1.0, restart_max_delay_s=6.0), clock)
    assert [backoff.next_delay_s() for _ in range(6)] == [1.0, 2.0, 4.0, 6.0, 6.0, None]


def test_restarts_older_than_the_window_do_not_count() -> None:
    clock = Clock()
    backoff = Backoff(SupervisorConfig(restart_limit=2, restart_window_s=100.0), clock)
    assert backoff.next_delay_s() == 1.0
    clock.now = 60.0
    assert [backoff.next_delay_s(), backoff.next_delay_s()] == [2.0, None]
    clock.now = 100.0  # the first one is forgotten
    assert [backoff.next_delay_s(), backoff.next_delay_s()] == [2.0, None]
    clock.now = 300.0  # a healthy while
    assert backoff.next_delay_s() == 1.0


class Harness:
    """A supervised child that is a real process, ready when the test says so."""

    def __init__(self, clock: Clock, settings: SupervisorConfig, ports: tuple[int, ...] = (), code: str = "") -> None:
        self.ready = True
        self.first_request: str | None = None
        self.answers = True
        self.is_busy = False
        self.processes: list[ChildProcess] = []
        code = code or "import time; print('hello', flush=True); time.sleep(600)"

        def start() -> ChildProcess:
            argv = [sys.executable, "-c", code]
            self.processes.append(ChildProcess(argv, environ.child_environment({}, {}), lambda _line: None))
            return self.processes[-1]

        def watches() -> Sequence[Watch]:
            silent = Watch(lambda: False, every_s=1.0, limit_s=1.0, complaint="shows nothing, ever", clock=clock)
            port = Watch(lambda: self.answers, every_s=5.0, limit_s=20.0, complaint="does not answer", clock=clock)
            return silent, port

        part = Part(
            name="the child", start=start, ports=ports, is_ready=lambda: self.ready,
            failure_of_first_request=lambda: self.first_request, watches=watches, start_timeout_s=10.0,
            drain_s=0.2, is_busy=lambda: self.is_busy,
        )  # fmt: skip
        self.child = SupervisedChild(part, "127.0.0.1", settings, Console(), Path("x.toml"), clock=clock)

    def end(self) -> None:
        """The process dies."""
        self.processes[-1].kill()

    def __enter__(self) -> Harness:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()


def test_a_child_that_dies_is_started_again_after_its_delay() -> None:
    clock = Clock()
    with Harness(clock, SupervisorConfig()) as one:
        one.child.tick()
        one.child.tick()
        assert one.child.is_ready
        one.end()
        one.child.tick()
        assert not one.child.is_ready
        clock.now = 0.9
        one.child.tick()
        assert len(one.processes) == 1
        clock.now = 1.0
        one.child.tick()
        assert len(one.processes) == 2 and one.processes[1].exit_code() is None
        one.child.tick()
        assert one.child.is_ready and one.child.stop()
        assert one.processes[1].exit_code() is not None


def test_a_child_that_stops_answering_is_ended_and_watched_anew_when_it_is_back(
    capfd: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    with Harness(clock, SupervisorConfig()) as one:
        one.child.tick()
        one.child.tick()
        for clock.now in (5.0, 24.9):
            one.child.tick()
        one.answers = False
        for clock.now in (29.9, 44.8):
            one.child.tick()
            assert one.child.is_ready
        clock.now = 44.9  # 20 s after the last answer
        one.child.tick()
        assert not one.child.is_ready and one.processes[0].exit_code() == -9
        clock.now = 45.9
        one.child.tick()
        one.child.tick()
        clock.now = 300.0
        one.child.tick()  # it has not answered yet, and so cannot have stopped
        assert one.child.is_ready and len(one.processes) == 2
    assert "restarting the child in 1 s: it does not answer" in capfd.readouterr().out


def test_what_still_has_requests_after_the_drain_is_cut_off_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(600)"
    )
    with Harness(Clock(), SupervisorConfig(), code=code) as one:
        one.child.tick()
        while not one.processes[0].last_lines():
            pass
        one.is_busy = True
        assert one.child.stop()
        assert one.processes[0].exit_code() == -9
    assert "the child still had requests after 0.2 s: they are cut off" in capfd.readouterr().out


def test_a_first_start_that_fails_is_final() -> None:
    with Harness(Clock(), SupervisorConfig()) as one:
        one.ready, one.first_request = True, "HTTP 500"
        one.child.tick()
        with pytest.raises(GaveUp, match="the child answers health, but not a request: HTTP 500"):
            one.child.tick()


def test_a_start_that_takes_too_long_is_a_failure() -> None:
    clock = Clock()
    with Harness(clock, SupervisorConfig()) as one:
        one.ready = False
        one.child.tick()
        clock.now = 10.1
        with pytest.raises(GaveUp, match="was not ready after 10 s"):
            one.child.tick()


def test_without_restart_the_first_death_is_final(capfd: pytest.CaptureFixture[str]) -> None:
    with Harness(Clock(), SupervisorConfig(restart=False)) as one:
        one.child.tick()
        one.child.tick()
        one.end()
        with pytest.raises(GaveUp, match="died; it is not restarted because"):
            one.child.tick()
    assert "nmoe: the child died (exit code -9). Its last lines:" in capfd.readouterr().err


def test_the_cause_is_not_lost_among_the_errors_of_requests(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "import logging, time; from nmoe_backend.event_log import log_event, start_log\n"
        "stop, log = start_log('info'), logging.getLogger('nmoe_backend.x')\n"
        "log_event(log, 'engine_failed', {'cause': 'it fell off the bus'}, logging.CRITICAL)\n"
        "log.error('words of a library')\n"
        "for number in range(500): log_event(log, 'error', {'id': number}, logging.ERROR)\n"
        "stop(); print('on', flush=True); time.sleep(600)"
    )
    with Harness(Clock(), SupervisorConfig(restart=False), code=code) as one:
        one.child.tick()
        while "on" not in one.processes[-1].last_lines():
            pass
        one.child.tick()
        one.end()
        with pytest.raises(GaveUp, match="died"):
            one.child.tick()
    said = capfd.readouterr().err
    assert "it fell off the bus" in said and "words of a library" in said and '"event": "error"' not in said


def test_more_deaths_than_the_limit_are_final_and_the_reason_is_the_last_one() -> None:
    clock = Clock()
    with Harness(clock, SupervisorConfig(restart_limit=1)) as one:
        one.child.tick()
        one.child.tick()
        one.end()
        one.child.tick()
        clock.now = 1.0
        one.child.tick()
        one.end()
        with pytest.raises(GaveUp, match="ended while it started, after 1 restarts within 3600 s"):
            one.child.tick()


def test_a_port_that_stays_taken_is_named() -> None:
    clock = Clock()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with Harness(clock, SupervisorConfig(), ports=(port,)) as one:
            one.child.tick()
            clock.now = 14.0  # what listens there may be on its way out
            one.child.tick()
            clock.now = 15.0
            with pytest.raises(GaveUp, match=f"cannot start: 127.0.0.1:{port} is still in use"):
                one.child.tick()
            assert one.processes == []


def test_a_drain_is_heard_once_and_everybody_who_asked_gets_the_exit_code() -> None:
    codes: list[int] = []
    port = 100_000 + os.getpid()  # a name, not a port
    with ControlSocket(port) as control:
        assert not control.asks_for_drain()
        clients = [threading.Thread(target=lambda: codes.append(drain(port, 30.0))) for _ in range(3)]
        for client in clients:
            client.start()
        while not control.asks_for_drain():
            pass
        assert codes == []
        control.tell(0)
    for client in clients:
        client.join(30)
    assert set(codes) <= {0, 1} and 0 in codes  # one that came too late finds nobody


def test_who_asks_for_a_drain_and_leaves_takes_nobodys_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    port = 400_000 + os.getpid()
    with ControlSocket(port) as control:
        assert drain(port, 0.01) == 1  # nobody looks yet
        client = threading.Thread(target=lambda: codes.append(drain(port, 30.0)))
        client.start()
        while len(control._waiting) < 2:
            control.asks_for_drain()
        control.tell(0)
    client.join(30)
    assert codes == [0] and "still runs after 0.01 s" in capsys.readouterr().err


def test_two_servers_on_one_port_are_refused_and_a_drain_of_none_is_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    port = 200_000 + os.getpid()
    with ControlSocket(port), pytest.raises(ConfigError, match=f"another `nmoe serve` with http_port={port}"):
        ControlSocket(port)
    assert drain(port, 1.0) == 1
    assert "no `nmoe serve` with http_port" in capsys.readouterr().err


def test_a_server_that_is_killed_answers_no_drain(capsys: pytest.CaptureFixture[str]) -> None:
    port = 300_000 + os.getpid()
    code = (
        "import time\nfrom nmoe_backend.supervisor_control import ControlSocket\n"
        f"with ControlSocket({port}) as control:\n    print('up', flush=True)\n    time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdout.readline() == "up\n"
        killer = threading.Timer(0.2, server.kill)
        killer.start()
        assert drain(port, 30.0) == 1
        killer.join()
    assert "the server was killed" in capsys.readouterr().err


def test_no_deadline_hangs_on_the_wall_clock() -> None:
    root = Path(__file__).parents[2]
    sources = [*(root / "nmoe_backend").rglob("*.py"), *(root / "model_repository").rglob("*.py")]
    uses = {
        path.relative_to(root).as_posix()
        for path in sources
        if any(word in path.read_text() for word in ("time.time(", "time.time_ns(", "datetime.now(", "utcnow("))
    }
    assert uses <= WALL_CLOCK_FOR_PEOPLE, f"{uses}: deadlines, timeouts and ages need time.monotonic()"


def test_triton_gets_at_least_as_long_as_the_front_end_to_drain() -> None:
    assert read_supervisor(Table({}, "c.toml"), 300.0, ()).drain_s == 300.0
    assert read_supervisor(Table({}, "c.toml"), 25.0, ()).drain_s == 30.0
    with pytest.raises(ConfigError, match="supervisor.drain_s is 60, but .openai. drain_s is 300"):
        read_supervisor(Table({"supervisor": {"drain_s": 60.0}}, "c.toml"), 300.0, ())


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("restart_limit", 0, "needs a value >= 1"),
        ("restart_delay_s", 90.0, None),
        ("restart_max_delay_s", 0.5, "needs a value >= restart_delay_s=1"),
        ("restrat", True, "Did you mean 'restart'"),
    ],
)
def test_a_setting_that_cannot_be_is_an_error(key: str, value: object, words: str | None) -> None:
    table = Table({"supervisor": {key: value}}, "c.toml")
    if words is None:
        assert read_supervisor(table, 0.0, ()).restart_max_delay_s == 90.0  # never below the first delay
        return
    with pytest.raises(ConfigError, match=words):
        read_supervisor(table, 0.0, ())
