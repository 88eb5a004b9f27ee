"""The console command `nmoe`: each subcommand is a module that is imported only when it is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from nmoe_backend.types import NmoeError

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "serve": ("nmoe_backend.launch", "serve a TOML through Triton"),
        "drain": ("nmoe_backend.supervisor_control", "let a running `nmoe serve` finish what it has begun, and end it"),
        "api": ("nmoe_backend.api.server", "OpenAI's API in front of a Triton, on this host or another"),
        "top": ("nmoe_backend.top", "what servers do right now, in a terminal"),
        "doctor": ("nmoe_backend.doctor", "check this machine against a TOML"),
        "bench": ("nmoe_backend.bench", "measure this machine's GPUs against the project's goals (source tree only)"),
        "convert": ("nmoe_backend.convert", "write a checkpoint in the nmoe-sharded form"),
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `nmoe <command> ...`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: nmoe <command> [options]\n")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:<8} {text}")
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        print(f"nmoe: {arguments[0]!r} is not a command, needs one of: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[arguments[0]][0])
    try:
        return int(module.main(arguments[1:]))
    except NmoeError as error:
        print(f"nmoe {arguments[0]}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
