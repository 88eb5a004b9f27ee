"""Preflight: can this machine run this TOML? Every finding says what was found and, unless it is fine, what to do.

Each check is a function of what was measured, so that a test can hand it any machine; `examine` measures. Torch is
imported in another process, and only for device = "cuda". The cache folder is made if it is missing, nothing else
changes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from nmoe_backend import doctor_checkpoint, doctor_host, memory, preflight
from nmoe_backend.config import ServeConfig
from nmoe_backend.findings import Finding, fail, ok
from nmoe_backend.types import ConfigError


def examine(config: ServeConfig) -> list[Finding]:
    """All checks for one config on this machine."""
    findings = [
        *preflight.check_roles(config),
        doctor_host.check_python(sys.version_info[:2]),
        *doctor_host.check_packages(doctor_host.package_versions(), config.device),
        doctor_host.check_server(config.torch_extensions_dir),
        *doctor_checkpoint.check_checkpoint(config),
        *doctor_host.check_ports(config, doctor_host.port_is_free),
        doctor_host.check_shared_memory(doctor_host.shared_memory_bytes()),
        doctor_host.check_writable(config.torch_extensions_dir),
    ]
    dims = memory.model_dims(config)
    if config.device == "cuda":
        facts = preflight.measure_apart(preflight.gpu_ordinals(config))
        return [*findings, preflight.check_cuda_settings(), *preflight.check_gpus(config, dims, facts)]
    return [*findings, *preflight.check_host_memory(config, dims, memory.host_memory_bytes())]


def load_and_examine(path: str | Path, overrides: dict[str, object]) -> list[Finding]:
    """Like `examine`, with a config that does not load as a finding of its own."""
    try:
        config = ServeConfig.from_toml(path, overrides)
        findings = examine(config)
    except ConfigError as error:
        return [fail("config", str(error), "Correct the TOML or the model folder as the message says.")]
    return [ok("config", f"{path}: {config.model_path.name} on {config.device}, {_ranks(config)}"), *findings]


def report(findings: Iterable[Finding]) -> str:
    """One line a finding, its remedy below it."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:>4}  {finding.name}: {finding.message}")
        if finding.remedy:
            lines.append(f"      -> {finding.remedy}")
    return "\n".join(lines)


def exit_code(findings: Iterable[Finding]) -> int:
    """1 when any check fails; a warning is no failure."""
    return int(any(finding.fails for finding in findings))


def main(argv: Sequence[str] | None = None) -> int:
    """`nmoe doctor --config X.toml [--json]`."""
    parser = argparse.ArgumentParser(prog="nmoe doctor", description="Check this machine against a configuration.")
    parser.add_argument("--config", "-c", required=True, metavar="X.toml")
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")
    arguments = parser.parse_args(argv)
    findings = load_and_examine(arguments.config, {})
    code = exit_code(findings)
    if arguments.json:
        print(json.dumps({"ok": code == 0, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print(report(findings))
    return code


def _ranks(config: ServeConfig) -> str:
    replicas = [f"{replica.world_size} ranks" for replica in config.replicas]
    return replicas[0] if len(replicas) == 1 else f"{len(replicas)} replicas of {', '.join(replicas)}"
