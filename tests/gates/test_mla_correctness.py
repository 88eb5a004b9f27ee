"""Our decoder gives the logits of transformers: every form of attention, any paging, any number of ranks."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.gates.replica import VOCAB_SIZE, Driver, Generated, Replica, position_error

TOLERANCE = 1e-4  # fp32; measured 4e-6


def _prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def _reference_logits(model: torch.nn.Module, prompt: list[int], result: Generated) -> torch.Tensor:
    """[prompt + tokens - 1, V] of transformers for what our replica was fed."""
    with torch.inference_mode():
        return model(torch.tensor([prompt + result.tokens[:-1]])).logits[0]


@pytest.mark.parametrize("chunk", [1000, 13], ids=["whole prompts", "chunks of 13"])
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_logits_equal_transformers_at_every_position(tiny_model, device, world_size, page_size, chunk):
    """Prompts start in different steps, so decode rows and chunks share steps and ranks without rows take part."""
    prompts = _prompts(1, 17, 64, 100, 33)
    replica = Replica(tiny_model, world_size, page_size, device=device)
    results = Driver(replica).generate(prompts, num_tokens=12, chunk=chunk)
    replica.close()
    for prompt, result in zip(prompts, results, strict=True):
        assert result.logits.shape == (len(prompt) + 11, VOCAB_SIZE)
        assert position_error(result.logits, _reference_logits(tiny_model, prompt, result)) < TOLERANCE


@pytest.mark.parametrize("world_size", [1, 8])
def test_greedy_tokens_equal_transformers_for_64_steps(tiny_model, device, world_size):
    prompts = _prompts(5, 40)
    replica = Replica(tiny_model, world_size, device=device)
    results = Driver(replica).generate(prompts, num_tokens=64)
    replica.close()
    for prompt, result in zip(prompts, results, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            reference = tiny_model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=0
            )
        assert result.tokens == reference[0, len(prompt) :].tolist()


@pytest.mark.parametrize("world_size", [1, 8])
def test_a_checkpoint_on_disk_gives_the_logits_of_transformers(tiny_checkpoint, device, world_size):
    """Through our config reader, name table and loader, where the other tests copy the tensors over themselves."""
    reference = AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompts = _prompts(3, 50)
    replica = Replica(tiny_checkpoint, world_size, device=device)
    results = Driver(replica).generate(prompts, num_tokens=8, chunk=20)
    replica.close()
    for prompt, result in zip(prompts, results, strict=True):
        assert position_error(result.logits, _reference_logits(reference, prompt, result)) < TOLERANCE


def test_a_request_gives_the_same_tokens_alone_in_a_batch_and_in_chunks(tiny_model):
    prompts = _prompts(*range(20, 52))
    replica = Replica(tiny_model, 8)
    together = Driver(replica).generate(prompts, num_tokens=16)
    replica.close()
    for chunk in (1000, 7):
        replica = Replica(tiny_model, 8)
        alone = Driver(replica).generate(prompts[:1], num_tokens=16, chunk=chunk)
        replica.close()
        assert alone[0].tokens == together[0].tokens


def test_bf16_stays_as_near_to_fp32_as_transformers_in_bf16_does(tiny_model):
    """bf16 keeps 8 bits; both round alike, so ours may be off by no more than twice what theirs is."""
    prompts = _prompts(60)
    replica = Replica(tiny_model, 2, dtype=torch.bfloat16)
    result = Driver(replica).generate(prompts, num_tokens=1)[0]
    replica.close()
    exact = _reference_logits(tiny_model, prompts[0], result)
    half = copy.deepcopy(tiny_model).to(torch.bfloat16)
    with torch.inference_mode():
        theirs = half(torch.tensor([prompts[0]])).logits[0]
    error = (result.logits - exact).abs().mean()
    assert error < 2 * (theirs.float() - exact).abs().mean()


@pytest.mark.parametrize("page_size", [16, 64])
def test_what_a_page_held_before_never_reaches_another_sequence(tiny_model, device, page_size):
    """NaN everywhere in the cache before the first step: only what was written by the sequence itself is read."""
    prompts = _prompts(1, 30, 47)
    replica = Replica(tiny_model, 2, page_size, device=device)
    for worker in replica.workers:
        for cache in worker._kv_cache.layers:
            cache.fill_(float("nan"))
    results = Driver(replica).generate(prompts, num_tokens=20, chunk=11)
    replica.close()
    for prompt, result in zip(prompts, results, strict=True):
        assert position_error(result.logits, _reference_logits(tiny_model, prompt, result)) < TOLERANCE
