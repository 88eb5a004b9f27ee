"""`nmoe serve`: from a TOML to a Triton server that has answered one request, and back to nothing.

Stages, each printed with its time: doctor, starting Triton (the model's own stages come through as it reports them),
one generated token, ready. Then it stays in front of the server, passes warnings and errors through, and on Ctrl-C or
SIGTERM drains it. A second signal kills it. Either way no process, port or shared-memory region stays behind.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from nmoe_backend import doctor, http_probe
from nmoe_backend.config import ServeConfig
from nmoe_backend.server_process import ServerProcess, progress_of
from nmoe_backend.toml_table import render_toml
from nmoe_backend.tritonserver import EXIT_TIMEOUT_S, server_command
from nmoe_backend.types import ConfigError

PROMPT = "The capital of France is"
HEARTBEAT_LIMIT_S = 4.0  # with a poll a second, a dead engine's server is gone within 5 s
_HEARTBEAT_POLL_S = 1.0
_POLL_S = 0.1
_REPORTED_LINES = 25
_DRAIN_S = EXIT_TIMEOUT_S + 15.0  # Triton's own bound, and time for finalize
_OVERRIDES = ("http_port", "grpc_port", "metrics_port", "host", "model_path", "torch_extensions_dir")
_OURS = {  # tritonserver's flags that we must know to watch the server -> our option for the same
    "--http-port": "--http-port",
    "--grpc-port": "--grpc-port",
    "--metrics-port": "--metrics-port",
    "--http-address": "--host",
    "--grpc-address": "--host",
    "--metrics-address": "--host",
    "--model-repository": "--model-repository",
    "--model-store": "--model-repository",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the command line says."""

    config: Path
    doctor_only: bool
    repository: Path
    start_timeout_s: float
    verbose: bool
    overrides: Mapping[str, object]
    server_flags: tuple[str, ...]


class Console:
    """Progress lines with the seconds since the start; safe from any thread."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()

    def say(self, text: str) -> None:
        """One line."""
        print(f"[{time.monotonic() - self._start_s:6.1f} s] {text}", flush=True)


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


class Heartbeat:
    """Watches the engine from outside: Triton 2.51 stays ready with a dead engine, and with a dead stub.

    Both stop the counter that the model's metrics thread pushes. Watching begins with the first value.
    """

    def __init__(self, read: Callable[[], float | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._clock = clock
        self._value: float | None = None
        self._asked_s = self._advanced_s = clock()

    def beats(self) -> bool:
        """False once the counter has stood still for HEARTBEAT_LIMIT_S. Asks the server once a second at most."""
        now = self._clock()
        if now - self._asked_s >= _HEARTBEAT_POLL_S:
            self._asked_s = now
            value = self._read()
            if value is not None and value != self._value:
                self._value, self._advanced_s = value, now
        return self._value is None or now - self._advanced_s < HEARTBEAT_LIMIT_S


def default_repository() -> Path:
    """model_repository/ beside the package: the source tree, which is how this project is installed (editable)."""
    return Path(__file__).resolve().parent.parent / "model_repository"


def parse_arguments(argv: Sequence[str]) -> Options:
    """Everything after `--` goes to tritonserver as it is."""
    own, flags = list(argv), []
    if "--" in own:
        split = own.index("--")
        own, flags = own[:split], own[split + 1 :]
    parser = argparse.ArgumentParser(
        prog="nmoe serve", description="Serve a TOML through Triton.", epilog="What follows -- goes to tritonserver."
    )
    parser.add_argument("--config", "-c", required=True, type=Path, metavar="X.toml")
    parser.add_argument("--doctor", action="store_true", help="only check the machine")
    parser.add_argument("--model-repository", type=Path, default=default_repository(), metavar="DIR")
    parser.add_argument("--start-timeout", type=float, default=1800.0, metavar="SECONDS", help="default %(default)g")
    parser.add_argument("--verbose", action="store_true", help="print everything that tritonserver prints")
    for key in _OVERRIDES:
        kind = int if key.endswith("_port") else str
        parser.add_argument(f"--{key.replace('_', '-')}", type=kind, help=f"instead of the TOML's {key}")
    values = parser.parse_args(own)
    for flag in (text.partition("=")[0] for text in flags):
        if flag in _OURS:
            parser.error(f"got {flag} behind --, where it would bypass the configuration. Put {_OURS[flag]} before --.")
    overrides = {key: getattr(values, key) for key in _OVERRIDES if getattr(values, key) is not None}
    for key in ("model_path", "torch_extensions_dir"):
        if key in overrides:  # a path that somebody types is relative to where they stand
            overrides[key] = str(Path(overrides[key]).absolute())
    return Options(
        config=values.config,
        doctor_only=values.doctor,
        repository=values.model_repository.absolute(),
        start_timeout_s=values.start_timeout,
        verbose=values.verbose or any(flag.startswith("--log-verbose") for flag in flags),
        overrides=overrides,
        server_flags=tuple(flags),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 after a clean stop, 1 where the server could not start or died."""
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    if options.doctor_only:
        findings = doctor.load_and_examine(options.config, dict(options.overrides))
        print(doctor.report(findings))
        return doctor.exit_code(findings)
    try:
        return serve(options)
    except ConfigError as error:
        print(f"nmoe: {error}", file=sys.stderr)
        return 1


def serve(options: Options) -> int:
    """Doctor, start, wait until it answers, stay until a signal or the server's end, stop."""
    console, stop = Console(), StopRequest()
    with stop.installed(), tempfile.TemporaryDirectory(prefix="nmoe-") as run_dir:
        config = effective_config(options, Path(run_dir))
        if not _doctor_passes(options, config, console):
            return 1
        if not (options.repository / "deepseek_v3" / "config.pbtxt").is_file():
            raise ConfigError(
                f"{options.repository} is not our model repository (no deepseek_v3/config.pbtxt). "
                "Run from a source tree, or pass --model-repository."
            )
        shm_prefix = f"nmoe_{uuid.uuid4().hex[:12]}_"
        argv, env = server_command(config, options.repository, options.server_flags, shm_prefix)
        console.say(f"starting Triton: {argv[0]}")

        def on_line(line: str) -> None:
            _show(line, options.verbose, console)

        server = ServerProcess(argv, env, shm_prefix, on_line)
        try:
            return _supervise(server, config, options, console, stop)
        finally:
            server.kill()


def effective_config(options: Options, run_dir: Path) -> ServeConfig:
    """The config with the command line's overrides. They reach the model's process as a TOML in `run_dir`."""
    config = ServeConfig.from_toml(options.config, options.overrides)
    if not options.overrides:
        return config
    written = run_dir / config.config_path.name
    written.write_text(render_toml(config.as_tree()), encoding="utf-8")
    return ServeConfig.from_toml(written)


def ready_text(config: ServeConfig) -> str:
    """The ready line and two commands that work when pasted."""
    base = f"http://{http_probe.url_host(config.host)}:{config.http_port}/v2/models"
    request = {"text_input": PROMPT, "max_tokens": 20}
    whole, stream = json.dumps(request), json.dumps({**request, "stream": True})
    return "\n".join(
        [
            f"ready: HTTP {config.http_port}, gRPC {config.grpc_port}, metrics {config.metrics_port} on {config.host}. "
            "Ctrl-C drains and stops.",
            f"  curl -s {base}/ensemble/generate -d '{whole}'",
            f"  curl -sN {base}/deepseek_v3/generate_stream -d '{stream}'",
        ]
    )


def _doctor_passes(options: Options, config: ServeConfig, console: Console) -> bool:
    findings = doctor.examine(config)
    notable = [finding for finding in findings if finding.status != "ok"]
    if notable:
        print(doctor.report(notable), flush=True)
    failed = doctor.exit_code(findings) != 0
    outcome = "failed: see above" if failed else f"{len(findings)} checks, {len(notable)} warnings"
    console.say(f"doctor: {outcome} ({options.config})")
    return not failed


def _show(line: str, verbose: bool, console: Console) -> None:
    progress = progress_of(line)
    if verbose:
        print(line, flush=True)
    elif progress is not None:
        level, text = progress
        label = {"W": "warning: ", "E": "error: ", "F": "fatal: "}.get(level, "")
        console.say(f"{label}{text}")


def _supervise(
    server: ServerProcess, config: ServeConfig, options: Options, console: Console, stop: StopRequest
) -> int:
    """Wait for readiness, then for a signal or the server's end."""
    deadline = time.monotonic() + options.start_timeout_s
    while not stop.event.is_set() and not http_probe.is_ready(config):
        if server.exit_code() is not None:
            return _report_death(server, options.config, "ended while it started")
        if time.monotonic() > deadline:
            return _report_death(server, options.config, f"was not ready after {options.start_timeout_s:g} s")
        stop.event.wait(_POLL_S)
    if not stop.event.is_set():
        console.say("Triton is ready; generating one token")
        failure = http_probe.generate_failure(config, PROMPT)
        if failure is not None:
            return _report_death(server, options.config, f"answers health, but not a request: {failure}")
        console.say(ready_text(config))
    heart = Heartbeat(lambda: http_probe.engine_heartbeats(config))
    while not stop.event.is_set():
        if server.exit_code() is not None:
            return _report_death(server, options.config, "died")
        if not heart.beats():
            what = f"has an engine without a heartbeat for {HEARTBEAT_LIMIT_S:g} s"
            return _report_death(server, options.config, what)
        stop.event.wait(_POLL_S)
    return _drain(server, console, stop)


def _drain(server: ServerProcess, console: Console, stop: StopRequest) -> int:
    """Stop in a thread of its own, so that a second signal can kill."""
    console.say(f"stopping: live streams have {EXIT_TIMEOUT_S} s to end; signal again to kill")
    result: list[bool] = []
    stopper = threading.Thread(target=lambda: result.append(server.stop(_DRAIN_S)), name="drain")
    stopper.start()
    while stopper.is_alive():
        if stop.count > 1:
            server.kill()
        stopper.join(_POLL_S)
    clean = result == [True] and stop.count == 1
    console.say("stopped" if clean else "stopped by force")
    return 0 if clean else 1


def _report_death(server: ServerProcess, config: Path, what: str) -> int:
    """What a person needs who sees the server gone: the lines that matter, and where to look."""
    code = server.exit_code()
    server.kill()
    lines = server.last_lines()
    notable = [shown[1] for line in lines if (shown := progress_of(line)) is not None and shown[0] != "I"]
    print(
        f"nmoe: tritonserver {what}{'' if code is None else f' (exit code {code})'}. Its last lines:", file=sys.stderr
    )
    for text in (notable or lines)[-_REPORTED_LINES:]:
        print(textwrap.indent(text, "  "), file=sys.stderr)
    print(
        f"Check the machine with `nmoe doctor --config {config}`, and see docs/runbook.md for the message above; "
        "--verbose prints everything that the server says.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
