"""What cannot run on a machine is refused by the load itself, before a byte is allocated, doctor or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nmoe_backend import memory, preflight, warmup
from nmoe_backend.config import ServeConfig
from nmoe_backend.preflight import Gpu, GpuFacts
from nmoe_backend.types import ConfigError
from tests.model_folder import DEEPSEEK_V3, write_model_folder, write_toml

GB = memory.GB
HOPPER = (9, 0)


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes on to build ranks fails the test."""

    def build_workers(*_args: object) -> None:
        raise AssertionError("ranks were built")

    monkeypatch.setattr(warmup, "build_workers", build_workers)


def config_for(folder: Path, head: str = "", gpus: str = "[0, 1]") -> ServeConfig:
    model = write_model_folder(folder / "model", DEEPSEEK_V3)
    head = f'device = "cuda"\nload_format = "dummy"\nmax_batch_size = 8\nmax_prefill_tokens = 512\n{head}'
    return ServeConfig.from_toml(write_toml(folder / "c.toml", model, head, gpus=gpus))


FACTS = {
    "two GPUs of eight": (HOPPER, 150, (), r"weights .*Free \d+\.\d\d GB a rank"),
    "no peer access": (HOPPER, 1000, ((0, 1),), r"cannot reach each other: \[\(0, 1\)\].*nvidia-smi topo"),
    "another architecture": ((12, 0), 1000, (), r"compute capability 12\.0, the kernels for this model need 9\.0"),
}


@pytest.mark.parametrize("case", FACTS)
def test_a_machine_that_does_not_fit_ends_the_load_at_once(case, tmp_path, monkeypatch, untouched):
    capability, size, blocked, words = FACTS[case]
    gpu = Gpu(name="a GPU", capability=capability, free=size * GB, total=size * GB)
    facts = GpuFacts(driver="580.65.06", cuda_build="13.0", num_gpus=2, gpus={0: gpu, 1: gpu}, no_peer_access=blocked)
    monkeypatch.setattr(preflight, "measure", lambda _ordinals: facts)
    with pytest.raises(ConfigError, match=rf"(?s){words}"):
        warmup.start(config_for(tmp_path), progress=lambda line: None)


def test_roles_that_cannot_be_split_end_the_load(tmp_path, untouched):
    model = write_model_folder(tmp_path / "model")
    tables = 'role = "prefill"\n[[replicas]]\nreplica_id = 1\ngpus = [2, 3]\nrole = "decode"'
    config = ServeConfig.from_toml(write_toml(tmp_path / "c.toml", model, tables=tables))
    with pytest.raises(ConfigError, match='decode and prefill; .*Use role = "both"'):
        warmup.start(config, progress=lambda line: None)


@pytest.mark.gpu
def test_deepseek_v3_on_one_gpu_is_refused_with_nothing_allocated(tmp_path, untouched):
    config = config_for(tmp_path, gpus="[0]")
    torch.cuda.init()
    held = torch.cuda.memory_reserved(0)
    with pytest.raises(ConfigError, match=r"GB a rank hold 0 KV pages beside the rest \(weights 6\d\d\.\d\d"):
        warmup.start(config, progress=lambda line: None)
    assert torch.cuda.memory_reserved(0) == held


@pytest.mark.gpu
def test_facts_of_the_machines_gpus_are_the_same_from_another_process():
    here, apart = preflight.measure([0]), preflight.measure_apart([0])
    assert here.num_gpus == apart.num_gpus >= 1
    assert here.gpus[0].name == apart.gpus[0].name and here.gpus[0].total == apart.gpus[0].total
    assert here.gpus[0].capability == apart.gpus[0].capability
