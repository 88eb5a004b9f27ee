"""config.json to ModelSpec, and the table of names: torch-free."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from nmoe_backend import models
from nmoe_backend.models.checkpoint import num_parts, scale_name, source_shape
from nmoe_backend.models.deepseek_v3 import parameters, spec_from_config
from nmoe_backend.models.spec import DenseSpec, MoESpec
from nmoe_backend.types import ConfigError

# The hub's config.json of DeepSeek-V3-0324, the keys that matter.
HUB_CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def without(key: str) -> dict:
    return {k: v for k, v in HUB_CONFIG.items() if k != key}


def test_hub_config_gives_deepseek_v3s_published_numbers():
    spec = spec_from_config(HUB_CONFIG)
    attn, moe = spec.layers[60].attn, spec.layers[60].ffn
    assert [isinstance(layer.ffn, DenseSpec) for layer in spec.layers] == [True] * 3 + [False] * 58
    assert isinstance(moe, MoESpec)
    assert (moe.router.num_experts, moe.router.top_k, moe.router.num_groups, moe.router.topk_groups) == (256, 8, 8, 4)
    assert (moe.router.scale, moe.router.renormalize, moe.shared_intermediate_size) == (2.5, True, 2048)
    mscale = 0.1 * math.log(40) + 1
    assert attn.softmax_scale == pytest.approx(192**-0.5 * mscale**2, rel=1e-12)
    assert attn.rope.attention_factor == 1.0  # mscale == mscale_all_dim: they cancel
    assert (attn.latent_norm_eps, spec.num_nextn_layers, spec.quant.block) == (1e-6, 1, (128, 128))


def test_transformers_rope_parameters_mean_the_same_as_the_hubs_form():
    table = {k: v for k, v in HUB_CONFIG["rope_scaling"].items() if k != "type"}
    newer = without("rope_scaling") | {"rope_parameters": {**table, "rope_type": "yarn", "rope_theta": 10000.0}}
    del newer["rope_theta"]
    assert spec_from_config(newer) == spec_from_config(HUB_CONFIG)


def test_plain_rope_has_no_scaling_in_either_form():
    for change in (
        {"rope_scaling": None},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
    ):
        attn = spec_from_config(HUB_CONFIG | change).layers[0].attn
        assert (attn.rope.factor, attn.rope.attention_factor) == (1.0, 1.0)
        assert attn.softmax_scale == pytest.approx(192**-0.5)


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "attention_factor", "softmax_factor"),
    [
        (1.0, 0.5, (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1), (0.05 * math.log(40) + 1) ** 2),
        (None, None, 0.1 * math.log(40) + 1, 1.0),
        (0.7, 0.0, 0.1 * math.log(40) + 1, 1.0),
    ],
)
def test_mscale_goes_to_cos_sin_as_a_ratio_and_to_the_softmax_squared(
    mscale, mscale_all_dim, attention_factor, softmax_factor
):
    table = HUB_CONFIG["rope_scaling"] | {"mscale": mscale, "mscale_all_dim": mscale_all_dim}
    attn = spec_from_config(HUB_CONFIG | {"rope_scaling": table}).layers[0].attn
    assert attn.rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    assert attn.softmax_scale == pytest.approx(192**-0.5 * softmax_factor, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu'"]),
        ({"scoring_func": "softmax"}, ["scoring_func"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"q_lora_rank": None}, ["q_lora_rank", "DeepSeek-V2-Lite"]),
        ({"hidden_size": "7168"}, ["hidden_size", "'7168'"]),
        ({"vocab_size": None}, ["vocab_size"]),
        ({"n_group": 7}, ["256", "n_group=7"]),
        ({"topk_group": 9}, ["topk_group=9"]),
        ({"num_experts_per_tok": 129}, ["num_experts_per_tok=129"]),
        ({"rope_theta": None}, ["rope_theta"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["linear", "YaRN"]),
        ({"rope_scaling": [1]}, ["rope table"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["awq", "fp8"]),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, ["weight_block_size", "[128, 128]"]),
    ],
)
def test_an_unsupported_config_is_an_error_that_names_the_key_and_the_need(change, words):
    with pytest.raises(ConfigError) as error:
        spec_from_config(HUB_CONFIG | change)
    assert all(word in str(error.value) for word in words), error.value


def test_load_spec_names_the_known_architectures(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUB_CONFIG | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM.*known are .*DeepseekV3ForCausalLM"):
        models.load_spec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(HUB_CONFIG))
    assert models.load_spec(tmp_path) == spec_from_config(HUB_CONFIG)


@pytest.mark.parametrize("text", ["{", "[]", '{"architectures": 3}', "{}"])
def test_load_spec_of_a_broken_config_is_a_config_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        models.load_spec(tmp_path)


def test_load_spec_of_no_folder_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="model_path"):
        models.load_spec(tmp_path / "absent")


def test_expert_e_lives_on_rank_e_over_local_and_nowhere_else():
    spec = spec_from_config(HUB_CONFIG)
    seen: dict[str, int] = {}
    for rank in range(8):
        w13 = next(p for p in parameters(spec, rank, 8) if p.name == "layers.3.ffn.w13")
        assert w13.shape == (32, 4096, 7168)
        for source in w13.sources:
            assert source not in seen
            seen[source] = rank
    assert seen == {
        f"model.layers.3.mlp.experts.{e}.{proj}.weight": e // 32
        for e in range(256)
        for proj in ("gate_proj", "up_proj")
    }


def test_w13_is_gate_rows_then_up_rows_of_each_expert():
    w13 = next(p for p in parameters(spec_from_config(HUB_CONFIG), 1, 8) if p.name == "layers.5.ffn.w13")
    prefix = "model.layers.5.mlp.experts"
    assert w13.sources[:3] == (
        f"{prefix}.32.gate_proj.weight",
        f"{prefix}.32.up_proj.weight",
        f"{prefix}.33.gate_proj.weight",
    )
    assert (num_parts(w13), source_shape(w13)) == (2, (2048, 7168))


def test_a_rank_of_eight_holds_the_documented_bytes():
    """81.7 GB experts, about 16 GB replicated, 3.7 GB embedding and head: about 102 GB in fp8."""
    params = parameters(spec_from_config(HUB_CONFIG), 0, 8)
    names = {p.name for p in params}
    quantised = {name for name in names if scale_name(name) in names}
    size = {p.name: math.prod(p.shape) * (1 if p.name in quantised else 4 if p.float32 else 2) for p in params}
    experts = sum(n for name, n in size.items() if name.endswith((".w13", ".w2")))
    head = size["embed.weight"] + size["lm_head.weight"]
    assert experts == pytest.approx(81.7e9, rel=0.005)
    assert head == pytest.approx(3.7e9, rel=0.01)
    assert sum(size.values()) == pytest.approx(102e9, rel=0.015)


def test_every_quantised_matrix_has_scales_of_its_blocks_and_nothing_else_has():
    params = {p.name: p for p in parameters(spec_from_config(HUB_CONFIG), 0, 8)}
    scaled = {name for name in params if scale_name(name) in params}
    matrices = {n for n, p in params.items() if len(p.shape) > 1 and not p.float32}
    assert scaled == matrices - {"embed.weight", "lm_head.weight"}
    assert params["layers.0.attn.wkv_a.weight_scale_inv"].shape == (5, 56)  # 576 rows: the last block is cut off
    assert params["layers.9.ffn.w13_scale"].shape == (32, 32, 56)
    assert params["layers.9.ffn.w2_scale"].sources[0] == "model.layers.9.mlp.experts.0.down_proj.weight_scale_inv"
    plain = parameters(spec_from_config(without("quantization_config")), 0, 8)
    assert {p.name for p in plain} == params.keys() - {p.name for p in params.values() if "_scale" in p.name}


def test_only_router_and_scales_are_float32():
    float32 = {p.name for p in parameters(spec_from_config(HUB_CONFIG), 0, 8) if p.float32 and "_scale" not in p.name}
    assert float32 == {f"layers.{i}.ffn.gate.{kind}" for i in range(3, 61) for kind in ("weight", "bias")}


def test_tied_embeddings_share_their_source():
    params = {p.name: p for p in parameters(spec_from_config(HUB_CONFIG | {"tie_word_embeddings": True}), 0, 1)}
    assert params["lm_head.weight"].sources == params["embed.weight"].sources == ("model.embed_tokens.weight",)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 7), (8, 8), (-1, 8)])
def test_an_impossible_world_is_a_config_error(rank, world_size):
    with pytest.raises(ConfigError, match=str(world_size)):
        parameters(spec_from_config(HUB_CONFIG), rank, world_size)


def test_models_and_convert_import_no_torch():
    code = (
        "import sys, nmoe_backend.models.checkpoint, nmoe_backend.convert; "
        "raise SystemExit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
