"""What a worker returns besides tokens, and how it fails."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch

from nmoe_backend.runtime.kv_cache import KVCache
from nmoe_backend.types import ConfigError, RankError, RankPlan, SamplingParams, SlotInit
from tests.gates.replica import Replica, limits_for

PROMPT = tuple(range(40, 75))


def _chunk(init: SlotInit, start: int, stop: int, *, samples: bool) -> RankPlan:
    """Prompt tokens [start, stop) of slot 1; pages 3, 4, 5, ... are announced with the first chunk."""
    first = start == 0
    return RankPlan(
        slots=[1],
        starts=[start],
        lengths=[stop - start],
        token_ids=init.prompt_ids[start:stop],
        samples=[samples],
        new_pages=[(1, index, 3 + index) for index in range(4)] if first else (),
        admitted=[init] if first else (),
    )


def _init(**values: object) -> SlotInit:
    sampling = values.pop("sampling", SamplingParams())
    return SlotInit(slot=1, sampling=sampling, prompt_ids=PROMPT, **values)


def test_prompt_logprobs_cover_tokens_1_to_len_whatever_the_chunks(tiny_model):
    init = _init(sampling=SamplingParams(num_prompt_logprobs=0))
    with torch.inference_mode():
        logprobs = tiny_model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    want = [float(logprobs[position - 1, PROMPT[position]]) for position in range(1, len(PROMPT))]
    for bounds in ([0, 35], [0, 16, 17, 35], [0, 34, 35]):
        replica = Replica(tiny_model, 2)
        got = []
        for start, stop in itertools.pairwise(bounds):
            outputs = replica.step(RankPlan(), _chunk(init, start, stop, samples=stop == 35))
            got += outputs[1].prompt_logprobs.get(0, [])
        replica.close()
        assert [entry.token_id for entry in got] == list(PROMPT[1:])
        assert [entry.logprob for entry in got] == pytest.approx(want, abs=1e-4)


def test_embedding_is_the_mean_hidden_state_and_comes_with_the_last_chunk(tiny_model):
    with torch.inference_mode():
        want = tiny_model.model(torch.tensor([PROMPT])).last_hidden_state[0].mean(0).tolist()
    for bounds in ([0, 35], [0, 20, 35]):
        replica = Replica(tiny_model, 2)
        found = []
        for start, stop in itertools.pairwise(bounds):
            outputs = replica.step(RankPlan(), _chunk(_init(embed=True), start, stop, samples=False))
            assert outputs[1].token_ids == ()
            found.append(outputs[1].embeddings.get(0))
        replica.close()
        assert found[:-1] == [None] * (len(bounds) - 2)
        assert found[-1] == pytest.approx(want, abs=1e-5)


def test_a_slot_that_is_used_again_starts_from_nothing(tiny_model):
    """An embedding request that was dropped half-way leaves no sum behind for the next one in its slot."""
    replica = Replica(tiny_model, 1)
    replica.step(_chunk(_init(embed=True), 0, 20, samples=False))
    again = replica.step(_chunk(_init(embed=True), 0, 35, samples=False))[0].embeddings[0]
    fresh = Replica(tiny_model, 1)
    assert again == fresh.step(_chunk(_init(embed=True), 0, 35, samples=False))[0].embeddings[0]
    replica.close()
    fresh.close()


def test_a_plan_beyond_the_limits_is_refused_before_anything_runs(tiny_model):
    replica = Replica(tiny_model, 1, limits=limits_for(1, 16, max_prefill_tokens=16))
    with pytest.raises(AssertionError, match="max_prefill_tokens=16"):
        replica.step(_chunk(_init(), 0, 17, samples=False))
    replica.close()


def test_an_error_in_one_rank_releases_its_peers_at_once(tiny_model):
    """The bound on a wait is a minute here; nobody waits for it."""
    replica = Replica(tiny_model, 4, timeout_s=60.0)

    def fail(init: SlotInit) -> None:
        raise ValueError("broken sampler")

    replica.samplers[2].admit = fail
    futures = replica.launch(RankPlan(), RankPlan(), _chunk(_init(), 0, 5, samples=True))
    errors = [future.exception(timeout=30.0) for future in futures]
    assert isinstance(errors[2], ValueError)
    assert all(isinstance(errors[rank], RankError) for rank in (0, 1, 3))
    with pytest.raises(RankError, match="restarted"):
        replica.step()
    replica.close()


def test_closing_releases_cache_and_buffers(tiny_model):
    replica = Replica(tiny_model, 2)
    replica.step(_chunk(_init(), 0, 35, samples=True))
    held = [
        weakref.ref(replica.workers[0]._kv_cache.layers[0]),
        weakref.ref(replica.layer_contexts[0].exchange.rdep.buffers.payload),
    ]
    replica.close()
    replica.close()
    replica.layer_contexts.clear()
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    with pytest.raises(RankError, match="closed"):
        replica.workers[0].execute(None)


def test_a_page_size_outside_16_to_64_is_an_error(tiny_model):
    with pytest.raises(ConfigError, match="page_size=8"):
        KVCache(Replica(tiny_model, 1).spec, 3, 8, torch.float32, torch.device("cpu"))
