"""DeepSeek-V3: config.json to ModelSpec, and where every tensor of a rank comes from.

Owns the family's names and numbers; holds no tensor and imports no torch. The reference for both is DeepSeek's
`inference/model.py` and transformers' `modeling_deepseek_v3.py`, which agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from nmoe_backend.models.spec import (
    DenseSpec,
    LayerSpec,
    MLASpec,
    ModelSpec,
    MoESpec,
    ParamSpec,
    QuantSpec,
    RopeSpec,
    RouterSpec,
)
from nmoe_backend.types import ConfigError

ARCHITECTURE = "DeepseekV3ForCausalLM"

# The reference builds q_a_layernorm and kv_a_layernorm without config.rms_norm_eps, so this one is fixed.
_LATENT_NORM_EPS = 1e-6

# What the model code implements; a checkpoint that says otherwise would load and answer nonsense.
_REQUIRED_VALUES: Mapping[str, object] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


def spec_from_config(config: Mapping[str, object]) -> ModelSpec:
    """ModelSpec of a DeepSeek-V3 config.json (the hub's form or transformers 5's). Raises ConfigError."""
    for key, needed in _REQUIRED_VALUES.items():
        if config.get(key, needed) != needed:
            raise ConfigError(
                f"config.json has {key}={config[key]!r}; {ARCHITECTURE} is implemented for {key}={needed!r} only. "
                "Serve a checkpoint with that value."
            )
    attn = _attention(config)
    dense = DenseSpec(intermediate_size=_int(config, "intermediate_size"))
    moe = _moe(config)
    num_layers = _int(config, "num_hidden_layers")
    num_dense = _int(config, "first_k_dense_replace")
    layers = tuple(LayerSpec(attn=attn, ffn=dense if i < num_dense else moe) for i in range(num_layers))
    return ModelSpec(
        architecture=ARCHITECTURE,
        vocab_size=_int(config, "vocab_size"),
        hidden_size=_int(config, "hidden_size"),
        max_position=_int(config, "max_position_embeddings"),
        norm_eps=_float(config, "rms_norm_eps"),
        layers=layers,
        quant=_quant(config),
        num_nextn_layers=_int(config, "num_nextn_predict_layers", 0),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def parameters(spec: ModelSpec, rank: int, world_size: int) -> list[ParamSpec]:
    """Every tensor of one rank, scales included where the checkpoint is quantised; expert e lives on e // local.

    Raises ConfigError when the ranks cannot share the experts evenly.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"got rank {rank} of world size {world_size}; a rank lies in [0, world size).")
    embed = "model.embed_tokens.weight"
    head = embed if spec.tie_word_embeddings else "lm_head.weight"
    params = [
        ParamSpec(name="embed.weight", shape=(spec.vocab_size, spec.hidden_size), sources=(embed,)),
        ParamSpec(name="norm.weight", shape=(spec.hidden_size,), sources=("model.norm.weight",)),
        ParamSpec(name="lm_head.weight", shape=(spec.vocab_size, spec.hidden_size), sources=(head,)),
    ]
    for i, layer in enumerate(spec.layers):
        params += _layer_parameters(spec, i, layer, rank, world_size)
    return params


def _layer_parameters(spec: ModelSpec, i: int, layer: LayerSpec, rank: int, world_size: int) -> Iterator[ParamSpec]:
    ours, hub, d = f"layers.{i}", f"model.layers.{i}", spec.hidden_size
    norms = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    for name, source in norms.items():
        yield ParamSpec(name=f"{ours}.{name}.weight", shape=(d,), sources=(f"{hub}.{source}.weight",))
    yield from _attention_parameters(spec, f"{ours}.attn", f"{hub}.self_attn", layer.attn)
    if isinstance(layer.ffn, DenseSpec):
        yield from _mlp_parameters(spec, f"{ours}.ffn", f"{hub}.mlp", layer.ffn.intermediate_size)
    else:
        yield from _moe_parameters(spec, f"{ours}.ffn", f"{hub}.mlp", layer.ffn, (rank, world_size))


def _attention_parameters(spec: ModelSpec, ours: str, hub: str, attn: MLASpec) -> Iterator[ParamSpec]:
    d, h = spec.hidden_size, attn.num_heads
    qk_head_dim = attn.qk_nope_head_dim + attn.qk_rope_head_dim
    linears = {
        "wq_a": ("q_a_proj", (attn.q_lora_rank, d)),
        "wq_b": ("q_b_proj", (h * qk_head_dim, attn.q_lora_rank)),
        "wkv_a": ("kv_a_proj_with_mqa", (attn.kv_lora_rank + attn.qk_rope_head_dim, d)),
        "wkv_b": ("kv_b_proj", (h * (attn.qk_nope_head_dim + attn.v_head_dim), attn.kv_lora_rank)),
        "wo": ("o_proj", (d, h * attn.v_head_dim)),
    }
    for name, (source, shape) in linears.items():
        # Absorbed attention multiplies by each head's W_UK and W_UV, the rows of wkv_b, in every decode step. In bf16
        # they take 33.5 MB a layer, 2.05 GB in all 61; fp8 would save half and cost a pass over them each step.
        yield from _linear(spec, f"{ours}.{name}", f"{hub}.{source}", shape, dequantized=name == "wkv_b")
    norms = {"q_norm": ("q_a_layernorm", attn.q_lora_rank), "kv_norm": ("kv_a_layernorm", attn.kv_lora_rank)}
    for name, (source, size) in norms.items():
        yield ParamSpec(name=f"{ours}.{name}.weight", shape=(size,), sources=(f"{hub}.{source}.weight",))


def _mlp_parameters(spec: ModelSpec, ours: str, hub: str, intermediate: int) -> Iterator[ParamSpec]:
    d = spec.hidden_size
    yield from _linear(spec, f"{ours}.w1", f"{hub}.gate_proj", (intermediate, d))
    yield from _linear(spec, f"{ours}.w2", f"{hub}.down_proj", (d, intermediate))
    yield from _linear(spec, f"{ours}.w3", f"{hub}.up_proj", (intermediate, d))


def _moe_parameters(
    spec: ModelSpec, ours: str, hub: str, moe: MoESpec, rank_of_world: tuple[int, int]
) -> Iterator[ParamSpec]:
    d, e = spec.hidden_size, moe.router.num_experts
    rank, world_size = rank_of_world
    if e % world_size:
        raise ConfigError(
            f"{e} experts cannot be split evenly over {world_size} ranks; use a number of GPUs that divides {e}."
        )
    gate_bias = f"{hub}.gate.e_score_correction_bias"
    yield ParamSpec(name=f"{ours}.gate.weight", shape=(e, d), sources=(f"{hub}.gate.weight",), float32=True)
    yield ParamSpec(name=f"{ours}.gate.bias", shape=(e,), sources=(gate_bias,), float32=True)
    if moe.shared_intermediate_size:
        yield from _mlp_parameters(spec, f"{ours}.shared", f"{hub}.shared_experts", moe.shared_intermediate_size)
    local = e // world_size
    experts = [f"{hub}.experts.{j}" for j in range(rank * local, (rank + 1) * local)]
    w13 = tuple(f"{expert}.{proj}.weight" for expert in experts for proj in ("gate_proj", "up_proj"))
    w2 = tuple(f"{expert}.down_proj.weight" for expert in experts)
    yield from _stack(spec, f"{ours}.w13", w13, local, (moe.intermediate_size, d))
    yield from _stack(spec, f"{ours}.w2", w2, local, (d, moe.intermediate_size))


def _linear(
    spec: ModelSpec, ours: str, hub: str, shape: tuple[int, int], *, dequantized: bool = False
) -> Iterator[ParamSpec]:
    yield ParamSpec(name=f"{ours}.weight", shape=shape, sources=(f"{hub}.weight",), dequantized=dequantized)
    if spec.quant is not None:
        yield ParamSpec(
            name=f"{ours}.weight_scale_inv",
            shape=_scale_shape(spec.quant, shape),
            sources=(f"{hub}.weight_scale_inv",),
            float32=True,
        )


def _stack(
    spec: ModelSpec, name: str, sources: tuple[str, ...], local: int, shape: tuple[int, int]
) -> Iterator[ParamSpec]:
    """`[local, rows of all sources of one expert, columns]`; a scale block never spans two sources."""
    per_expert = len(sources) // local
    yield ParamSpec(name=name, shape=(local, per_expert * shape[0], shape[1]), sources=sources)
    if spec.quant is not None:
        rows, columns = _scale_shape(spec.quant, shape)
        yield ParamSpec(
            name=f"{name}_scale",
            shape=(local, per_expert * rows, columns),
            sources=tuple(f"{source}_scale_inv" for source in sources),
            float32=True,
        )


def _scale_shape(quant: QuantSpec, shape: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // quant.block[0]), -(-shape[1] // quant.block[1])


def _attention(config: Mapping[str, object]) -> MLASpec:
    if config.get("q_lora_rank") is None:
        raise ConfigError(
            "config.json has no q_lora_rank; attention without the query latent (DeepSeek-V2-Lite) is not implemented. "
            "Serve a DeepSeek-V3 checkpoint."
        )
    rope, softmax_mscale = _rope(config)
    nope = _int(config, "qk_nope_head_dim")
    return MLASpec(
        num_heads=_int(config, "num_attention_heads"),
        q_lora_rank=_int(config, "q_lora_rank"),
        kv_lora_rank=_int(config, "kv_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope.dim,
        v_head_dim=_int(config, "v_head_dim"),
        softmax_scale=(nope + rope.dim) ** -0.5 * softmax_mscale**2,
        latent_norm_eps=_LATENT_NORM_EPS,
        rope=rope,
    )


def _rope(config: Mapping[str, object]) -> tuple[RopeSpec, float]:
    """The rotary part, and mscale, whose square multiplies the softmax scale.

    The hub has `rope_theta` beside `rope_scaling` (null: none, key "type"); transformers 5 writes one table
    `rope_parameters` (key "rope_type").
    """
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(table, Mapping):
        raise ConfigError(f"config.json: the rope table is {table!r}; it must be an object.")
    theta = table.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise ConfigError("config.json has no rope_theta, neither at the top nor in rope_parameters; add it.")
    dim = _int(config, "qk_rope_head_dim")
    interleaved = bool(config.get("rope_interleave", True))
    kind = table.get("rope_type", table.get("type", "default"))
    if kind == "default":
        return RopeSpec(dim=dim, theta=float(theta), interleaved=interleaved), 1.0
    if kind != "yarn" or not table.get("truncate", True):
        raise ConfigError(f"config.json: rope table {dict(table)} is not implemented; use YaRN (truncated) or none.")
    factor = _float(table, "factor")
    mscale, mscale_all_dim = _float(table, "mscale", 0.0), _float(table, "mscale_all_dim", 0.0)
    attention_factor = table.get("attention_factor")
    if attention_factor is None:
        if mscale and mscale_all_dim:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
        else:
            attention_factor = _yarn_mscale(factor, 1.0)
    rope = RopeSpec(
        dim=dim,
        theta=float(theta),
        interleaved=interleaved,
        factor=factor,
        original_max_position=_int(table, "original_max_position_embeddings"),
        beta_fast=_float(table, "beta_fast", 32.0),
        beta_slow=_float(table, "beta_slow", 1.0),
        attention_factor=float(attention_factor),
    )
    return rope, _yarn_mscale(factor, mscale_all_dim) if mscale_all_dim else 1.0


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _moe(config: Mapping[str, object]) -> MoESpec:
    router = RouterSpec(
        num_experts=_int(config, "n_routed_experts"),
        top_k=_int(config, "num_experts_per_tok"),
        num_groups=_int(config, "n_group"),
        topk_groups=_int(config, "topk_group"),
        score="sigmoid",
        renormalize=bool(config.get("norm_topk_prob", True)),
        scale=_float(config, "routed_scaling_factor"),
    )
    if router.num_experts % router.num_groups:
        raise ConfigError(
            f"config.json: n_routed_experts={router.num_experts} is not a multiple of n_group={router.num_groups}."
        )
    group_size = router.num_experts // router.num_groups
    if router.topk_groups > router.num_groups or router.top_k > router.topk_groups * group_size:
        raise ConfigError(
            f"config.json: num_experts_per_tok={router.top_k} and topk_group={router.topk_groups} do not fit "
            f"{router.num_groups} groups of {group_size} experts."
        )
    intermediate = _int(config, "moe_intermediate_size")
    shared = _int(config, "n_shared_experts", 0) * intermediate
    return MoESpec(router=router, intermediate_size=intermediate, shared_intermediate_size=shared)


def _quant(config: Mapping[str, object]) -> QuantSpec | None:
    table = config.get("quantization_config")
    if table is None:
        return None
    if not isinstance(table, Mapping) or table.get("quant_method") != "fp8" or table.get("fmt", "e4m3") != "e4m3":
        raise ConfigError(
            f"config.json: quantization_config {table!r} is not implemented; "
            "needs quant_method 'fp8', fmt 'e4m3' and weight_block_size, or none at all."
        )
    block = table.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise ConfigError(f"config.json: weight_block_size is {block!r}; needs [rows, columns], as [128, 128].")
    return QuantSpec(format="fp8_block", block=(block[0], block[1]))


def _int(table: Mapping[str, object], key: str, default: int | None = None) -> int:
    value = table.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"config.json: {key} is {table.get(key)!r}; {ARCHITECTURE} needs a whole number >= 0 there.")
    return value


def _float(table: Mapping[str, object], key: str, default: float | None = None) -> float:
    value = table.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"config.json: {key} is {table.get(key)!r}; {ARCHITECTURE} needs a number there.")
    return float(value)
