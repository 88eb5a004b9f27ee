"""CI definitions: GitHub's schema, zizmor's security audits, and that what they run exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from perf.regression import main as regression, regressions
from tests.deploy.manifests import OVERLAYS, ROOT, TOOLS

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def commands() -> list[str]:
    """Every line that a workflow runs."""
    lines = []
    for path in WORKFLOWS:
        jobs: dict[str, Any] = yaml.safe_load(path.read_text())["jobs"]
        for job in jobs.values():
            lines += [line.strip() for step in job["steps"] for line in str(step.get("run", "")).splitlines()]
    return lines


def test_what_the_workflows_run_exists() -> None:
    text = "\n".join(commands())
    for name in set(re.findall(r"(?<![\w/.])scripts/[\w.]+", text)):
        assert (ROOT / name).exists(), name
    for module, arguments in re.findall(r"-m (perf\.\w+)([^\n]*)", text):
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        source += (ROOT / "perf" / "bench_streaming.py").read_text()  # whose options bench_api has too
        for option in re.findall(r"--[\w-]+", arguments):
            assert f'"{option}"' in source, (module, option)
    for overlay in set(re.findall(r"overlays/([\w-]+)", text)):
        assert overlay in OVERLAYS


def test_no_job_runs_without_a_limit_and_none_has_rights_by_default() -> None:
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {}, path.name
        for name, job in workflow["jobs"].items():
            assert job["timeout-minutes"] > 0 and "permissions" in job, (path.name, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [["check-jsonschema", "--builtin-schema", "vendor.github-workflows"], ["zizmor", "--offline", "--pedantic"]],
)
def test_schema_and_audits_pass(command: list[str]) -> None:
    program = TOOLS / command[0]
    assert program.exists(), f"{command[0]} is not set up. Run scripts/_tools, or scripts/test --all."
    done = subprocess.run(
        [str(program), *command[1:], *map(str, WORKFLOWS)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def entry(value: float, unit: str) -> dict[str, Any]:
    return {"value": value, "unit": unit, "commit": "abc"}


def test_a_regression_is_a_longer_time_or_a_lower_rate() -> None:
    baseline = {"time": entry(10, "ms"), "rate": entry(100, "tokens/s"), "gone": entry(1, "ms"), "prose": {"text": "x"}}
    failures = {"soak": entry(0, "tokens lost")}
    assert regressions(failures, failures, 5.0) == []
    assert len(regressions(failures, {"soak": entry(1, "tokens lost")}, 5.0)) == 1
    better = {"time": entry(8, "ms"), "rate": entry(130, "tokens/s"), "gone": entry(1.04, "ms")}
    assert regressions(baseline, better, 5.0) == []
    worse = regressions(baseline, {"time": entry(10.6, "ms"), "rate": entry(94, "tokens/s")}, 5.0)
    assert [line.partition(":")[0] for line in worse] == ["time", "rate", "gone"]


def test_percentages_are_compared_by_points_and_idle_time_is_better_short() -> None:
    baseline = {"P4": entry(98.0, "% of the engine alone"), "P7": entry(1.0, "% idle")}
    assert regressions(baseline, {"P4": entry(93.5, "% of the engine alone"), "P7": entry(5.9, "% idle")}, 5.0) == []
    assert regressions(baseline, {"P4": entry(104.0, "% of the engine alone"), "P7": entry(0.0, "% idle")}, 5.0) == []
    worse = regressions(baseline, {"P4": entry(92.5, "% of the engine alone"), "P7": entry(6.2, "% idle")}, 5.0)
    assert [line.partition(":")[0] for line in worse] == ["P4", "P7"]


def test_the_nightly_comparison_fails_on_a_regression(tmp_path: Path) -> None:
    baseline, run = tmp_path / "baseline.json", tmp_path / "run.json"
    baseline.write_text('{"P8": {"value": 2.0, "unit": "ms", "commit": "abc"}}')
    run.write_text('{"P8": {"value": 2.05, "unit": "ms", "commit": "def"}}')
    assert regression([str(baseline), str(run)]) == 0
    assert regression([str(baseline), str(run), "--percent", "1"]) == 1


KUBECTL = """#!/bin/bash
echo "$*" >> {log}
case "$1 $2" in
"kustomize "*) printf 'kind: Deployment\\nimage: registry.example.com/nmoe:latest\\n' ;;
"apply "*) cat >> {log} ;;
"get "*) printf 'service/nmoe\\ndeployment.apps/nmoe-endpoint-picker-latency\\ndeployment.apps/nmoe-latency\\n' ;;
esac
case "$*" in *"rollout status"*) exit {rollout} ;; esac
"""


@pytest.mark.parametrize("rollout", [0, 1])
def test_deploy_applies_one_image_by_digest_and_takes_back_what_does_not_come_up(tmp_path: Path, rollout: int) -> None:
    log = tmp_path / "log"
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(KUBECTL.format(log=log, rollout=rollout))
    kubectl.chmod(0o755)
    image = "ghcr.io/example/nmoe@sha256:" + "0" * 64
    done = deploy(tmp_path, "apply", "overlay", image)
    assert (done.returncode == 0) is (rollout == 0), done.stderr
    said = log.read_text()
    assert f"image: {image}\n" in said and "registry.example.com" not in said
    assert "rollout status deployment.apps/nmoe-latency" in said and "endpoint-picker" not in said
    assert ("rollout undo deployment.apps/nmoe-latency" in said) is (rollout == 1)


def test_deploy_refuses_an_image_without_a_digest(tmp_path: Path) -> None:
    done = deploy(tmp_path, "apply", "overlay", "ghcr.io/example/nmoe:latest")
    assert done.returncode == 1 and "names no digest" in done.stderr


def deploy(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """scripts/deploy with the programs of `folder` first on PATH."""
    env = {"PATH": f"{folder}:/usr/bin:/bin"}
    command = [str(ROOT / "scripts" / "deploy"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
