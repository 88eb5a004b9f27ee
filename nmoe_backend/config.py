"""ServeConfig: one TOML file, checked, completed from the model's own files, frozen.

The TOML is the only configuration. Loading reads the TOML, `config.json` and `generation_config.json` of the model and
nothing else: no GPU, no network, no weights. Whatever cannot work is a ConfigError here, before anything starts.

Relative paths in a TOML are relative to the folder of that TOML, so a start does not depend on the working directory.
`gpus` are CUDA device ordinals with device = "cuda" and plain rank numbers with device = "cpu" (one thread each).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, cast

from nmoe_backend import environ
from nmoe_backend.generation import GenerationDefaults, generation_defaults, read_model_config
from nmoe_backend.openai_config import OpenAIConfig, read_openai
from nmoe_backend.supervisor_config import SupervisorConfig, read_supervisor
from nmoe_backend.toml_table import Table, read_toml
from nmoe_backend.types import ConfigError, EngineLimits

Device = Literal["cuda", "cpu"]
DType = Literal["auto", "float32", "bfloat16"]
LoadFormat = Literal["auto", "dummy"]
Role = Literal["prefill", "decode", "both"]

# family -> the architectures of config.json that it covers; models/__init__.py holds what they build
MODEL_FAMILIES: Mapping[str, tuple[str, ...]] = MappingProxyType({"deepseek": ("DeepseekV3ForCausalLM",)})
PAGE_SIZES = (16, 32, 64)  # the kernels' tile heights
_TOP_TABLES = ("kv_layout", "replicas", "generation", "openai", "supervisor", "benchmark")
_KV_KEYS = ("kv_lora_rank", "qk_rope_head_dim", "num_layers", "page_size")
_REPLICA_KEYS = ("replica_id", "gpus", "role", "loopback_ranks")
_PORTS = ("http_port", "grpc_port", "metrics_port", "openai_port")


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayout:
    """A token caches (kv_lora_rank + qk_rope_head_dim) values in each of num_layers; a page holds page_size tokens."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    num_layers: int
    page_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaConfig:
    """One engine: its ranks in order."""

    replica_id: int
    gpus: tuple[int, ...]
    role: Role = "both"
    loopback_ranks: int = 0  # benchmarks: the one GPU stands for one of so many ranks; 0: it is what it is

    @property
    def world_size(self) -> int:
        """Ranks of this replica."""
        return len(self.gpus)

    @property
    def expert_ranks(self) -> int:
        """Ranks that the routed experts are split over."""
        return self.loopback_ranks or self.world_size

    @property
    def is_virtual(self) -> bool:
        """All ranks on one GPU: right but slow, for checks on a machine with fewer GPUs than ranks."""
        return len(self.gpus) > 1 and len(set(self.gpus)) == 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """One supported way to run. max_batch_size, max_prefill_tokens and num_pages are per rank."""

    config_path: Path
    model_path: Path
    model_family: str
    model_name: str
    load_format: LoadFormat  # "dummy": random weights, for benchmarks; model_path then needs config.json only
    device: Device
    dtype: DType
    max_batch_size: int  # sequences of a rank
    max_prefill_tokens: int  # prefill tokens of a rank in one step
    num_pages: int  # 0: from free memory
    max_seq_len: int  # prompt + output tokens
    gpu_memory_utilization: float  # share of a GPU's memory that we may fill
    deterministic: bool  # a request's bits do not depend on its neighbours in the batch; on the kernels
    itl_target_ms: float  # bound on a step in which somebody decodes
    max_queue_size: int
    rank_timeout_s: float
    host: str
    http_port: int
    grpc_port: int
    metrics_port: int
    openai_port: int
    exclude_input_in_output: bool
    allow_stop_by_id: bool
    max_orphan_s: float  # from arrival, for what an ensemble keeps from being cancelled; 0: no bound
    log_prompts: bool  # the log holds what clients sent; off: their ids and counts only
    trace_endpoint: str  # OTLP/HTTP collector, for Triton's spans and ours; or "off"
    torch_extensions_dir: Path
    kv_layout: KVLayout
    replicas: tuple[ReplicaConfig, ...]
    generation: GenerationDefaults
    openai: OpenAIConfig
    supervisor: SupervisorConfig
    vocab_size: int
    benchmark: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def is_traced(self) -> bool:
        """Whether spans go to a collector."""
        return self.trace_endpoint != "off"

    @classmethod
    def from_toml(
        cls,
        path: str | Path,
        overrides: Mapping[str, object] = MappingProxyType({}),
        environment: Mapping[str, str] | None = None,
    ) -> ServeConfig:
        """Load, check and complete. `overrides` replace top-level keys (ports, paths) and are checked like them."""
        source = Path(path).absolute()
        env = environ.process_environment() if environment is None else environment
        top = Table({**read_toml(source, env), **overrides}, str(path))
        top.require_known((*_SCALARS, *_TOP_TABLES))
        model_path = _path(top, "model_path", source, None)
        model = Table(read_model_config(model_path), str(model_path / "config.json"))
        config = _read(top, model, source, env)
        _check_lengths(config, top, model)
        _check_ports(config, top)
        _check_replicas(config, top, model)
        return config

    def as_tree(self) -> dict[str, object]:
        """The whole config as TOML values, with nothing left to expand or to resolve; loads to an equal config."""
        tree: dict[str, object] = {key: getattr(self, key) for key in _SCALARS}
        tree.update({key: str(value) for key, value in tree.items() if isinstance(value, Path)})
        tree["kv_layout"] = asdict(self.kv_layout)
        tree["replicas"] = [{**asdict(replica), "gpus": list(replica.gpus)} for replica in self.replicas]
        generation = {key: value for key, value in asdict(self.generation).items() if value is not None}
        tree["generation"] = {**generation, "eos_token_ids": list(self.generation.eos_token_ids)}
        tree["openai"] = self.openai.as_tree()
        tree["supervisor"] = self.supervisor.as_tree()
        tree["benchmark"] = dict(self.benchmark)
        return tree


_SCALARS = tuple(
    name for name in ServeConfig.__dataclass_fields__ if name not in (*_TOP_TABLES, "config_path", "vocab_size")
)


def engine_limits(config: ServeConfig, num_pages: int, replica: ReplicaConfig | None = None) -> EngineLimits:
    """What a replica can hold once the pages of a rank are known. `replica` may be left out if there is only one."""
    assert replica is not None or len(config.replicas) == 1, "engine_limits: name the replica, there are several"
    return EngineLimits(
        num_ranks=(replica or config.replicas[0]).world_size,
        num_pages=num_pages,
        page_size=config.kv_layout.page_size,
        max_batch_size=config.max_batch_size,
        max_prefill_tokens=config.max_prefill_tokens,
        max_seq_len=config.max_seq_len,
        max_queue_size=config.max_queue_size,
        itl_target_ms=config.itl_target_ms,
        rank_timeout_s=config.rank_timeout_s,
        eos_token_ids=config.generation.eos_token_ids,
        vocab_size=config.vocab_size,
    )


def pages_per_sequence(config: ServeConfig) -> int:
    """Pages that one sequence of max_seq_len tokens fills."""
    return -(-config.max_seq_len // config.kv_layout.page_size)


def _read(top: Table, model: Table, source: Path, env: Mapping[str, str]) -> ServeConfig:
    """Every key by itself; what two keys say together is checked afterwards."""
    model_path = Path(model.source).parent
    vocab_size = model.integer("vocab_size", low=1)
    openai = read_openai(top, source, env, _SCALARS)
    return ServeConfig(
        config_path=source,
        model_path=model_path,
        model_family=_family(top, model),
        model_name=top.string("model_name", model_path.name),
        load_format=cast(LoadFormat, top.choice("load_format", ("auto", "dummy"), "auto")),
        device=cast(Device, top.choice("device", ("cuda", "cpu"), "cuda")),
        dtype=cast(DType, top.choice("dtype", ("auto", "float32", "bfloat16"), "auto")),
        max_batch_size=top.integer("max_batch_size", 256, low=1),
        max_prefill_tokens=top.integer("max_prefill_tokens", 8192, low=1),
        num_pages=top.integer("num_pages", 0),
        max_seq_len=top.integer("max_seq_len", low=2),
        gpu_memory_utilization=top.number("gpu_memory_utilization", 0.92, low=0.0, high=1.0, open_low=True),
        deterministic=top.boolean("deterministic", True),
        itl_target_ms=top.number("itl_target_ms", 100.0, low=0.0, open_low=True),
        max_queue_size=top.integer("max_queue_size", 4096, low=1),
        rank_timeout_s=top.number("rank_timeout_s", 60.0, low=0.0, open_low=True),
        host=top.string("host", "127.0.0.1"),
        http_port=top.integer("http_port", 8000, low=1, high=65535),
        grpc_port=top.integer("grpc_port", 8001, low=1, high=65535),
        metrics_port=top.integer("metrics_port", 8002, low=1, high=65535),
        openai_port=top.integer("openai_port", 9000, low=1, high=65535),
        exclude_input_in_output=top.boolean("exclude_input_in_output", True),
        allow_stop_by_id=top.boolean("allow_stop_by_id", False),
        max_orphan_s=top.number("max_orphan_s", 0.0, low=0.0),
        log_prompts=top.boolean("log_prompts", False),
        trace_endpoint=_trace_endpoint(top),
        torch_extensions_dir=_path(top, "torch_extensions_dir", source, environ.cache_dir(env)),
        kv_layout=_kv_layout(top, model),
        replicas=_replicas(top),
        generation=generation_defaults(top, model, model_path, vocab_size, _SCALARS),
        openai=openai,
        supervisor=read_supervisor(top, openai.drain_s if openai.workers else 0.0, _SCALARS),
        vocab_size=vocab_size,
        benchmark=_benchmark(top),
    )


def _path(top: Table, key: str, source: Path, default: Path | None) -> Path:
    if default is not None and not top.has(key):
        return default
    value = top.get(key)
    text = str(value) if isinstance(value, Path) else top.string(key)
    return Path(source.parent, text).resolve()


def _trace_endpoint(top: Table) -> str:
    value = top.string("trace_endpoint", "off")
    if value != "off" and not value.startswith(("http://", "https://")):
        raise top.error(
            "trace_endpoint", f'is {value!r}, needs a URL such as http://collector:4318/v1/traces, or "off".'
        )
    return value


def _family(top: Table, model: Table) -> str:
    family = top.choice("model_family", tuple(MODEL_FAMILIES), "deepseek")
    architectures = model.get("architectures")
    if not isinstance(architectures, list) or not any(name in MODEL_FAMILIES[family] for name in architectures):
        raise model.error(
            "architectures",
            f'is {architectures!r}, model_family = "{family}" covers {", ".join(MODEL_FAMILIES[family])}. '
            "Point model_path at such a model.",
        )
    return family


def _kv_layout(top: Table, model: Table) -> KVLayout:
    table = Table(top.get("kv_layout") or {}, top.source, "kv_layout")
    table.require_known(_KV_KEYS, _SCALARS)
    dims = {}
    for key, name in (
        ("kv_lora_rank", "kv_lora_rank"),
        ("qk_rope_head_dim", "qk_rope_head_dim"),
        ("num_layers", "num_hidden_layers"),
    ):
        dims[key] = model.integer(name, low=1)
        if table.has(key) and table.integer(key) != dims[key]:
            raise table.error(
                key,
                f"is {table.get(key)}, but the model's config.json has {name} = {dims[key]}. "
                "Remove the key: it is read from the model.",
            )
    page_size = table.integer("page_size", 64)
    if page_size not in PAGE_SIZES:
        raise table.error("page_size", f"is {page_size}, needs one of {', '.join(map(str, PAGE_SIZES))} tokens.")
    return KVLayout(**dims, page_size=page_size)


def _replicas(top: Table) -> tuple[ReplicaConfig, ...]:
    rows = top.get("replicas")
    if not isinstance(rows, list) or not rows:
        raise top.error("replicas", f"is {rows!r}, needs at least one [[replicas]] table with replica_id and gpus.")
    replicas = []
    for index, row in enumerate(rows):
        table = Table(row, top.source, f"replicas[{index}]")
        table.require_known(_REPLICA_KEYS, (*_SCALARS, *_TOP_TABLES))
        gpus = table.integers("gpus")
        if not gpus:
            raise table.error("gpus", "is empty, needs one number a rank, such as [0, 1, 2, 3, 4, 5, 6, 7].")
        role = cast(Role, table.choice("role", ("prefill", "decode", "both"), "both"))
        replicas.append(
            ReplicaConfig(
                replica_id=table.integer("replica_id"),
                gpus=gpus,
                role=role,
                loopback_ranks=table.integer("loopback_ranks", 0),
            )
        )
    return tuple(replicas)


def _benchmark(top: Table) -> Mapping[str, object]:
    values = top.get("benchmark")
    if values is None:
        return MappingProxyType({})
    if not isinstance(values, dict):
        raise top.error("benchmark", f"is {values!r}, not a table. Write it as [benchmark] with keys below it.")
    return MappingProxyType(dict(values))


def _check_lengths(config: ServeConfig, top: Table, model: Table) -> None:
    max_position = model.integer("max_position_embeddings", low=1)
    if config.max_seq_len > max_position:
        raise top.error(
            "max_seq_len",
            f"is {config.max_seq_len}, but the model has positions for {max_position} tokens. "
            f"Lower max_seq_len to <= {max_position}.",
        )
    needed = pages_per_sequence(config)
    if 0 < config.num_pages < needed:
        raise ConfigError(
            f"{top.source}: num_pages={config.num_pages} holds 0 sequences of max_seq_len={config.max_seq_len} "
            f"({needed} pages each). "
            f"Raise num_pages to >= {needed}, lower max_seq_len, or set num_pages = 0 to size it from free memory."
        )
    if config.generation.max_tokens is not None and config.generation.max_tokens >= config.max_seq_len:
        raise top.error(
            "generation.max_tokens",
            f"is {config.generation.max_tokens}, needs a value below max_seq_len={config.max_seq_len}.",
        )


def _check_ports(config: ServeConfig, top: Table) -> None:
    taken: dict[int, str] = {}
    for key in _PORTS:
        port = getattr(config, key)
        if port in taken:
            raise top.error(key, f"is {port}, and so is {taken[port]}. Give each port a number of its own.")
        taken[port] = key


def _check_replicas(config: ServeConfig, top: Table, model: Table) -> None:
    ids = [replica.replica_id for replica in config.replicas]
    if len(set(ids)) < len(ids):
        raise top.error("replicas", f"has the replica_ids {ids}. Give each replica an id of its own.")
    gpus = [
        gpu
        for replica in config.replicas
        for gpu in (set(replica.gpus) if config.device == "cuda" and replica.is_virtual else replica.gpus)
    ]
    twice = sorted({gpu for gpu in gpus if gpus.count(gpu) > 1})
    if twice:
        raise top.error(
            "replicas",
            f"uses gpus {twice} more than once. Each rank needs a number of its own, over all replicas "
            '(or, with device = "cuda", all ranks of a replica the same one: virtual ranks, for tests).',
        )
    num_experts = model.integer("n_routed_experts", low=1)
    for replica in config.replicas:
        _check_loopback(config, top, replica)
        if num_experts % replica.expert_ranks:
            raise top.error(
                f"replicas (replica_id {replica.replica_id})",
                f"has {replica.expert_ranks} {'loopback_ranks' if replica.loopback_ranks else 'gpus'}, which does not "
                f"divide the model's {num_experts} routed experts. "
                f"Use a divisor, such as {_divisor(num_experts, replica.expert_ranks)}.",
            )
    roles = {replica.role for replica in config.replicas}
    if "both" not in roles and roles != {"prefill", "decode"}:
        raise top.error(
            "replicas", f'has only the role {roles.pop()!r}. Add a replica of the other role, or use role = "both".'
        )


def _check_loopback(config: ServeConfig, top: Table, replica: ReplicaConfig) -> None:
    if replica.loopback_ranks == 0:
        return
    if config.device != "cuda" or len(replica.gpus) != 1 or config.load_format != "dummy" or replica.loopback_ranks < 2:
        raise top.error(
            f"replicas (replica_id {replica.replica_id}).loopback_ranks",
            f"is {replica.loopback_ranks} with {len(replica.gpus)} gpus, device = {config.device!r} and load_format = "
            f"{config.load_format!r}. One GPU stands for one of several ranks in benchmarks only, and its tokens mean "
            'nothing: needs 2 or more, one gpu, device = "cuda" and load_format = "dummy". Otherwise remove the key.',
        )


def _divisor(number: int, below: int) -> int:
    return max(value for value in range(1, below + 1) if number % value == 0)
