"""The memory budget agrees with the sizes that are known of DeepSeek-V3, and with counting by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from nmoe_backend import memory
from nmoe_backend.config import ServeConfig
from nmoe_backend.types import ConfigError
from tests.model_folder import DEEPSEEK_V3, TINY, write_model_folder, write_toml

EIGHT = "[0, 1, 2, 3, 4, 5, 6, 7]"


def load(
    tmp_path: Path, head: str, model: object = DEEPSEEK_V3, gpus: str = EIGHT
) -> tuple[ServeConfig, memory.ModelDims]:
    folder = write_model_folder(tmp_path / "model", model)  # type: ignore[arg-type]
    config = ServeConfig.from_toml(write_toml(tmp_path / "c.toml", folder, head, gpus=gpus), environment={"HOME": "/"})
    return config, memory.model_dims(config)


def test_deepseek_v3_in_fp8_on_eight_ranks_takes_about_102_gb_a_rank(tmp_path: Path) -> None:
    config, dims = load(tmp_path, 'device = "cuda"')
    assert memory.weight_bytes(config, dims, 8) / memory.GB == pytest.approx(102, abs=1)
    experts = dims.num_moe_layers * dims.n_routed_experts * dims.expert_params
    assert experts / 1e9 == pytest.approx(653.9, abs=0.1)


def test_a_cached_token_of_deepseek_v3_takes_70272_bytes(tmp_path: Path) -> None:
    config, dims = load(tmp_path, 'device = "cuda"')
    assert memory.kv_bytes_per_token(config, dims) == 70_272
    assert memory.page_bytes(config, dims) == 70_272 * 64


def test_float32_on_the_cpu_doubles_what_bfloat16_takes(tmp_path: Path) -> None:
    config, dims = load(tmp_path, 'dtype = "bfloat16"')
    wide, _ = load(tmp_path, 'dtype = "float32"')
    assert memory.kv_bytes_per_token(wide, dims) == 2 * memory.kv_bytes_per_token(config, dims)
    router = dims.num_moe_layers * dims.n_routed_experts * (dims.hidden_size + 1) * 4
    assert memory.weight_bytes(wide, dims, 8) - router == 2 * (memory.weight_bytes(config, dims, 8) - router)


def test_fp8_is_dequantised_on_the_cpu(tmp_path: Path) -> None:
    config, dims = load(tmp_path, "")
    assert memory.weight_bytes(config, dims, 8) > 190 * memory.GB


def test_more_ranks_split_the_experts_and_nothing_else(tmp_path: Path) -> None:
    config, dims = load(tmp_path, "", TINY)
    one, two = (memory.weight_bytes(config, dims, world) for world in (1, 2))
    assert one - two == 2 * 4 * 3 * 64 * 32 * 4  # moe layers x experts that moved x params x bytes


def test_num_pages_zero_fills_what_is_available_up_to_what_slots_can_use(tmp_path: Path) -> None:
    config, dims = load(tmp_path, 'device = "cuda"\nmax_seq_len = 32768\nmax_batch_size = 256')
    replica = config.replicas[0]
    page = memory.page_bytes(config, dims)
    fixed = memory.memory_budget(config, dims, replica, 0).total
    pages = memory.resolve_num_pages(config, dims, replica, available=fixed + 1000 * page + page // 2, loaded=False)
    assert pages == 1000
    assert memory.resolve_num_pages(config, dims, replica, available=10**15, loaded=False) == 256 * 512


def test_after_the_load_only_activations_and_graphs_are_still_to_come(tmp_path: Path) -> None:
    config, dims = load(tmp_path, 'device = "cuda"\nmax_seq_len = 4096')
    budget = memory.memory_budget(config, dims, config.replicas[0], 0)
    available = budget.activations + budget.graphs + 64 * memory.page_bytes(config, dims)
    assert memory.resolve_num_pages(config, dims, config.replicas[0], available=available, loaded=True) == 64


def test_a_gpu_too_small_is_an_error_that_says_how_much_is_missing(tmp_path: Path) -> None:
    config, dims = load(tmp_path, 'device = "cuda"\nmax_seq_len = 4096')
    with pytest.raises(ConfigError, match=r"80\.00 GB a rank hold 0 KV pages .*needs 64.* Free \d+\.\d+ GB"):
        memory.resolve_num_pages(config, dims, config.replicas[0], available=80 * memory.GB, loaded=False)


def test_contexts_shared_evenly_need_room_for_partial_sums(tmp_path: Path) -> None:
    """Two pieces of 128 heads for each of the 66 pairs of SMs, beside the pieces of 4,096 that every row has."""
    config, dims = load(tmp_path, 'device = "cuda"\nmax_seq_len = 32768\nmax_batch_size = 256')
    fast, _ = load(tmp_path, 'device = "cuda"\nmax_seq_len = 32768\nmax_batch_size = 256\ndeterministic = false')
    more = memory.activation_bytes(fast, dims, 8) - memory.activation_bytes(config, dims, 8)
    assert more == 66 * 2 * 128 * (512 + 1) * 4


def test_num_pages_of_the_toml_is_taken_as_it_is(tmp_path: Path) -> None:
    config, dims = load(tmp_path, "num_pages = 77")
    assert memory.resolve_num_pages(config, dims, config.replicas[0], available=0, loaded=False) == 77


def test_utilization_bounds_the_whole_device_and_not_the_free_part(tmp_path: Path) -> None:
    config, _ = load(tmp_path, "gpu_memory_utilization = 0.75")
    assert memory.available_bytes(config, free=100, total=100) == 75
    assert memory.available_bytes(config, free=40, total=100) == 15
    assert memory.available_bytes(config, free=10, total=100) == 0


def test_256_sequences_of_2100_tokens_need_8448_pages_of_64(tmp_path: Path) -> None:
    config, _ = load(tmp_path, "")
    assert memory.sequences_that_fit(config, 8448, 2100) == 256
    assert memory.sequences_that_fit(config, 8447, 2100) == 255


def test_a_config_without_a_size_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="moe_intermediate_size is missing"):
        load(tmp_path, "", {k: v for k, v in DEEPSEEK_V3.items() if k != "moe_intermediate_size"})
