"""What runs while somebody serves: Triton, the OpenAI front end in front of it, and the watch over both.

Starts one after the other, stays until a signal, `nmoe drain` or the end of a child that is not to be restarted.
A drain tells both at once, so that no port is ready any more: each refuses new requests and ends those that run.
A second signal kills both.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from nmoe_backend import environ, grpc_probe, http_probe
from nmoe_backend.config import ServeConfig
from nmoe_backend.server_process import ChildProcess, ServerProcess
from nmoe_backend.supervisor_child import Advance, Console, GaveUp, Part, SupervisedChild, Watch
from nmoe_backend.supervisor_control import ControlSocket

PROMPT = "The capital of France is"
_POLL_S = 0.1
_HEARTBEAT_POLL_S, _HEARTBEAT_LIMIT_S = 0.5, 3.5  # a dead engine's server is gone well within 5 s
# Four calls in a row of 2 s each, so that load ends no server: beside 2,048 streams on two full cores the slowest call
# took 0.04 s, beside 400 clients at a time that came and went 0.3 s.
_GRPC_POLL_S, _GRPC_LIMIT_S = 5.0, 20.0
_API_START_S = 60.0
_BETWEEN_S = 0.5  # from the front end's SIGTERM to Triton's: what it had just accepted reaches the engine


class StopRequest:
    """SIGINT and SIGTERM as an event; the second one asks for a kill. Installed for the life of `installed()`."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.count = 0

    def __call__(self, _signal: int, _frame: FrameType | None) -> None:
        """The handler."""
        self.count += 1
        self.event.set()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle both signals within, restore what was there."""
        before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Supervisor:
    """Watches the children of one `nmoe serve`. One thread; the children's lines are printed from readers' threads."""

    def __init__(
        self, config: ServeConfig, shown_config: Path, console: Console, stop: StopRequest, control: ControlSocket
    ) -> None:
        self._config, self._shown_config, self._console = config, shown_config, console
        self._stop, self._control = stop, control

    def run(self, start_server: Callable[[], ServerProcess], start_timeout_s: float, ready_text: str) -> int:
        """Until a signal, `nmoe drain`, or a death that is final. Returns the exit code."""
        children = [self._supervised(self._triton(start_server, start_timeout_s))]
        if self._config.openai.workers:
            children.append(self._supervised(self._front_end()))
        started: list[SupervisedChild] = []
        try:
            for child in children:
                started.append(child)
                self._tend(started, until_ready=True)
            if not self._must_stop():
                self._console.say(ready_text)
            self._tend(started, until_ready=False)
            return self._drain(started)
        except GaveUp as reason:
            print(f"nmoe: giving up: {reason}", file=sys.stderr, flush=True)
            self._drain(started)
            return 1
        finally:
            for child in started:
                child.kill()

    def _tend(self, children: Sequence[SupervisedChild], *, until_ready: bool) -> None:
        """Until a stop, or with until_ready until all of them are ready. Raises GaveUp."""
        while not self._must_stop() and not (until_ready and all(child.is_ready for child in children)):
            for child in children:
                child.tick()
            self._stop.event.wait(_POLL_S)

    def _must_stop(self) -> bool:
        return self._stop.event.is_set() or self._control.asks_for_drain()

    def _supervised(self, part: Part) -> SupervisedChild:
        settings = self._config.supervisor
        return SupervisedChild(part, self._config.host, settings, self._console, self._shown_config)

    def _triton(self, start: Callable[[], ServerProcess], start_timeout_s: float) -> Part:
        config = self._config

        def failure_of_first_request() -> str | None:
            self._console.say("Triton is ready; generating one token")
            return http_probe.generate_failure(config, PROMPT)

        return Part(
            name="tritonserver",
            start=start,
            ports=(config.http_port, config.grpc_port, config.metrics_port),
            is_ready=lambda: http_probe.is_ready(config),
            failure_of_first_request=failure_of_first_request,
            watches=lambda: _watches(config),
            start_timeout_s=start_timeout_s,
            drain_s=config.supervisor.drain_s,
            is_busy=lambda: http_probe.has_requests(config),  # with some left at its own limit this Triton may hang
        )

    def _front_end(self) -> Part:
        """Ready means that it answers: whether the engine behind it does is Triton's matter."""
        config = self._config
        argv = [sys.executable, "-m", "nmoe_backend.api.server", "--config", str(config.config_path)]
        # Its temporary files lie in our folder, so that one that was killed leaves none behind.
        env = environ.child_environment({"TMPDIR": str(config.config_path.parent)}, {})

        def start() -> ChildProcess:
            return ChildProcess(argv, env, self._console.show)

        return Part(
            name="the OpenAI front end",
            start=start,
            ports=(config.openai_port,),
            is_ready=lambda: http_probe.front_end_answers(config),
            failure_of_first_request=lambda: None,
            watches=lambda: (),
            start_timeout_s=_API_START_S,
            drain_s=config.openai.drain_s,  # its own limit; then it cancels and ends by itself
            is_busy=lambda: False,
        )

    def _drain(self, children: Sequence[SupervisedChild]) -> int:
        """Stop all at the same time, in threads of their own, so that a second signal can kill."""
        limit_s = self._config.supervisor.drain_s
        self._console.say(f"stopping: live requests have {limit_s:g} s to end; signal again to kill")
        ended: list[bool] = []
        stoppers = [threading.Thread(target=lambda one=child: ended.append(one.stop())) for child in reversed(children)]
        for stopper in stoppers:
            stopper.start()
            stopper.join(_BETWEEN_S)
        while any(stopper.is_alive() for stopper in stoppers):
            if self._stop.count > 1:
                for child in children:
                    child.kill()
            stoppers[-1].join(_POLL_S)
        clean = all(ended) and self._stop.count <= 1
        self._console.say("stopped" if clean else "stopped by force")
        return 0 if clean else 1


def _watches(config: ServeConfig) -> Sequence[Watch]:
    """Triton 2.51 stays ready with a dead engine, with a dead stub, and with a gRPC port where nobody answers.

    A dead engine and a dead stub stop the counter that the model's metrics thread pushes.
    """
    heartbeat = Watch(
        Advance(lambda: http_probe.engine_heartbeats(config)), every_s=_HEARTBEAT_POLL_S, limit_s=_HEARTBEAT_LIMIT_S,
        complaint=f"has an engine without a heartbeat for {_HEARTBEAT_LIMIT_S:g} s",
    )  # fmt: skip
    address = f"{http_probe.url_host(config.host)}:{config.grpc_port}"
    grpc_port = Watch(
        lambda: grpc_probe.answers(address), every_s=_GRPC_POLL_S, limit_s=_GRPC_LIMIT_S,
        complaint=f"has not answered over gRPC for {_GRPC_LIMIT_S:g} s",
    )  # fmt: skip
    return heartbeat, grpc_port
