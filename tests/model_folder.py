"""Model folders for tests of the torch-free layers: config files with real values, and no weights to speak of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from nmoe_backend.safetensors_header import encode_header

# config.json of deepseek-ai/DeepSeek-V3, the values that decide shapes and sizes
DEEPSEEK_V3: Mapping[str, object] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}

# a model that fits anywhere, with eight experts for eight ranks
TINY: Mapping[str, object] = {
    **{key: value for key, value in DEEPSEEK_V3.items() if key not in ("quantization_config", "rope_scaling")},
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "qk_nope_head_dim": 32,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}


def write_model_folder(
    path: Path, model: Mapping[str, object] = TINY, generation: Mapping[str, object] | None = None, **changes: object
) -> Path:
    """A folder with config.json (`changes` applied; None removes a key), an index with one shard, and a tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in {**model, **changes}.items() if value is not None}
    (path / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    shard = "model-00001-of-00001.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    (path / shard).write_bytes(encode_header({}))
    (path / "tokenizer.json").write_text("{}")
    return path


def write_toml(path: Path, model_path: Path, head: str = "", tables: str = "", gpus: str = "[0, 1]") -> Path:
    """A small CPU config: `head` goes above the tables, `tables` below the one replica."""
    lines = [f'model_path = "{model_path}"']
    defaults = {"device": '"cpu"', "max_seq_len": "128", "max_batch_size": "4", "max_prefill_tokens": "64"}
    lines += [f"{key} = {value}" for key, value in defaults.items() if f"{key} =" not in head]
    text = "\n".join([*lines, head, "[[replicas]]", "replica_id = 0", f"gpus = {gpus}", tables, ""])
    path.write_text(text)
    return path
