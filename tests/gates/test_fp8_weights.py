"""A model whose fp8 weights stay fp8 in memory: logits of the dequantised one, and the bytes that the budget says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nmoe_backend import memory, models, warmup
from nmoe_backend.convert import convert
from nmoe_backend.layers.table import hopper_misfit
from nmoe_backend.models.checkpoint import Checkpoint
from nmoe_backend.parallel.ranks import RankGroup
from nmoe_backend.runtime.kv_cache import KVCache
from nmoe_backend.runtime.weights import load_rank_weights
from scripts.make_tiny_checkpoint import PRESETS, make_checkpoint
from tests.gates.replica import Driver, Generated, Replica, weight_bytes_of
from tests.generation import serve_config

WORLD = 2  # of the converted forms


@pytest.fixture(scope="module")
def fp8_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Path]]:
    """name -> fp8 checkpoint, in the hub's form and, with "-sharded", for two ranks. Not to be changed.

    In `ragged` most sizes lie between one block of 128 and two; in `tiny` all lie below one block.
    """
    root = tmp_path_factory.mktemp("fp8")
    sizes = {"hidden_size": 192, "intermediate_size": 264, "moe_intermediate_size": 160, "q_lora_rank": 136}
    ragged = replace(PRESETS["tiny"], **sizes, kv_lora_rank=144, v_head_dim=40, n_shared_experts=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "ragged", ragged)
        made = {name: make_checkpoint(root / name, preset=name, dtype="fp8") for name in ("tiny", "ragged", "slim")}
    for name in ("tiny", "ragged"):
        made[f"{name}-sharded"] = root / f"{name}-sharded"
        convert(made[name], made[f"{name}-sharded"], WORLD)
    yield made


def _generate(path: Path, world_size: int, keep_quantized: bool, **replica_options: object) -> list[Generated]:
    replica = Replica(path, world_size, keep_quantized=keep_quantized, **replica_options)
    prompts = [list(range(40, 75)), [5, 6, 7], [9]]
    results = Driver(replica).generate(prompts, num_tokens=4, chunk=20)
    replica.close()
    return results


def _assert_same(kept: list[Generated], dequantized: list[Generated]) -> None:
    for ours, other in zip(kept, dequantized, strict=True):
        assert ours.tokens == other.tokens
        assert torch.equal(ours.logits, other.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("name", ["tiny", "ragged"])
def test_kept_weights_give_bit_for_bit_the_logits_of_dequantised_ones(fp8_checkpoints, name, world_size, dtype, device):
    options = {"dtype": dtype, "device": device}
    kept = _generate(fp8_checkpoints[name], world_size, True, **options)
    _assert_same(kept, _generate(fp8_checkpoints[name], world_size, False, **options))


def test_kept_weights_of_deepseeks_head_geometry_give_the_logits_of_dequantised_ones(fp8_checkpoints):
    """On a CPU; a Hopper GPU multiplies this geometry in fp8 (test_decode_sm90.py)."""
    options = {"dtype": torch.bfloat16, "device": "cpu"}
    kept = _generate(fp8_checkpoints["slim"], 1, True, **options)
    _assert_same(kept, _generate(fp8_checkpoints["slim"], 1, False, **options))


@pytest.mark.parametrize("name", ["tiny", "ragged"])
def test_both_forms_give_the_same_logits(fp8_checkpoints, name, device):
    sharded = _generate(fp8_checkpoints[f"{name}-sharded"], WORLD, True, device=device)
    _assert_same(sharded, _generate(fp8_checkpoints[name], WORLD, True, device=device))


def _rank_of_a_gpu(path: Path, rank: int, world_size: int) -> dict[str, Tensor]:
    """What a rank on a GPU loads, on the CPU."""
    ranks = {"rank": rank, "world_size": world_size}
    checkpoint = Checkpoint(path, models.load_spec(path))
    return load_rank_weights(checkpoint, **ranks, device="cpu", dtype=torch.bfloat16, keep_quantized=True)


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("name", ["tiny", "slim"])
@pytest.mark.parametrize("device_name", ["cuda", "cpu"])
def test_the_budget_says_what_the_warm_up_loads(fp8_checkpoints, tmp_path, name, world_size, device_name):
    """Weights within 1 %, exchange buffers and pages to the byte; what warmup builds for a GPU, on the CPU."""
    path = fp8_checkpoints[name]
    config = serve_config(tmp_path, path, world_size, device=device_name, dtype="auto")
    dims, spec = memory.model_dims(config), models.load_spec(path)
    contexts = RankGroup.create(world_size, ["cpu"] * world_size, 1.0)
    load = partial(load_rank_weights, Checkpoint(path, spec))
    model = warmup._load_model(config, config.replicas[0], spec, contexts[-1], torch.bfloat16, load)
    buffers = contexts[-1]._group.buffers[-1]["rdep"]
    assert memory.weight_bytes(config, dims, world_size) == pytest.approx(weight_bytes_of(model), rel=0.01)
    exchanged = sum(tensor.nbytes for tensor in (buffers.payload, buffers.ids, buffers.weights, buffers.returned))
    misfit = hopper_misfit(spec, torch.bfloat16, device_name == "cuda")
    assert memory.runs_kernels(config, dims) == (not misfit)
    if misfit:  # otherwise a GPU has other buffers
        assert memory.transport_bytes(config, dims, world_size) == exchanged
    cache = KVCache(spec, 3, config.kv_layout.page_size, torch.bfloat16, torch.device("cpu"))
    assert 3 * memory.page_bytes(config, dims) == sum(layer.nbytes for layer in cache.layers)
