"""A real Prometheus over a live server, and configs/deploy's rules and dashboard as it gets them: in a test's time."""

from __future__ import annotations

import json
import re
import shutil
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nmoe_backend.server_process import ChildProcess
from tests.deploy.manifests import ROOT
from tests.triton_server import free_ports
from tests.waiting import wait_until

RULES = ROOT / "configs" / "deploy" / "prometheus" / "alerts.yml"
DASHBOARD = ROOT / "configs" / "deploy" / "grafana" / "nmoe.json"
SCALE = 60  # a minute of the rules is a second of the test
SCRAPE_S = 0.25
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def shortened(rules: str) -> str:
    """The rules with every duration, of a window and of `for`, divided by SCALE."""

    def shorter(match: re.Match[str]) -> str:
        return f"{int(match[1]) * _UNITS[match[2]] * 1000 // SCALE}ms"

    in_brackets = re.sub(r"\[[^\]]*\]", lambda window: re.sub(r"(\d+)([smhd])", shorter, window[0]), rules)
    return re.sub(r"(?<=for: )(\d+)([smhd])", shorter, in_brackets)


def alerts(rules: str | None = None) -> dict[str, str]:
    """Name -> expression, as the file has it, or as `rules` have."""
    (group,) = yaml.safe_load(rules or RULES.read_text())["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def panels() -> dict[str, list[str]]:
    """Title -> expressions, with Grafana's variables filled in."""
    found = {}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        if panel["type"] != "row":
            texts = [target["expr"] for target in panel["targets"]]
            found[panel["title"]] = [
                text.replace("$__rate_interval", "5s").replace("$instance", ".*") for text in texts
            ]
    return found


class Prometheus:
    """One Prometheus that scrapes `targets` (job -> addresses) and evaluates the shortened rules. A context manager."""

    def __init__(self, folder: Path, targets: Mapping[str, Sequence[str]]) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self.lines: list[str] = []
        every = f"{int(SCRAPE_S * 1000)}ms"
        jobs = [
            {"job_name": job, "static_configs": [{"targets": list(addresses)}]} for job, addresses in targets.items()
        ]
        settings = {
            "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
            "rule_files": ["alerts.yml"],
            "scrape_configs": jobs,
        }
        (folder / "alerts.yml").write_text(shortened(RULES.read_text()))
        (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
        program = shutil.which("prometheus")
        assert program is not None, "prometheus is not installed. Run: apt-get install prometheus"
        self._argv = [
            program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}", "--query.lookback-delta=2s", "--log.level=warn",
        ]  # fmt: skip
        self._process: ChildProcess | None = None

    def __enter__(self) -> Prometheus:
        self._process = ChildProcess(self._argv, {"PATH": "/usr/bin:/bin"}, self.lines.append)
        wait_until(self._is_ready, "Prometheus is ready", 30.0)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None, "enter first"
        self._process.stop(20.0)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector."""
        result: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return result

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        return {one["labels"]["alertname"] for one in self._get("alerts")["alerts"] if one["state"] == "firing"}

    def broken_rules(self) -> list[str]:
        """Rules whose last evaluation failed."""
        (group,) = self._get("rules")["groups"]
        return [f"{rule['name']}: {rule.get('lastError')}" for rule in group["rules"] if rule["health"] == "err"]

    def _get(self, path: str, **values: str) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(values)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5):
                return True
        except OSError:
            return False
