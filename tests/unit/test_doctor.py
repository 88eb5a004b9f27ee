"""Each check judges what it is handed; every finding that is not fine carries a remedy."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
from pathlib import Path

import pytest

from nmoe_backend import doctor, doctor_checkpoint, doctor_host, preflight
from nmoe_backend.config import ServeConfig
from nmoe_backend.findings import Finding
from nmoe_backend.preflight import GpuFacts
from nmoe_backend.safetensors_header import encode_header
from tests.model_folder import write_model_folder, write_toml

GOOD_PACKAGES = {
    **dict.fromkeys(("safetensors", "tokenizers", "jinja2"), "1.0"),
    "numpy": "1.26.4",
    "torch": "2.11.0",
    "triton": "3.6.0",
}


@pytest.fixture
def tiny(tmp_path: Path) -> ServeConfig:
    return load(tmp_path)


def load(tmp_path: Path, head: str = "", **toml: str) -> ServeConfig:
    folder = write_model_folder(tmp_path / "model")
    head = f'torch_extensions_dir = "cache"\n{head}'
    return ServeConfig.from_toml(write_toml(tmp_path / "c.toml", folder, head, **toml))


def statuses(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.status for finding in findings}


def assert_fails(finding: Finding, got: str, remedy: str) -> None:
    assert finding.status == "fail"
    assert re.search(got, finding.message), finding.message
    assert re.search(remedy, finding.remedy), finding.remedy


@pytest.mark.parametrize(
    ("version", "status"), [((3, 11), "ok"), ((3, 12), "ok"), ((3, 10), "fail"), ((3, 13), "fail")]
)
def test_python_must_be_one_of_the_tested_ones(version: tuple[int, int], status: str) -> None:
    assert doctor_host.check_python(version).status == status


def test_numpy_2_fails_because_tensors_would_arrive_empty() -> None:
    findings = doctor_host.check_packages({**GOOD_PACKAGES, "numpy": "2.1.0"}, "cpu")
    assert_fails(findings[0], "2.1.0, needs < 2.*tensors arrive empty", "numpy<2")


def test_on_a_gpu_other_versions_than_the_measured_ones_are_named() -> None:
    assert set(statuses(doctor_host.check_packages(GOOD_PACKAGES, "cuda")).values()) == {"ok"}
    findings = doctor_host.check_packages({**GOOD_PACKAGES, "torch": "2.13.0", "triton": "3.7.1"}, "cuda")
    assert statuses(findings) == {"numpy": "ok", "torch": "warn", "triton": "warn"}
    assert "2.13.0; measured with 2.11" in findings[1].message
    assert statuses(doctor_host.check_packages({**GOOD_PACKAGES, "triton": None}, "cuda"))["triton"] == "fail"


def test_on_the_cpu_any_torch_will_do_and_triton_is_not_needed() -> None:
    findings = doctor_host.check_packages({**GOOD_PACKAGES, "torch": "2.13.0+cpu", "triton": None}, "cpu")
    assert statuses(findings) == {"numpy": "ok", "torch": "ok"}


def test_missing_packages_name_the_lock() -> None:
    findings = doctor_host.check_packages(dict.fromkeys(GOOD_PACKAGES), "cpu")
    assert statuses(findings) == {"numpy": "fail", "torch": "fail", "packages": "fail"}
    assert_fails(findings[-1], "safetensors, tokenizers, jinja2", r"requirements/cpu\.lock")


def test_a_missing_shard_is_named(tiny: ServeConfig) -> None:
    index = tiny.model_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors", "b": "gone.safetensors"}}))
    assert_fails(
        doctor_checkpoint.check_checkpoint(tiny)[0], "1 of 2 shards are missing .*: gone.safetensors", "Download"
    )


@pytest.mark.parametrize("kept", [0, 7, 30, -1])
def test_a_truncated_file_is_named(tiny: ServeConfig, kept: int) -> None:
    shard = tiny.model_path / "model-00001-of-00001.safetensors"
    whole = encode_header({"a": ("F32", (2, 2))}) + bytes(16)
    shard.write_bytes(whole[:kept])
    assert_fails(doctor_checkpoint.check_checkpoint(tiny)[0], shard.name, "fetch it again")
    shard.write_bytes(whole)
    assert doctor_checkpoint.check_checkpoint(tiny)[0].status == "ok"


def shard_for(folder: Path, world_size: int, ranks: range) -> None:
    for rank in ranks:
        (folder / f"model{rank}-mp{world_size}.safetensors").write_bytes(encode_header({}))


def test_the_sharded_form_needs_a_file_for_every_rank_and_the_replicas_world_size(tiny: ServeConfig) -> None:
    (tiny.model_path / "model.safetensors.index.json").unlink()
    shard_for(tiny.model_path, 4, range(4))
    assert_fails(doctor_checkpoint.check_checkpoint(tiny)[0], "for 4 ranks, the replica has 2", "--world 2")
    shard_for(tiny.model_path, 2, range(1))
    assert_fails(doctor_checkpoint.check_checkpoint(tiny)[0], "1 of 2 .*model1-mp2", "Download")
    shard_for(tiny.model_path, 2, range(2))
    assert doctor_checkpoint.check_checkpoint(tiny)[0].status == "ok"


def test_a_folder_with_both_forms_fails_as_it_does_at_load(tiny: ServeConfig) -> None:
    shard_for(tiny.model_path, 2, range(2))
    assert_fails(doctor_checkpoint.check_checkpoint(tiny)[0], "hub's form .* and an nmoe-sharded one", "of its own")


def test_a_folder_without_weights_or_tokenizer_fails(tiny: ServeConfig) -> None:
    (tiny.model_path / "model.safetensors.index.json").unlink()
    (tiny.model_path / "tokenizer.json").unlink()
    shards, tokenizer = doctor_checkpoint.check_checkpoint(tiny)
    assert_fails(shards, "has neither model.safetensors", "Point model_path")
    assert_fails(tokenizer, "cannot read .*tokenizer.json", "Copy tokenizer.json")


def test_a_benchmark_with_random_weights_needs_no_checkpoint(tiny: ServeConfig) -> None:
    findings = doctor_checkpoint.check_checkpoint(dataclasses.replace(tiny, load_format="dummy"))
    assert [finding.status for finding in findings] == ["ok"]


def test_a_tokenizer_that_is_no_json_fails(tiny: ServeConfig) -> None:
    (tiny.model_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    assert_fails(doctor_checkpoint.check_checkpoint(tiny)[1], "not valid JSON", "Copy tokenizer.json")


def test_a_broken_index_fails(tiny: ServeConfig) -> None:
    (tiny.model_path / "model.safetensors.index.json").write_text("[]")
    assert_fails(doctor_checkpoint.check_checkpoint(tiny)[0], "is not an index", "Fetch it again")


def test_a_port_in_use_fails_with_the_flag_that_changes_it(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert not doctor_host.port_is_free("127.0.0.1", port)
        findings = doctor_host.check_ports(load(tmp_path, f"grpc_port = {port}"), lambda _, p: p != port)
        assert_fails(findings[0], f"cannot listen on 127.0.0.1:{port}", "--grpc-port N")
    assert doctor_host.port_is_free("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])  # TEST-NET-1: nobody's address
def test_a_host_that_is_not_ours_is_one_finding_about_the_host(tmp_path: Path, host: str) -> None:
    findings = doctor_host.check_ports(load(tmp_path, f'host = "{host}"'), doctor_host.port_is_free)
    assert len(findings) == 1
    assert_fails(findings[0], f"cannot listen on any port of '{host}'", "127.0.0.1, or 0.0.0.0")


def test_a_taken_openai_port_fails_where_a_front_end_will_want_it(tiny: ServeConfig) -> None:
    def is_free(_host: str, port: int) -> bool:
        return port != tiny.openai_port

    assert_fails(doctor_host.check_ports(tiny, is_free)[0], str(tiny.openai_port), "--openai-port N")
    alone = dataclasses.replace(tiny, openai=dataclasses.replace(tiny.openai, workers=0))
    assert statuses(doctor_host.check_ports(alone, is_free)) == {"ports": "ok"}


@pytest.mark.parametrize(
    ("size_free", "status"),
    [(None, "fail"), ((64 << 20, 63 << 20), "fail"), ((128 << 20, 128 << 20), "warn"), ((1 << 30, 1 << 30), "ok")],
)
def test_shared_memory_must_hold_the_backends_regions(size_free: tuple[int, int] | None, status: str) -> None:
    finding = doctor_host.check_shared_memory(size_free)
    assert finding.status == status
    assert (status == "ok") or "--shm-size" in finding.remedy


def test_a_cache_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_fails(doctor_host.check_writable(tmp_path / "file" / "cache"), "cannot write", "torch_extensions_dir")
    assert doctor_host.check_writable(tmp_path / "cache").status == "ok"


def test_a_machine_without_a_gpu_passes_for_the_cpu_and_fails_for_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "measure_apart", lambda _ordinals: GpuFacts(driver=None, cuda_build=None))
    monkeypatch.setattr(doctor_host, "port_is_free", lambda _host, _port: True)
    load(tmp_path)
    assert doctor.main(["--config", str(tmp_path / "c.toml")]) == 0
    capsys.readouterr()
    load(tmp_path, 'device = "cuda"')
    assert doctor.main(["--config", str(tmp_path / "c.toml"), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    failed = {finding["name"]: finding for finding in answer["findings"] if finding["status"] == "fail"}
    assert failed["driver"]["remedy"] and failed["gpus"]["remedy"]


def test_a_config_that_does_not_load_is_a_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text("max_seq = 1\n")
    assert doctor.main(["--config", str(tmp_path / "c.toml")]) == 1
    output = capsys.readouterr().out
    assert "fail  config: " in output and "Did you mean 'max_seq_len'" in output and "-> Correct the TOML" in output


def test_a_model_config_that_memory_cannot_be_computed_from_is_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model_folder(tmp_path / "model", hidden_size="wide")
    write_toml(tmp_path / "c.toml", folder, 'torch_extensions_dir = "cache"')
    assert doctor.main(["--config", str(tmp_path / "c.toml")]) == 1
    assert "hidden_size is 'wide', needs an integer" in capsys.readouterr().out


def test_a_warning_is_no_failure() -> None:
    findings = [Finding("a", "ok", "fine"), Finding("b", "warn", "odd", "look")]
    assert doctor.exit_code(findings) == 0
    assert doctor.report(findings) == "  ok  a: fine\nwarn  b: odd\n      -> look"


def test_roles_that_warm_up_would_refuse_fail(tiny: ServeConfig) -> None:
    split = [dataclasses.replace(tiny.replicas[0], role=role) for role in ("prefill", "decode")]
    findings = doctor.examine(dataclasses.replace(tiny, replicas=tuple(split)))
    (finding,) = [finding for finding in findings if finding.name == "roles"]
    assert_fails(finding, "decode and prefill", 'role = "both"')
    assert "roles" not in statuses(doctor.examine(tiny))
