"""The sampler on a GPU: the same state, the same draws."""

from __future__ import annotations

import pytest
import torch

from nmoe_backend.runtime.sampler_plain import PlainSampler
from nmoe_backend.types import SamplingParams, SlotInit


@pytest.mark.gpu
def test_a_gpu_gives_the_same_tokens_and_logprobs_as_the_cpu():
    vocab, num_slots, num_steps, prompt = 4096, 24, 12, (3, 7, 7, 20)
    logits = torch.randn(num_steps, num_slots, vocab, generator=torch.Generator().manual_seed(11)) * 3
    params = [
        SamplingParams(
            temperature=(0.0, 0.6, 1.0, 1.3)[i % 4],
            top_k=(0, 50)[i % 2],
            top_p=(1.0, 0.9, 0.5)[i % 3],
            min_p=(0.0, 0.05)[i // 2 % 2],
            repetition_penalty=(1.0, 1.2)[i // 3 % 2],
            presence_penalty=(0.0, 0.4)[i // 4 % 2],
            logit_bias={i: 5.0} if i % 5 == 0 else {},
            bad_words_ids=((i, i + 1), (i + 2,)) if i % 7 == 0 else (),
            min_tokens=i % 6,
            seed=2**63 + i,
            num_logprobs=2 if i % 3 == 0 else None,
        )
        for i in range(num_slots)
    ]
    samplers = {device: PlainSampler(num_slots, vocab, 64, device) for device in ("cpu", "cuda")}
    for slot, p in enumerate(params):
        for sampler in samplers.values():
            sampler.admit(SlotInit(slot=slot, sampling=p, prompt_ids=prompt, stop_token_ids=(1, 2)))
    slots = list(range(num_slots))
    for step in range(num_steps):
        positions = [len(prompt) + step] * num_slots
        out = {device: s.sample(logits[step].to(device), slots, positions) for device, s in samplers.items()}
        assert torch.equal(out["cuda"].token_ids.cpu(), out["cpu"].token_ids)
        entries = {device: sampled.logprobs.on_host() for device, sampled in out.items()}
        torch.cuda.synchronize()
        got_entries = entries["cuda"].entries()
        for row, expected in entries["cpu"].entries().items():
            got = got_entries[row]
            assert abs(got.logprob - expected.logprob) < 1e-9
            assert [i for i, _ in got.top] == [i for i, _ in expected.top]
