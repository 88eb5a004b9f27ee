"""ModelSpec: a decoder described as data. A family's file builds it from config.json; model.py assembles it.

Adding a family adds a file with a factory, never an `if` in forward. All dims are of the whole model, not of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """Rotary embedding with optional YaRN (arXiv 2309.00071); `factor` 1 is plain RoPE."""

    dim: int
    theta: float
    interleaved: bool  # pairs (0, 1), (2, 3), ... as DeepSeek's; False: (0, dim/2), ...
    factor: float = 1.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # multiplies cos and sin


@dataclass(frozen=True, kw_only=True, slots=True)
class MLASpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    softmax_scale: float  # YaRN's mscale^2 included
    latent_norm_eps: float  # of q_norm and kv_norm
    rope: RopeSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSpec:
    """Which experts a token visits. Grouping is data: num_groups 1 is no grouping."""

    num_experts: int
    top_k: int
    num_groups: int
    topk_groups: int
    score: str  # "sigmoid"; the bias only takes part in the choice
    renormalize: bool
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseSpec:
    """SwiGLU MLP: w2(silu(w1 x) * w3 x)."""

    intermediate_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MoESpec:
    """Routed experts plus one shared SwiGLU (shared_intermediate_size 0: none)."""

    router: RouterSpec
    intermediate_size: int
    shared_intermediate_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    attn: MLASpec
    ffn: DenseSpec | MoESpec


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantSpec:
    """Block-quantised weights: e4m3 with one fp32 scale per block, weight = q * scale."""

    format: str  # "fp8_block"
    block: tuple[int, int]  # (rows, columns), 128 x 128


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    architecture: str  # as in config.json's "architectures"
    vocab_size: int
    hidden_size: int
    max_position: int
    norm_eps: float
    layers: tuple[LayerSpec, ...]
    quant: QuantSpec | None  # None: the checkpoint is bf16, fp16 or fp32
    num_nextn_layers: int = 0  # MTP layers in the checkpoint: listed and ignored
    tie_word_embeddings: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ParamSpec:
    """One tensor of one rank: its nmoe-sharded name, and the hub tensors whose rows, one below the other, make it.

    `shape` is this rank's shape; for stacked experts `[local, rows, columns]`, whose bytes are the sources' bytes in
    order (C order), which is what lets the converter copy bytes instead of tensors.
    """

    name: str  # "layers.3.ffn.w13"
    shape: tuple[int, ...]
    sources: tuple[str, ...]  # hub names, in order
    dequantized: bool = False  # never kept quantised: layers need the values themselves, not only a product with them
    float32: bool = False  # always fp32 (router weight and bias, scales); otherwise the checkpoint's dtype
