"""The load benchmark on a small model of the same form, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nmoe_backend import models
from nmoe_backend.models.checkpoint import Checkpoint, hub_files
from perf import bench_load as bench

SIZES = {"hidden_size": 256, "vocab_size": 512, "moe_intermediate_size": 128, "intermediate_size": 256}
SIZES |= {"num_attention_heads": 2, "q_lora_rank": 128}


def test_both_worlds_are_loaded_checked_and_written(tmp_path: Path) -> None:
    argv = ["--gb", "0.02", "--device", "cpu", "--rounds", "1", "--commit", "abc", "--sizes", json.dumps(SIZES)]
    assert bench.main([*argv, "--folder", str(tmp_path), "--output", str(tmp_path / "load.json")]) == 0
    made = json.loads((tmp_path / "load.json").read_text())
    one, eight = made["results"]
    assert (one["ranks"], eight["ranks"]) == (1, 8)
    assert 0.02 <= one["gb"] < eight["gb"] < 8 * one["gb"]  # replicated tensors are read by every rank
    assert set(made["goals"]) == {"load_one_rank", "load_eight_ranks"}
    assert made["goals"]["load_one_rank"]["commit"] == "abc"
    assert [path.name for path in tmp_path.iterdir()] == ["load.json"]


def test_weights_that_are_not_the_files_end_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "FILE_BYTES", 3e6)
    bench.write_checkpoint(tmp_path, 0.02, SIZES)
    checkpoint = Checkpoint(tmp_path, models.load_spec(tmp_path))
    _, read, weights = bench.load(checkpoint, 2, "cpu")
    files = hub_files(tmp_path)
    assert len(files) > 3 and read < 2 * sum(file.stat().st_size for file in files)
    assert bench.check(checkpoint, weights) == len(files)
    weights[0]["norm.weight"] = torch.zeros_like(weights[0]["norm.weight"])
    weights[0]["embed.weight"].zero_()
    with pytest.raises(SystemExit, match="is not what .*safetensors holds"):
        bench.check(checkpoint, weights)
