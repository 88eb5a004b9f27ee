"""`nmoe serve`: from a TOML to a Triton server that has answered one request, and back to nothing.

Stages, each printed with its time: doctor, starting Triton (the model's own stages come through as it reports them),
one generated token, ready. Then it stays in front of the server, passes warnings and errors through, and on Ctrl-C or
SIGTERM drains it. A second signal kills it. Either way no process, port or shared-memory region stays behind.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nmoe_backend import doctor, http_probe
from nmoe_backend.config import ServeConfig
from nmoe_backend.server_process import ServerProcess, is_event, progress_of
from nmoe_backend.supervisor import PROMPT, StopRequest, Supervisor
from nmoe_backend.supervisor_child import Console
from nmoe_backend.supervisor_control import ControlSocket
from nmoe_backend.toml_table import render_toml
from nmoe_backend.tritonserver import server_command
from nmoe_backend.types import ConfigError

_OVERRIDES = ("http_port", "grpc_port", "metrics_port", "openai_port", "host", "model_path", "torch_extensions_dir")
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
        if not (options.repository / "deepseek_v3" / "config.pbtxt").is_file():
            raise ConfigError(
                f"{options.repository} is not our model repository (no deepseek_v3/config.pbtxt). "
                "Run from a source tree, or pass --model-repository."
            )
        with ControlSocket(config.http_port) as control:
            code = _serve(options, config, Supervisor(config, options.config, console, stop, control), console)
            control.tell(code)
            return code


def _serve(options: Options, config: ServeConfig, supervisor: Supervisor, console: Console) -> int:
    if not _doctor_passes(options, config, console):
        return 1

    def start_server() -> ServerProcess:
        shm_prefix = f"nmoe_{uuid.uuid4().hex[:12]}_"
        argv, env = server_command(config, options.repository, options.server_flags, shm_prefix)
        console.say(f"starting Triton: {argv[0]}")
        return ServerProcess(argv, env, shm_prefix, lambda line: _show(line, options.verbose, console))

    return supervisor.run(start_server, options.start_timeout_s, ready_text(config))


def effective_config(options: Options, run_dir: Path) -> ServeConfig:
    """The config with the command line's overrides, written to `run_dir` for the children.

    A child that is restarted reads the same settings as before, whatever has happened to the TOML meanwhile.
    """
    config = ServeConfig.from_toml(options.config, options.overrides)
    written = run_dir / config.config_path.name
    written.write_text(render_toml(config.as_tree()), encoding="utf-8")
    return ServeConfig.from_toml(written)


def ready_text(config: ServeConfig) -> str:
    """The ready line and two commands that work when pasted."""
    host = f"http://{http_probe.url_host(config.host)}"
    base = f"{host}:{config.http_port}/v2/models"
    request = {"text_input": PROMPT, "max_tokens": 20}
    whole, stream = json.dumps(request), json.dumps({**request, "stream": True})
    ports = f"HTTP {config.http_port}, gRPC {config.grpc_port}, metrics {config.metrics_port}"
    commands = [
        f"  curl -s {base}/ensemble/generate -d '{whole}'",
        f"  curl -sN {base}/deepseek_v3/generate_stream -d '{stream}'",
    ]
    if config.openai.workers:
        ports += f", OpenAI {config.openai_port}"
        chat = {"model": config.model_name, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 20}
        url = f"{host}:{config.openai_port}/v1/chat/completions"
        key = " -H 'Authorization: Bearer KEY'" if config.openai.api_keys else ""
        commands.append(f"  curl -s {url}{key} -H 'Content-Type: application/json' -d '{json.dumps(chat)}'")
        commands.append(f"  chat page: {host}:{config.openai_port}/")
    return "\n".join([f"ready: {ports} on {config.host}. Ctrl-C drains and stops.", *commands])


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
    """A line of tritonserver or of its models. Events stay JSON: who collects the log reads them without a rule."""
    progress = progress_of(line)
    if verbose or is_event(line):
        console.show(line)
    elif progress is not None:
        level, text = progress
        label = {"W": "warning: ", "E": "error: ", "F": "fatal: "}.get(level, "")
        console.say(f"{label}{text}")


if __name__ == "__main__":
    sys.exit(main())
