"""What a rank needs in memory, from config.json and the TOML alone, and how many KV pages are left.

Arithmetic, no torch: the doctor prints it before a start, the load sizes `num_pages = 0` with it. Weights, KV and
transport follow from shapes and are exact up to the allocator's rounding; activations, graphs and context are bounds.

Example, DeepSeek-V3 in fp8 on eight ranks: 81.7 GB of experts, 16.7 GB replicated and 3.7 GB of embedding and head make
about 102 GB of weights a rank; a token's KV is 61 layers x 576 values x 2 bytes = 70,272 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from nmoe_backend.config import ReplicaConfig, ServeConfig, pages_per_sequence
from nmoe_backend.generation import read_model_config
from nmoe_backend.toml_table import Table
from nmoe_backend.types import ConfigError

GB = 10**9
_DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
# Measured with DeepSeek-V3 and 57 graphs: 2.12 GB together. The tensors of graphs are the activations.
_GRAPH_BYTES = 5 * GB // 4  # what the driver keeps for CUDA graphs
_CONTEXT_BYTES = 1 * GB  # CUDA context, loaded modules, allocator rounding
_EXPERT_PASS_ROWS = 8192  # rows that one pass of the grouped GEMMs takes, whatever the skew
# Of the kernels for Hopper GPUs (layers/hopper_ops.py, hopper_exchange.py, kernels/expert_rows_gpu.py):
_WINDOW_ROWS, _WINDOW_SLACK = 16384, 2048  # received choices of one pass of the expert GEMMs; a chunk that may overhang
_PIECE_KEYS = 8192  # keys that prefill expands at once
_DECODE_SPLIT = 4096  # keys of a piece of a context in decode
_NUM_SMS = 132  # where few rows share their contexts evenly: two pieces of 64 heads each, in fp32
_LOGIT_COPIES = 3  # raw logits, edited logits, the plain sampler's sorted copy; fp32
_KERNEL_LOGIT_COPIES = 4  # raw logits, edited logits, candidates' logits and ids; 4 bytes each


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDims:
    """The numbers of config.json that memory depends on, under DeepSeek's names."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    fp8_block: int  # values that share one fp32 scale; 0: the checkpoint is not quantised
    compute_bytes: int  # of a value in the checkpoint's own compute dtype

    @classmethod
    def from_config(cls, model: Mapping[str, object], source: str = "config.json") -> ModelDims:
        """From a config.json. A missing or misshapen value is a ConfigError that names it."""
        table = Table(model, source)
        shape = {f.name: table.integer(f.name) for f in fields(cls) if f.name not in ("fp8_block", "compute_bytes")}
        quant = Table(model.get("quantization_config") or {}, source, "quantization_config")
        rows_columns = quant.integers("weight_block_size", (128, 128), low=1)
        dtype = table.string("torch_dtype" if table.has("torch_dtype") else "dtype", "bfloat16")
        if dtype not in _DTYPE_BYTES:
            raise ConfigError(f"{source}: torch_dtype is {dtype!r}, needs one of {', '.join(_DTYPE_BYTES)}.")
        block = rows_columns[0] * rows_columns[-1] if quant.get("quant_method") == "fp8" else 0
        return cls(**shape, fp8_block=block, compute_bytes=_DTYPE_BYTES[dtype])

    @property
    def attention_params(self) -> int:
        """Linear weights of one MLA layer."""
        heads, qk_head_dim = self.num_attention_heads, self.qk_nope_head_dim + self.qk_rope_head_dim
        return (
            self.q_lora_rank * (self.hidden_size + heads * qk_head_dim)
            + (self.kv_lora_rank + self.qk_rope_head_dim) * self.hidden_size
            + self.kv_b_params
            + self.hidden_size * heads * self.v_head_dim
        )

    @property
    def kv_b_params(self) -> int:
        """kv_b_proj of one MLA layer: W_UK and W_UV of every head."""
        return self.num_attention_heads * (self.qk_nope_head_dim + self.v_head_dim) * self.kv_lora_rank

    @property
    def expert_params(self) -> int:
        """One routed expert: gate, up and down."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def largest_linear(self) -> int:
        """Weights of the largest one of the linears that may stay quantised."""
        heads, qk_head_dim = self.num_attention_heads, self.qk_nope_head_dim + self.qk_rope_head_dim
        return max(
            self.hidden_size * self.intermediate_size,
            self.hidden_size * heads * self.v_head_dim,
            self.q_lora_rank * heads * qk_head_dim,
            2 * self.hidden_size * self.moe_intermediate_size,
        )

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts."""
        return self.num_hidden_layers - self.first_k_dense_replace


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBudget:
    """Bytes of one rank."""

    weights: int
    kv_cache: int
    transport: int
    activations: int
    graphs: int
    context: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(getattr(self, f.name) for f in fields(self))

    def describe(self) -> str:
        """`weights 101.9 + kv_cache 38.1 + ... = 149.0 GB a rank`."""
        parts = " + ".join(f"{f.name} {getattr(self, f.name) / GB:.2f}" for f in fields(self))
        return f"{parts} = {self.total / GB:.2f} GB a rank"


def model_dims(config: ServeConfig) -> ModelDims:
    """The dims of the config's model."""
    return ModelDims.from_config(read_model_config(config.model_path), str(config.model_path / "config.json"))


def compute_bytes(config: ServeConfig, dims: ModelDims) -> int:
    """Bytes of an activation and of a cached value: `dtype`, or the checkpoint's own with "auto"."""
    return dims.compute_bytes if config.dtype == "auto" else _DTYPE_BYTES[config.dtype]


def kv_bytes_per_token(config: ServeConfig, dims: ModelDims) -> int:
    """Bytes that one token takes in the cache, all layers."""
    layout = config.kv_layout
    return layout.num_layers * (layout.kv_lora_rank + layout.qk_rope_head_dim) * compute_bytes(config, dims)


def page_bytes(config: ServeConfig, dims: ModelDims) -> int:
    """Bytes of one KV page, all layers."""
    return kv_bytes_per_token(config, dims) * config.kv_layout.page_size


def weight_bytes(config: ServeConfig, dims: ModelDims, world_size: int) -> int:
    """Weights of one rank: its share of the routed experts and all the rest. fp8 stays fp8 on a GPU only, and there in
    all linears but kv_b, which absorbed attention needs in the compute dtype (2.05 GB for DeepSeek-V3)."""
    compute = compute_bytes(config, dims)
    linear_bytes = 1 + 4 / dims.fp8_block if keeps_fp8(config, dims) else compute
    kv_b = dims.num_hidden_layers * dims.kv_b_params
    linear = dims.num_hidden_layers * dims.attention_params - kv_b
    linear += dims.first_k_dense_replace * 3 * dims.hidden_size * dims.intermediate_size
    local_experts = dims.n_routed_experts // world_size
    linear += dims.num_moe_layers * (local_experts + dims.n_shared_experts) * dims.expert_params
    norms = dims.num_hidden_layers * (2 * dims.hidden_size + dims.q_lora_rank + dims.kv_lora_rank) + dims.hidden_size
    embedding_and_head = 2 * dims.vocab_size * dims.hidden_size
    router = dims.num_moe_layers * dims.n_routed_experts * (dims.hidden_size + 1)
    return round(linear * linear_bytes) + (kv_b + norms + embedding_and_head) * compute + router * 4


def keeps_fp8(config: ServeConfig, dims: ModelDims) -> bool:
    """Whether weights stay quantised in memory: an fp8 checkpoint on a GPU. On a CPU they are dequantised at load."""
    return dims.fp8_block > 0 and config.device == "cuda"


def runs_kernels(config: ServeConfig, dims: ModelDims) -> bool:
    """Whether the model runs on the kernels for Hopper GPUs: what layers/table.py decides, from the same numbers."""
    sizes = (dims.intermediate_size, dims.moe_intermediate_size, dims.q_lora_rank)
    return (
        keeps_fp8(config, dims)
        and dims.fp8_block == 128 * 128
        and compute_bytes(config, dims) == 2
        and (dims.kv_lora_rank, dims.qk_nope_head_dim, dims.qk_rope_head_dim, dims.v_head_dim) == (512, 128, 64, 128)
        and dims.num_attention_heads % 64 == 0
        and dims.hidden_size % 256 == 0
        and dims.hidden_size <= 16384
        and not any(size % 128 for size in sizes)
    )


def tokens_per_step(config: ServeConfig) -> int:
    """T_cap: the most tokens that a rank feeds in one step, one of each running sequence and a full prefill budget."""
    return config.max_batch_size + config.max_prefill_tokens


def transport_bytes(config: ServeConfig, dims: ModelDims, world_size: int) -> int:
    """RDEP's buffers of one rank: world x T_cap slots: a received row, its ids and weights, a returned row (fp32 in
    plain torch; the kernels receive fp8 with scales and return bf16)."""
    slots = world_size * tokens_per_step(config)
    if runs_kernels(config, dims):
        return slots * (dims.hidden_size * 3 + dims.hidden_size // 32 + dims.num_experts_per_tok * 8)
    return slots * (dims.hidden_size * (compute_bytes(config, dims) + 4) + dims.num_experts_per_tok * 8)


def _expert_window_bytes(config: ServeConfig, dims: ModelDims, world_size: int) -> int:
    """Kernels only: gathered rows, their hidden and result rows, and which received choice is which row."""
    choices = world_size * tokens_per_step(config) * dims.num_experts_per_tok
    balanced = tokens_per_step(config) * dims.num_experts_per_tok
    rows = min(choices, max(_WINDOW_ROWS, balanced * 9 // 8)) + _WINDOW_SLACK + 16 * dims.n_routed_experts // world_size
    d, i = dims.hidden_size, dims.moe_intermediate_size
    return rows * (3 * d + i + (d + i) // 32) + choices * 4


def _attention_scratch_bytes(config: ServeConfig, dims: ModelDims) -> int:
    """Kernels only: partial results of contexts in several pieces, expanded keys and running sums of prefill; fp32."""
    heads, partials = dims.num_attention_heads, 0  # of one head each
    in_pages = config.num_pages * config.kv_layout.page_size + 128 * config.max_batch_size  # each in whole blocks
    keys = config.max_batch_size * config.max_seq_len
    if config.num_pages:
        keys = min(keys, in_pages)
    if config.max_seq_len > _DECODE_SPLIT:
        pieces = config.max_batch_size * -(-config.max_seq_len // _DECODE_SPLIT)
        partials = heads * min(pieces, 2 * keys // _DECODE_SPLIT)
    if not config.deterministic:
        partials += 2 * _NUM_SMS * 64
    expanded = _PIECE_KEYS * (2 * heads * (dims.qk_nope_head_dim + dims.v_head_dim) + 2 * (dims.kv_lora_rank + 64))
    sums = tokens_per_step(config) * heads * (dims.v_head_dim + 2) * 4
    return partials * (dims.kv_lora_rank + 1) * 4 + expanded + sums


def activation_bytes(config: ServeConfig, dims: ModelDims, world_size: int) -> int:
    """The widest moment of a step: the larger of attention and a feed-forward layer; logits and the sampler's state."""
    compute, heads = compute_bytes(config, dims), dims.num_attention_heads
    attention = heads * (2 * dims.qk_nope_head_dim + dims.qk_rope_head_dim + 2 * dims.v_head_dim)
    attention += dims.q_lora_rank + dims.kv_lora_rank + dims.qk_rope_head_dim
    dense = 3 * dims.intermediate_size
    tokens = tokens_per_step(config) * ((max(attention, dense) + 4 * dims.hidden_size) * compute)
    expert_pass = _EXPERT_PASS_ROWS * (3 * dims.moe_intermediate_size * compute + dims.hidden_size * (compute + 4))
    copies = _KERNEL_LOGIT_COPIES if runs_kernels(config, dims) else _LOGIT_COPIES
    logits = config.max_batch_size * dims.vocab_size * 4 * copies
    # Counts and mask of penalties; four bitmasks (stop ids, bad words, a grammar's, what is left); history.
    slot = dims.vocab_size * 5 + dims.vocab_size // 2 + (config.max_seq_len + 1) * 8
    sampler = config.max_batch_size * slot
    if runs_kernels(config, dims):
        scratch = _expert_window_bytes(config, dims, world_size) + _attention_scratch_bytes(config, dims)
        hidden = tokens_per_step(config) * dims.hidden_size * compute  # what a step's graph leaves for the rank
        return tokens + hidden + logits + sampler + scratch
    # One weight at a time is dequantised, via fp32.
    dequantized = dims.largest_linear * (4 + compute) if keeps_fp8(config, dims) else 0
    return tokens + expert_pass + logits + sampler + dequantized


def memory_budget(config: ServeConfig, dims: ModelDims, replica: ReplicaConfig, num_pages: int) -> MemoryBudget:
    """The whole of one rank of a replica with `num_pages` pages. Graphs and context exist on a GPU only."""
    on_gpu = config.device == "cuda"
    return MemoryBudget(
        weights=weight_bytes(config, dims, replica.expert_ranks),
        kv_cache=num_pages * page_bytes(config, dims),
        transport=transport_bytes(config, dims, replica.expert_ranks),
        activations=activation_bytes(config, dims, replica.expert_ranks),
        graphs=_GRAPH_BYTES if on_gpu else 0,
        context=_CONTEXT_BYTES if on_gpu else 0,
    )


def host_memory_bytes() -> tuple[int, int]:
    """(total, available) of this machine. Available counts page cache that the kernel gives up; "free" does not."""
    values = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) * 1024
    return values["MemTotal"], values["MemAvailable"]


def available_bytes(config: ServeConfig, free: int, total: int) -> int:
    """What we may still fill of a device with `free` of `total` bytes free: gpu_memory_utilization bounds the whole."""
    return max(0, free - round(total * (1.0 - config.gpu_memory_utilization)))


def useful_pages(config: ServeConfig) -> int:
    """The most pages that a rank can use: every slot taken by a sequence of max_seq_len."""
    return config.max_batch_size * pages_per_sequence(config)


def resolve_num_pages(
    config: ServeConfig, dims: ModelDims, replica: ReplicaConfig, *, available: int, loaded: bool
) -> int:
    """Pages of one rank: what the TOML says, or with `num_pages = 0` what fits into `available` bytes.

    `loaded`: weights, transport and context are in memory already, so only activations and graphs are still to come.
    Raises ConfigError where not even one sequence of max_seq_len fits.
    """
    if config.num_pages > 0:
        return config.num_pages
    budget = memory_budget(config, dims, replica, 0)
    to_come = budget.activations + budget.graphs if loaded else budget.total
    pages = min(max(0, available - to_come) // page_bytes(config, dims), useful_pages(config))
    needed = pages_per_sequence(config)
    if pages < needed:
        short = (needed * page_bytes(config, dims) + to_come - available) / GB
        raise ConfigError(
            f"{available / GB:.2f} GB a rank hold {pages} KV pages beside the rest ({budget.describe()}), and one "
            f"sequence of max_seq_len={config.max_seq_len} needs {needed}. Free {short:.2f} GB a rank, lower "
            f"max_seq_len, max_prefill_tokens or max_batch_size, or raise gpu_memory_utilization."
        )
    return pages


def sequences_that_fit(config: ServeConfig, num_pages: int, length: int) -> int:
    """Sequences of `length` tokens that the pages of one rank hold at the same time (not bounded by its slots)."""
    return num_pages // -(-length // config.kv_layout.page_size)
