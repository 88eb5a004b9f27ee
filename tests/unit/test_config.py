"""A TOML is read strictly, completed from the model's files, and refused with got, need and do."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from nmoe_backend.config import ReplicaConfig, ServeConfig, engine_limits
from nmoe_backend.generation import GenerationDefaults
from nmoe_backend.toml_table import render_toml
from nmoe_backend.types import ConfigError
from tests.model_folder import DEEPSEEK_V3, TINY, write_model_folder, write_toml

CONFIGS = Path(__file__).parents[2] / "configs"
HOME = {"HOME": "/home/somebody"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model_folder(tmp_path / "model")


def load(model: Path, head: str = "", tables: str = "", gpus: str = "[0, 1]", **env: str) -> ServeConfig:
    path = write_toml(model.parent / "c.toml", model, head, tables, gpus)
    return ServeConfig.from_toml(path, environment={**HOME, **env})


@pytest.mark.parametrize("name", ["production", "benchmark_lmsys", "eval", "tiny"])
def test_every_shipped_config_loads(name: str, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model", TINY if name == "tiny" else DEEPSEEK_V3)
    config = ServeConfig.from_toml(CONFIGS / f"{name}.toml", environment={**HOME, "NMOE_MODEL_PATH": str(folder)})
    assert config.device == ("cpu" if name == "tiny" else "cuda")
    assert config.replicas == (ReplicaConfig(replica_id=0, gpus=tuple(range(8)), role="both"),)
    assert config.kv_layout.num_layers == (3 if name == "tiny" else 61)


def test_every_shipped_config_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.toml")} == {"production", "benchmark_lmsys", "eval", "tiny"}


def test_the_lmsys_config_states_its_batch(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model", DEEPSEEK_V3)
    path = CONFIGS / "benchmark_lmsys.toml"
    config = ServeConfig.from_toml(path, environment={**HOME, "NMOE_MODEL_PATH": str(folder)})
    workload = config.benchmark
    assert (workload["sequences_per_gpu"], workload["context_tokens"], workload["output_tokens"]) == (256, 2000, 100)
    assert config.max_batch_size == 256 and config.max_seq_len >= 2100


def test_shipped_configs_find_the_model_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "somewhere"
    write_model_folder(folder / "models" / "tiny")
    (folder / "configs").mkdir()
    copy = folder / "configs" / "tiny.toml"
    copy.write_text((CONFIGS / "tiny.toml").read_text())
    assert ServeConfig.from_toml(copy, environment=HOME).model_path == (folder / "models" / "tiny").resolve()


def test_omitted_keys_have_defaults(model: Path) -> None:
    config = load(model)
    assert config.exclude_input_in_output is True
    assert config.allow_stop_by_id is False
    assert (config.http_port, config.grpc_port, config.metrics_port, config.openai_port) == (8000, 8001, 8002, 9000)
    assert config.model_name == "model"
    assert config.num_pages == 0
    assert config.kv_layout.page_size == 64
    assert config.vocab_size == 512


def test_limits_follow_the_config(model: Path) -> None:
    limits = engine_limits(load(model), 99)
    assert (limits.num_ranks, limits.num_pages, limits.page_size, limits.vocab_size) == (2, 99, 64, 512)
    assert (limits.max_batch_size, limits.max_prefill_tokens, limits.max_seq_len) == (4, 64, 128)
    assert limits.eos_token_ids == (1,)


def test_variables_are_expanded_everywhere(model: Path) -> None:
    config = load(
        model, 'model_name = "${A}-${B:-two}"\nhttp_port = "${PORT:-8100}"', '[benchmark]\ndeep = {x = ["${A}"]}', A="1"
    )
    assert config.model_name == "1-two"
    assert config.http_port == 8100
    assert config.benchmark == {"deep": {"x": ["1"]}}


def test_a_variable_without_value_and_default_is_an_error(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"model_name.*NAME_OF_IT is not set.*\$\{NAME_OF_IT:-default\}"):
        load(model, 'model_name = "${NAME_OF_IT}"')


@pytest.mark.parametrize("text", ["${}", "${A B}", "${1A}"])
def test_a_malformed_variable_is_an_error(model: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="names no variable"):
        load(model, f'model_name = "{text}"')


BAD_KEYS = {
    "max_batch_sise = 4": ("c.toml: max_batch_sise is not a known key", "'max_batch_size'"),
    "openai_prt = 9000": ("openai_prt is not a known key", "'openai_port'"),
    "config_path = 'x'": ("config_path is not a known key", "Did you mean"),
}


@pytest.mark.parametrize("head", BAD_KEYS)
def test_an_unknown_key_names_the_nearest(model: Path, head: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(model, head)
    assert all(part in str(caught.value) for part in BAD_KEYS[head])


def test_an_unknown_key_of_a_table_names_the_nearest(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_layout\.pagesize is not a known key.*'page_size'"):
        load(model, tables="[kv_layout]\npagesize = 16")
    with pytest.raises(ConfigError, match=r"replicas\[0\]\.roles is not a known key.*'role'"):
        load(model, tables="roles = 'both'")


@pytest.mark.parametrize("line", ["http_port = 8000", "host = '0.0.0.0'", "max_batch_size = 8"])
def test_a_scalar_below_replicas_is_told_to_move_up(model: Path, line: str) -> None:
    key = line.split()[0]
    with pytest.raises(
        ConfigError, match=rf"replicas\[0\]\.{key} belongs to the top level.*Move '{key} = \.\.\.' above"
    ):
        load(model, tables=line)


BAD_VALUES = {
    "http_port = '8000'": "http_port is '8000', needs an integer",
    "http_port = 70000": "http_port is 70000, needs a value in 1..65535",
    "max_batch_size = 0": "max_batch_size is 0, needs a value >= 1",
    "max_batch_size = true": "max_batch_size is True, needs an integer",
    "max_batch_size = 1.5": "max_batch_size is 1.5, needs an integer",
    "itl_target_ms = 0": "itl_target_ms is 0, needs a value > 0",
    "itl_target_ms = nan": "itl_target_ms is nan, needs a value > 0",
    "rank_timeout_s = inf": "rank_timeout_s is inf, needs a value > 0",
    "gpu_memory_utilization = 1.2": "gpu_memory_utilization is 1.2, needs a value > 0 and <= 1",
    "device = 'gpu'": "device is 'gpu', needs one of cuda, cpu.",
    "dtype = 'bf16'": "dtype is 'bf16', needs one of auto, float32, bfloat16. Did you mean 'bfloat16'",
    "host = ''": "host is '', needs a string that is not empty",
    "allow_stop_by_id = 'no'": "allow_stop_by_id is 'no', needs true or false",
    "deterministic = 1": "deterministic is 1, needs true or false",
    "model_family = 'llama'": "model_family is 'llama', needs one of deepseek",
    "kv_layout = 3": "kv_layout is 3, not a table",
    "benchmark = 3": "benchmark is 3, not a table",
    "max_seq_len = 5000": "max_seq_len is 5000, but the model has positions for 4096 tokens. Lower max_seq_len",
    "grpc_port = 8000": "grpc_port is 8000, and so is http_port. Give each port",
}


@pytest.mark.parametrize("head", BAD_VALUES)
def test_a_bad_value_says_got_and_need(model: Path, head: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(BAD_VALUES[head])):
        load(model, head)


BAD_TABLES = {
    "[kv_layout]\npage_size = 24": "page_size is 24, needs one of 16, 32, 64",
    "[kv_layout]\nnum_layers = 61": "num_layers is 61, but the model's config.json has num_hidden_layers = 3",
    "[kv_layout]\nkv_lora_rank = 512": "kv_lora_rank is 512, but the model's config.json has kv_lora_rank = 32",
    "[[replicas]]\nreplica_id = 0\ngpus = [2]": "replicas has the replica_ids [0, 0]",
    "[[replicas]]\nreplica_id = 1\ngpus = [1]": "uses gpus [1] more than once",
    "[[replicas]]\nreplica_id = 1\ngpus = []": "replicas[1].gpus is empty",
    "[[replicas]]\nreplica_id = 1\ngpus = [-1]": "gpus is [-1], needs a list of integers >= 0",
    "[[replicas]]\nreplica_id = 1\ngpus = [4, 5, 6]": "3 gpus, which does not divide the model's 8 routed experts",
    "[[replicas]]\ngpus = [4]": "replicas[1].replica_id is missing. Add it",
    "[[replicas]]\nreplica_id = 1\ngpus = [4]\nloopback_ranks = 8": "loopback_ranks is 8 with 1 gpus",
    "[[replicas]]\nreplica_id = 1\ngpus = [4]\nrole = 'all'": "role is 'all', needs one of prefill, decode, both",
    "[generation]\ntemprature = 1": "generation.temprature is not a known key. Did you mean 'temperature'",
    "[generation]\nrepetition_penalty = 1e39": "generation.repetition_penalty is 1e+39, needs a value > 0 and <= 3.4",
    "[generation]\ntemperature = -1": "generation.temperature is -1, needs a value >= 0",
    "[generation]\ntop_p = 0": "generation.top_p is 0, needs a value > 0 and <= 1",
    "[generation]\neos_token_ids = [512]": "eos_token_ids is [512], needs at least one id, all below vocab_size = 512",
    "[generation]\neos_token_ids = []": "eos_token_ids is [], needs at least one id",
    "[generation]\nmax_tokens = 128": "generation.max_tokens is 128, needs a value below max_seq_len=128",
}


@pytest.mark.parametrize("tables", BAD_TABLES)
def test_a_bad_table_says_got_and_need(model: Path, tables: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(BAD_TABLES[tables])):
        load(model, tables=tables)


def test_one_gpu_stands_for_one_of_eight_ranks_with_random_weights_only(model: Path) -> None:
    head = 'device = "cuda"\nload_format = "dummy"'
    config = load(model, head, "loopback_ranks = 8", "[0]")
    assert (config.replicas[0].world_size, config.replicas[0].expert_ranks) == (1, 8)
    with pytest.raises(ConfigError, match='needs 2 or more, one gpu, device = "cuda" and load_format = "dummy"'):
        load(model, 'device = "cuda"', "loopback_ranks = 8", "[0]")
    with pytest.raises(ConfigError, match="load_format is 'random', needs one of auto, dummy"):
        load(model, 'load_format = "random"')


def test_too_few_pages_for_one_sequence_names_both_numbers(model: Path) -> None:
    text = "num_pages=12 holds 0 sequences of max_seq_len=4096 (64 pages each). Raise num_pages to >= 64"
    with pytest.raises(ConfigError, match=re.escape(text)):
        load(model, "num_pages = 12\nmax_seq_len = 4096")


def test_a_lone_prefill_replica_is_an_error_and_a_pair_is_not(model: Path) -> None:
    with pytest.raises(ConfigError, match="only the role 'prefill'"):
        load(model, tables="role = 'prefill'")
    config = load(model, tables="role = 'prefill'\n[[replicas]]\nreplica_id = 1\ngpus = [2, 3]\nrole = 'decode'")
    assert [replica.role for replica in config.replicas] == ["prefill", "decode"]


def test_all_ranks_of_a_replica_may_share_one_gpu_but_not_some(model: Path) -> None:
    assert load(model, "device = 'cuda'", gpus="[0, 0, 0, 0]").replicas[0].is_virtual
    for head, gpus in (("device = 'cuda'", "[0, 0, 1, 1]"), ("device = 'cpu'", "[0, 0]")):
        with pytest.raises(ConfigError, match=r"uses gpus \[0.*\] more than once"):
            load(model, head, gpus=gpus)


def test_missing_required_keys_are_named(model: Path) -> None:
    path = model.parent / "c.toml"
    path.write_text(f'model_path = "{model}"\nmax_seq_len = 128\n')
    with pytest.raises(ConfigError, match=r"replicas is None, needs at least one \[\[replicas\]\] table"):
        ServeConfig.from_toml(path, environment=HOME)
    path.write_text("max_seq_len = 128\n")
    with pytest.raises(ConfigError, match="model_path is missing"):
        ServeConfig.from_toml(path, environment=HOME)


def test_a_missing_file_and_broken_toml_are_errors_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration .*nothing.toml"):
        ServeConfig.from_toml(tmp_path / "nothing.toml")
    (tmp_path / "broken.toml").write_text("a = \n")
    with pytest.raises(ConfigError, match="broken.toml is not valid TOML: .*line 1"):
        ServeConfig.from_toml(tmp_path / "broken.toml")


def test_a_missing_model_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json.*model_path must be a checkpoint folder"):
        load(tmp_path / "nowhere")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model", architectures=["LlamaForCausalLM"])
    with pytest.raises(ConfigError, match=r"architectures is \['LlamaForCausalLM'\].*DeepseekV3ForCausalLM"):
        load(folder)


GENERATION: dict[str, tuple[Mapping[str, object], str, GenerationDefaults]] = {
    "the file's values": (
        {"temperature": 0.6, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1, "eos_token_id": [1, 7]},
        "",
        GenerationDefaults(
            temperature=0.6, top_p=0.95, top_k=40, repetition_penalty=1.1, eos_token_ids=(1, 7), bos_token_id=0
        ),
    ),
    "do_sample = false is greedy": (
        {"do_sample": False, "temperature": 0.6},
        "",
        GenerationDefaults(temperature=0.0, eos_token_ids=(1,), bos_token_id=0),
    ),
    "null is absent": (
        {"do_sample": True, "temperature": None, "eos_token_id": None, "max_new_tokens": 9},
        "",
        GenerationDefaults(eos_token_ids=(1,), bos_token_id=0, max_tokens=9),
    ),
    "the TOML overrides": (
        {"temperature": 0.6, "eos_token_id": 3, "pad_token_id": 2},
        "[generation]\ntemperature = 0.0\neos_token_ids = [4, 5]\nmax_tokens = 16\nbos_token_id = 6",
        GenerationDefaults(temperature=0.0, eos_token_ids=(4, 5), max_tokens=16, bos_token_id=6, pad_token_id=2),
    ),
}


@pytest.mark.parametrize("case", GENERATION)
def test_generation_config_is_honoured(tmp_path: Path, case: str) -> None:
    values, tables, expected = GENERATION[case]
    assert load(write_model_folder(tmp_path / "model", generation=values), tables=tables).generation == expected


def test_a_model_without_eos_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eos_token_ids is missing, and neither"):
        load(write_model_folder(tmp_path / "model", eos_token_id=None))


def test_overrides_replace_keys_and_are_checked_like_them(model: Path) -> None:
    path = write_toml(model.parent / "c.toml", model)
    config = ServeConfig.from_toml(path, {"http_port": 8123, "model_path": model}, HOME)
    assert (config.http_port, config.model_path) == (8123, model.resolve())
    with pytest.raises(ConfigError, match="http_port is 0"):
        ServeConfig.from_toml(path, {"http_port": 0}, HOME)
    with pytest.raises(ConfigError, match="htp_port is not a known key. Did you mean 'http_port'"):
        ServeConfig.from_toml(path, {"htp_port": 1}, HOME)


def test_the_kernel_cache_defaults_to_the_users_cache(model: Path) -> None:
    assert load(model).torch_extensions_dir == Path("/home/somebody/.cache/nmoe")
    assert load(model, XDG_CACHE_HOME="/x").torch_extensions_dir == Path("/x/nmoe")
    assert load(model, "torch_extensions_dir = 'here'").torch_extensions_dir == (model.parent / "here").resolve()


def test_a_resolved_config_written_out_loads_to_the_same_config(model: Path, tmp_path: Path) -> None:
    head = 'http_port = "${PORT:-8100}"\nmodel_name = "a \\"b\\" \\\\ ü \\u0001"\nitl_target_ms = 1e-3'
    tables = '[generation]\ntop_k = 3\n[kv_layout]\npage_size = 16\n[benchmark]\n"odd key" = [{a = 1.5}, {b = true}]'
    config = load(model, head, f"{tables}\n[benchmark.deep]\nx = [[1, 2], [inf]]")
    path = tmp_path / "written.toml"
    path.write_text(render_toml(config.as_tree()))
    assert ServeConfig.from_toml(path, environment={}) == dataclasses.replace(config, config_path=path)


def test_traces_are_off_unless_a_collector_is_named(model: Path) -> None:
    assert not load(model).is_traced
    assert load(model, 'trace_endpoint = "http://collector:4318/v1/traces"').is_traced
    with pytest.raises(ConfigError, match="needs a URL such as http://collector:4318/v1/traces"):
        load(model, 'trace_endpoint = "collector:4318"')
