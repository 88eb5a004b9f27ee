"""Does a config fit a machine? Each check judges what it is handed; `require_machine` is what the load asks first."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nmoe_backend import environ, memory, preflight
from nmoe_backend.config import ServeConfig
from nmoe_backend.findings import Finding
from nmoe_backend.preflight import Gpu, GpuFacts
from nmoe_backend.types import ConfigError
from tests.model_folder import DEEPSEEK_V3, write_model_folder, write_toml

GB = memory.GB
H200 = Gpu(name="NVIDIA H200", capability=(9, 0), free=150 * GB, total=150 * GB)
EIGHT = "[0, 1, 2, 3, 4, 5, 6, 7]"


def node(*gpus: Gpu, **facts: object) -> GpuFacts:
    """A machine with these GPUs and a good driver."""
    good = {"driver": "580.65.06", "cuda_build": "13.0", "num_gpus": len(gpus), "gpus": dict(enumerate(gpus))}
    return GpuFacts(**{**good, **facts})  # type: ignore[arg-type]


NODE = node(*[H200] * 8)


def production(tmp_path: Path, head: str = "max_seq_len = 32768") -> tuple[ServeConfig, memory.ModelDims]:
    folder = write_model_folder(tmp_path / "model", DEEPSEEK_V3)
    path = write_toml(tmp_path / "c.toml", folder, f'device = "cuda"\nmax_batch_size = 256\n{head}', gpus=EIGHT)
    config = ServeConfig.from_toml(path)
    return config, memory.model_dims(config)


@pytest.fixture
def tiny(tmp_path: Path) -> ServeConfig:
    return ServeConfig.from_toml(write_toml(tmp_path / "c.toml", write_model_folder(tmp_path / "model")))


def statuses(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.status for finding in findings}


def assert_fails(finding: Finding, got: str, remedy: str) -> None:
    assert finding.status == "fail"
    assert re.search(got, finding.message), finding.message
    assert re.search(remedy, finding.remedy), finding.remedy


def test_ranks_on_the_cpu_share_the_hosts_memory(tiny: ServeConfig) -> None:
    dims = memory.model_dims(tiny)
    need = memory.memory_budget(tiny, dims, tiny.replicas[0], 2).total
    total = 1000 * GB
    reserved = round(total * (1 - tiny.gpu_memory_utilization))
    enough = preflight.check_host_memory(tiny, dims, (total, reserved + 2 * need + 2))
    assert statuses(enough) == {"memory[0]": "ok", "kv_capacity[0]": "ok"}
    assert preflight.check_host_memory(tiny, dims, (total, reserved + 2 * need - 2))[0].status == "fail"


def test_eight_h200_hold_deepseek_v3(tmp_path: Path) -> None:
    config, dims = production(tmp_path)
    findings = preflight.check_gpus(config, dims, NODE)
    assert set(statuses(findings).values()) == {"ok"}
    capacity = next(finding for finding in findings if finding.name == "kv_capacity[0]")
    assert re.search(r"hold \d+ x 2048 or \d+ x 8192 or \d+ x 32768 tokens", capacity.message)
    budget = next(finding for finding in findings if finding.name == "memory[0]")
    assert re.search(r"weights 10[12]\.\d\d \+ kv_cache .* GB a rank, available 138\.00 GB", budget.message)


def test_a_gpu_too_small_says_how_much_is_missing(tmp_path: Path) -> None:
    config, dims = production(tmp_path)
    small = dataclasses.replace(H200, free=80 * GB, total=80 * GB)
    finding = preflight.check_gpu_memory(config, dims, node(*[small] * 8))[0]
    assert_fails(finding, "hold 0 KV pages", r"Free \d+\.\d\d GB a rank")


def test_too_many_pages_for_the_memory_fail(tmp_path: Path) -> None:
    config, dims = production(tmp_path, "num_pages = 20000")
    finding = preflight.check_gpu_memory(config, dims, NODE)[0]
    assert_fails(finding, r"kv_cache 89\.95 .* GB a rank, available 138", "lower num_pages")


def test_memory_that_others_hold_is_named(tmp_path: Path) -> None:
    config, dims = production(tmp_path)
    busy = dataclasses.replace(H200, free=140 * GB)
    findings = preflight.check_gpu_memory(config, dims, node(busy, *[H200] * 7))
    assert statuses(findings)["gpu_in_use"] == "warn"


def like_h200(**changes: object) -> list[Gpu]:
    """Eight GPUs, an H200 but for the changes."""
    return [dataclasses.replace(H200, **changes)] * 8  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def this_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environ, "export", lambda name, value: None)


BAD_NODES = {
    "no driver": (node(driver=None), "driver", "no NVIDIA driver", "--gpus all"),
    "old driver": (
        node(*[H200] * 8, driver="550.54.15"),
        "driver",
        r"550.54.15, torch's CUDA 13.0 needs >= 580",
        "Upd",
    ),
    "cpu torch": (node(cuda_build=None), "gpus", "sees no GPU", r"requirements/gpu\.lock"),
    "no device": (node(), "gpus", "sees no GPU", 'device = "cpu"'),
    "four": (node(*[H200] * 4), "gpus", r"name gpus \[4, 5, 6, 7\], the machine has 4", "CUDA_VISIBLE_DEVICES"),
    "no peers": (node(*[H200] * 8, no_peer_access=((0, 1),)), "peer_access", r"\(0, 1\)", "nvidia-smi topo"),
    "old gpu": (node(*like_h200(capability=(8, 0))), "capability", r"capability 8\.0, .* need 9\.0", "Hopper"),
    "new gpu": (node(*like_h200(capability=(10, 0))), "capability", r"capability 10\.0, .* need 9\.0", "Hopper"),
    "too small": (node(*like_h200(free=80 * GB, total=80 * GB)), "memory[0]", "hold 0 KV pages", r"Free \d+\.\d\d GB"),
}


@pytest.mark.parametrize("case", BAD_NODES)
def test_a_gpu_node_that_cannot_serve_says_why(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the doctor's findings, and in the error that ends a load."""
    facts, name, got, remedy = BAD_NODES[case]
    config, dims = production(tmp_path)
    found = {finding.name: finding for finding in preflight.check_gpus(config, dims, facts)}
    assert_fails(found[name], got, remedy)
    monkeypatch.setattr(preflight, "measure", lambda _ordinals: facts)
    monkeypatch.setattr(environ, "export", lambda _name, _value: None)  # what follows runs in this process
    with pytest.raises(ConfigError, match=rf"(?s){got}.*{remedy}"):
        preflight.require_machine(config)


def test_a_load_names_everything_that_is_wrong_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = production(tmp_path, "num_pages = 20000")
    asked = []
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(environ, "export", lambda name, value: asked.append({name: value}))
    monkeypatch.setattr(preflight, "measure", lambda ordinals: asked.append(ordinals) or facts)
    facts = node(*like_h200(capability=(8, 9)), no_peer_access=((2, 5), (5, 2)))
    with pytest.raises(
        ConfigError, match=r"(?s)capability 8\.9.*\(2, 5\), \(5, 2\).*kv_cache 89\.95 .*lower num_pages"
    ):
        preflight.require_machine(config)
    facts = node(*[H200] * 8)
    preflight.require_machine(dataclasses.replace(config, num_pages=0))
    kernels = {"TRITON_CACHE_DIR": str(config.torch_extensions_dir / "kernels")}
    assert asked == [{"CUDA_MODULE_LOADING": "EAGER"}, kernels, list(range(8))] * 2  # before CUDA starts


def test_a_load_on_a_cpu_asks_for_the_hosts_memory(tiny: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    preflight.require_machine(tiny)
    monkeypatch.setattr(memory, "host_memory_bytes", lambda: (2**20, 2**20))
    with pytest.raises(ConfigError, match=r"needs 2. Free \d+\.\d\d GB a rank"):
        preflight.require_machine(tiny)


def test_a_model_for_plain_torch_runs_on_newer_gpus_too(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    config = ServeConfig.from_toml(write_toml(tmp_path / "c.toml", folder, 'device = "cuda"', gpus="[1]"))
    dims = memory.model_dims(config)
    blackwell, ampere = (dataclasses.replace(H200, capability=it) for it in ((10, 0), (8, 0)))
    assert preflight.check_capability(config, dims, node(ampere, blackwell)).status == "ok"
    assert_fails(preflight.check_capability(config, dims, node(blackwell, ampere)), r"gpus \[1\].*8\.0", "Hopper")


def test_a_hidden_driver_is_no_failure_where_torch_sees_gpus() -> None:
    assert preflight.check_driver(node(H200, driver=None)).status == "warn"


def test_measured_in_another_process_the_facts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = node(H200, H200, no_peer_access=((0, 1), (1, 0)))

    def answer(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        assert command == [sys.executable, "-m", "nmoe_backend.preflight", "0", "1"]
        line = json.dumps(dataclasses.asdict(facts))
        return subprocess.CompletedProcess(command, 0, stdout=f"a library's notice\n{line}\n", stderr="")

    monkeypatch.setattr(subprocess, "run", answer)
    assert preflight.measure_apart([0, 1]) == facts


def test_a_driver_that_cannot_be_asked_is_an_error_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nRuntimeError: CUDA error 804\n")
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_options: failed)
    with pytest.raises(ConfigError, match="RuntimeError: CUDA error 804. Check the driver with nvidia-smi"):
        preflight.measure_apart([0])


def test_peers_outside_a_replica_do_not_matter(tmp_path: Path) -> None:
    config, _ = production(tmp_path)
    assert preflight.check_peers(config, dataclasses.replace(NODE, no_peer_access=((0, 8),))).status == "ok"


def test_the_drivers_version_is_read_from_its_banner() -> None:
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)  Sun\n"
    assert preflight.driver_version(text) == "580.65.06"
    assert preflight.driver_version("nothing") is None
