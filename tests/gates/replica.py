"""A replica without a control plane: workers in threads, plans written by hand, a greedy sampler that keeps the logits.

Also the tiny random model of transformers that ours is compared with, and its weights under our names. That mapping is
written out here on its own, apart from the loader's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmoe_backend.layers.context import LayerContext
from nmoe_backend.layers.table import TableRequest
from nmoe_backend.model import DecoderModel
from nmoe_backend.models import load_spec
from nmoe_backend.models.checkpoint import Checkpoint
from nmoe_backend.models.deepseek_v3 import spec_from_config
from nmoe_backend.models.spec import ModelSpec
from nmoe_backend.parallel.ranks import RankContext, RankGroup
from nmoe_backend.parallel.rdep import Rdep
from nmoe_backend.runtime.kv_cache import KVCache
from nmoe_backend.runtime.output import LogprobColumns, SampledTokens
from nmoe_backend.runtime.weights import load_rank_weights
from nmoe_backend.runtime.worker import Worker
from nmoe_backend.step_buckets import Bucket
from nmoe_backend.types import (
    EngineLimits,
    RankOutput,
    RankPlan,
    SamplingParams,
    SlotInit,
    StepPlan,
)

VOCAB_SIZE = 256


def position_error(ours: Tensor, reference: Tensor) -> float:
    """max |a - b| / max |b| of each position ([..., V]), the worst of them."""
    difference = (ours.double() - reference.double()).abs().amax(-1)
    return float((difference / reference.double().abs().amax(-1)).max())


def hf_model(seed: int = 0) -> torch.nn.Module:
    """transformers' DeepseekV3ForCausalLM, tiny, fp32; every tensor random, biases and norm weights too."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        q_lora_rank=48,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
        num_mtp_layers=0,
        eos_token_id=None,
        attn_implementation="eager",
        dtype=torch.float32,
    )
    model = DeepseekV3ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            tensor.copy_(1 + 0.3 * noise)
        elif "e_score_correction_bias" in name:
            tensor.copy_(0.1 * noise)
        elif "embed" in name:
            tensor.copy_(noise)
        else:
            tensor.copy_(noise * 1.5 * tensor.shape[-1] ** -0.5)
    return model


def hf_spec(model: torch.nn.Module) -> ModelSpec:
    """Our description of that model, from its config.json."""
    return spec_from_config(model.config.to_dict())


def rank_weights(model: torch.nn.Module, rank: int, world_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """One rank's tensors under the nmoe-sharded names."""
    names = {
        "self_attn.q_a_proj": "attn.wq_a",
        "self_attn.q_b_proj": "attn.wq_b",
        "self_attn.kv_a_proj_with_mqa": "attn.wkv_a",
        "self_attn.kv_b_proj": "attn.wkv_b",
        "self_attn.o_proj": "attn.wo",
        "self_attn.q_a_layernorm": "attn.q_norm",
        "self_attn.kv_a_layernorm": "attn.kv_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn.w1",
        "mlp.down_proj": "ffn.w2",
        "mlp.up_proj": "ffn.w3",
        "mlp.shared_experts.gate_proj": "ffn.shared.w1",
        "mlp.shared_experts.down_proj": "ffn.shared.w2",
        "mlp.shared_experts.up_proj": "ffn.shared.w3",
    }
    state = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    weights = {
        "embed.weight": state.pop("embed_tokens.weight").to(dtype),
        "norm.weight": state.pop("norm.weight").to(dtype),
        "lm_head.weight": state.pop("lm_head.weight").to(dtype),
    }
    for name, tensor in state.items():
        _, layer, rest = name.split(".", 2)
        prefix = f"layers.{layer}."
        if rest == "mlp.gate.weight":
            weights[prefix + "ffn.gate.weight"] = tensor.float()
        elif rest == "mlp.gate.e_score_correction_bias":
            weights[prefix + "ffn.gate.bias"] = tensor.float()
        elif rest in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
            short = "w13" if "gate_up" in rest else "w2"
            weights[f"{prefix}ffn.{short}"] = tensor.chunk(world_size)[rank].clone().to(dtype)
        else:
            weights[prefix + names[rest.removesuffix(".weight")] + ".weight"] = tensor.to(dtype)
    return weights


def weight_bytes_of(model: DecoderModel) -> int:
    """Bytes of storage behind every tensor that a rank's model reaches, exchange buffers and rope tables aside."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in _tensors(model, set())
        if not tensor.is_complex() and tensor.numel()
    }
    return sum(storages.values())


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that is reachable from an object of ours through attributes and containers."""
    if id(value) in seen or isinstance(value, Rdep):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item, seen)
    elif type(value).__module__.startswith("nmoe_backend.") and hasattr(value, "__dict__"):
        yield from _tensors(vars(value), seen)


@dataclass
class GreedySampler:
    """Argmax, or what `forced` says; keeps the logits that it was shown, by (slot, position of the next token)."""

    last_tokens: Tensor
    forced: dict[tuple[int, int], int] = field(default_factory=dict)
    seen: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    prompt_logits: list[Tensor] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)
    logits: None = None  # they may be anywhere

    @classmethod
    def build(cls, ops: object, limits: EngineLimits, context: RankContext) -> GreedySampler:
        num_slots = limits.max_batch_size + 1  # with one for padding
        return cls(torch.zeros(num_slots, dtype=torch.int64, device=context.device))

    def admit(self, init: SlotInit) -> None:
        self.admitted.append(init.slot)

    def capture(self, progress: object) -> None:
        pass

    def sample(self, logits: Tensor, slots: Sequence[int], positions: Sequence[int]) -> SampledTokens:
        for row, key in enumerate(zip(slots, positions, strict=True)):
            self.seen[key] = logits[row].clone()
        token_ids = logits.argmax(-1)
        for row, key in enumerate(zip(slots, positions, strict=True)):
            token_ids[row] = self.forced.get(key, token_ids[row])
        self.last_tokens[torch.tensor(slots, device=logits.device)] = token_ids
        return SampledTokens(token_ids=token_ids)

    def prompt_logprobs(self, logits: Tensor, target_ids: Sequence[int], num_top: int) -> LogprobColumns:
        self.prompt_logits.append(logits.clone())
        logprobs, targets = logits.double().log_softmax(-1), torch.tensor(target_ids, device=logits.device)
        none = logprobs[:, :0]
        return LogprobColumns(
            num_top=[0] * len(target_ids),
            token_ids=targets,
            logprobs=logprobs.gather(1, targets[:, None])[:, 0],
            top_ids=none,
            top_logprobs=none,
        )


def limits_for(world_size: int, page_size: int, **overrides: int) -> EngineLimits:
    values = {
        "num_pages": 512 // page_size * 4,
        "max_batch_size": 8,
        "max_prefill_tokens": 256,
        "max_seq_len": 512,
        **overrides,
    }
    return EngineLimits(
        num_ranks=world_size,
        page_size=page_size,
        max_queue_size=8,
        itl_target_ms=50.0,
        rank_timeout_s=60.0,
        eos_token_ids=(),
        vocab_size=VOCAB_SIZE,
        **values,
    )


class Replica:
    """Workers of one model on `world_size` ranks of one device, a thread each.

    `source`: a model of transformers, whose tensors are taken over, or a checkpoint's folder, read by our loader.
    """

    def __init__(
        self,
        source: torch.nn.Module | Path,
        world_size: int,
        page_size: int = 16,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        timeout_s: float = 60.0,
        pass_rows: int = 512,
        limits: EngineLimits | None = None,
        keep_quantized: bool = False,
        deterministic: bool = True,
        buckets: Sequence[Bucket] = (),
        capture: bool = True,
        make_sampler: Callable[..., Any] | None = None,
    ) -> None:
        """`make_sampler`: as build_sampler, instead of the greedy one."""
        self.spec = load_spec(source) if isinstance(source, Path) else hf_spec(source)
        self.limits = limits or limits_for(world_size, page_size)
        self.page_size = self.limits.page_size
        self.contexts = RankGroup.create(world_size, [device] * world_size, timeout_s)
        self.samplers, self.layer_contexts, self.workers, self.weights = [], [], [], []
        max_tokens = self.limits.max_batch_size + self.limits.max_prefill_tokens
        for context in self.contexts:
            request = TableRequest(
                spec=self.spec,
                max_tokens=max_tokens,
                dtype=dtype,
                keep_quantized=keep_quantized,
                deterministic=deterministic,
                pass_rows=pass_rows,
            )
            layer_context = LayerContext.create(context, request)
            weights = self._load(source, context, dtype, keep_quantized)
            decoder = DecoderModel(self.spec, weights, layer_context)
            cache = KVCache(self.spec, self.limits.num_pages, self.page_size, dtype, context.device)
            self.layer_contexts.append(layer_context)
            self.weights.append(weights)
            sampler = (make_sampler or GreedySampler.build)(decoder.ops, self.limits, context)
            self.samplers.append(sampler)
            self.workers.append(Worker(decoder, cache, sampler, self.limits, context, buckets))
        self._threads = ThreadPoolExecutor(world_size)
        if capture:
            list(self._threads.map(lambda worker: worker.capture(lambda line: None), self.workers))
        self._step_id = 0

    def _load(
        self, source: torch.nn.Module | Path, context: RankContext, dtype: torch.dtype, keep_quantized: bool
    ) -> dict[str, Tensor]:
        ranks = {"rank": context.rank, "world_size": context.world_size}
        if isinstance(source, Path):
            device = context.device
            return load_rank_weights(
                Checkpoint(source, self.spec), **ranks, device=device, dtype=dtype, keep_quantized=keep_quantized
            )
        weights = rank_weights(source, dtype=dtype, **ranks)
        return {name: tensor.to(context.device) for name, tensor in weights.items()}

    def step(self, *plans: RankPlan) -> list[RankOutput]:
        """One step of all ranks; ranks without a plan get an empty one. Raises the first rank's error."""
        return [future.result() for future in self.launch(*plans)]

    def launch(self, *plans: RankPlan) -> list:
        self._step_id += 1
        padded = (*plans, *(RankPlan() for _ in range(len(self.workers) - len(plans))))
        step = StepPlan(step_id=self._step_id, ranks=padded)
        return [self._threads.submit(lambda w=worker: w.execute(step).wait(60.0)) for worker in self.workers]

    def close(self) -> None:
        self._threads.shutdown(wait=True)
        for worker in self.workers:
            worker.close()


@dataclass
class _Running:
    slot: int
    rank: int
    prompt: list[int]
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    tokens: list[int] = field(default_factory=list)
    prompt_logits: list[Tensor] = field(default_factory=list)


@dataclass
class Generated:
    tokens: list[int]
    logits: Tensor  # [prompt + tokens - 1, V]: at every position that was fed


class Driver:
    """Greedy generation of several prompts at once: chunks of at most `chunk` tokens, one page at a time per need.

    Pages are handed out in a scrambled order, so that nothing works by accident of neighbouring pages.
    """

    def __init__(self, replica: Replica, seed: int = 0) -> None:
        self._replica = replica
        generator = torch.Generator().manual_seed(seed)
        count = replica.limits.num_pages
        self._free = [torch.randperm(count, generator=generator).tolist() for _ in replica.workers]

    def generate(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, chunk: int = 10**6, *, starts: int = 1
    ) -> list[Generated]:
        """Prompt i runs on rank i % world. Prompts whose turn has not come start later: `starts` new ones a step."""
        world = len(self._replica.workers)
        running = [_Running(i // world, i % world, list(prompt)) for i, prompt in enumerate(prompts)]
        num_started = 0
        while any(len(seq.tokens) < num_tokens for seq in running):
            num_started = min(num_started + starts, len(running))
            live = [seq for seq in running[:num_started] if len(seq.tokens) < num_tokens]
            rows = [[seq for seq in live if seq.rank == rank] for rank in range(world)]
            for ranked in rows:
                ranked.sort(key=lambda seq: seq.num_computed < len(seq.prompt))  # decode rows first
            shown = [len(sampler.prompt_logits) for sampler in self._replica.samplers]
            outputs = self._replica.step(*(self._plan(ranked, chunk) for ranked in rows))
            for rank, (ranked, output) in enumerate(zip(rows, outputs, strict=True)):
                self._commit(ranked, output, self._replica.samplers[rank].prompt_logits[shown[rank] :], chunk)
        return [self._result(seq) for seq in running]

    def _plan(self, rows: list[_Running], chunk: int) -> RankPlan:
        new_pages, admitted, token_ids, lengths, samples = [], [], [], [], []
        for seq in rows:
            decodes = seq.num_computed >= len(seq.prompt)
            length = 1 if decodes else min(chunk, len(seq.prompt) - seq.num_computed)
            while len(seq.pages) * self._replica.page_size < seq.num_computed + length:
                seq.pages.append(self._free[seq.rank].pop())
                new_pages.append((seq.slot, len(seq.pages) - 1, seq.pages[-1]))
            if seq.num_computed == 0:
                sampling = SamplingParams(temperature=0.0, num_prompt_logprobs=0)
                admitted.append(SlotInit(slot=seq.slot, sampling=sampling, prompt_ids=tuple(seq.prompt)))
            if not decodes:
                token_ids += seq.prompt[seq.num_computed : seq.num_computed + length]
            lengths.append(length)
            samples.append(seq.num_computed + length >= len(seq.prompt))
        return RankPlan(
            slots=[seq.slot for seq in rows],
            starts=[seq.num_computed for seq in rows],
            lengths=lengths,
            num_decode=sum(seq.num_computed >= len(seq.prompt) for seq in rows),
            token_ids=token_ids,
            samples=samples,
            new_pages=new_pages,
            admitted=admitted,
        )

    def _commit(self, rows: list[_Running], output: RankOutput, prompt_logits: list[Tensor], chunk: int) -> None:
        sampled, slices = iter(output.token_ids), iter(prompt_logits)
        for seq in rows:
            if seq.num_computed >= len(seq.prompt):
                seq.num_computed += 1
                seq.tokens.append(next(sampled))
                continue
            length = min(chunk, len(seq.prompt) - seq.num_computed)
            missing = min(length, len(seq.prompt) - seq.num_computed - 1)
            while missing > 0:
                part = next(slices)
                seq.prompt_logits.append(part)
                missing -= part.shape[0]
            seq.num_computed += length
            if seq.num_computed == len(seq.prompt):
                seq.tokens.append(next(sampled))

    def _result(self, seq: _Running) -> Generated:
        seen = self._replica.samplers[seq.rank].seen
        positions = range(len(seq.prompt), len(seq.prompt) + len(seq.tokens))
        decoded = torch.stack([seen[seq.slot, position] for position in positions])
        return Generated(seq.tokens, torch.cat((*seq.prompt_logits, decoded)).cpu())
