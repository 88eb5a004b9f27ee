"""Gate: text in, the right tokens out, through scheduler, eight ranks, RDEP, paged cache and sampler.

References: transformers' DeepseekV3ForCausalLM on the same checkpoint, in fp32. Identity under batching, chunking and
preemption is token for token, in fp32.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nmoe_backend.convert import main as convert
from nmoe_backend.orchestrator import Orchestrator
from nmoe_backend.types import ErrorKind, RequestError, SamplingParams
from tests.generation import GREEDY, Collected, engine_of, generate, replace, request_of, serve_config, tokens

SEEDED = SamplingParams(temperature=0.8, top_p=0.95, top_k=50, seed=1234, max_tokens=24, ignore_eos=True)
LONG_GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> torch.nn.Module:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orchestrator]:
    """Eight ranks, roomy."""
    with engine_of(serve_config(tmp_path_factory.mktemp("roomy"), tiny_checkpoint, num_ranks=8)) as started:
        yield started


def prompts_of(count: int, low: int, high: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(30, 1000) for _ in range(draw.randint(low, high))] for _ in range(count)]


@torch.inference_mode()
def greedy_reference(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    past, out = None, []
    for _ in range(count):
        step = model(ids, past_key_values=past, use_cache=True)
        past, ids = step.past_key_values, step.logits[:, -1:].argmax(-1)
        out.append(int(ids))
    return out


@torch.inference_mode()
def logprobs_reference(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_greedy_tokens_equal_transformers_for_64_steps(engine: Orchestrator, reference: torch.nn.Module) -> None:
    prompts = prompts_of(10, 1, 90)
    for prompt, got in zip(prompts, tokens(generate(engine, prompts, LONG_GREEDY)), strict=True):
        assert got == greedy_reference(reference, prompt, 64)


@pytest.mark.parametrize("sampling", [LONG_GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_request_gives_the_same_tokens_alone_and_among_64_others(
    engine: Orchestrator, sampling: SamplingParams
) -> None:
    prompts = prompts_of(4, 5, 60, seed=1)
    alone = [tokens(generate(engine, [prompt], sampling))[0] for prompt in prompts]
    crowd = prompts_of(64, 1, 90, seed=2)
    assert tokens(generate(engine, crowd + prompts, sampling))[-4:] == alone


def test_chunked_prefill_gives_the_same_tokens(engine: Orchestrator, tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompts = prompts_of(6, 60, 200, seed=3)
    whole = tokens(generate(engine, prompts, LONG_GREEDY))
    config = serve_config(tmp_path, tiny_checkpoint, num_ranks=8, max_prefill_tokens=17)
    with engine_of(config) as chunked:
        assert tokens(generate(chunked, prompts, LONG_GREEDY)) == whole


@pytest.mark.parametrize("sampling", [LONG_GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_preempted_requests_give_the_same_tokens(
    engine: Orchestrator, tiny_checkpoint: Path, tmp_path: Path, sampling: SamplingParams
) -> None:
    prompts = prompts_of(24, 20, 60, seed=4)
    roomy = tokens(generate(engine, prompts, sampling))
    config = serve_config(tmp_path, tiny_checkpoint, num_ranks=2, num_pages=12, max_seq_len=160)
    with engine_of(config) as cramped:
        assert tokens(generate(cramped, prompts, sampling)) == roomy
        stats = cramped.stats()
    assert stats.preemptions_total > 0
    assert stats.pages_used == 0


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_number_of_ranks_changes_no_token(
    engine: Orchestrator, tiny_checkpoint: Path, tmp_path: Path, num_ranks: int
) -> None:
    prompts = prompts_of(8, 1, 90, seed=5)
    eight = tokens(generate(engine, prompts, LONG_GREEDY))
    with engine_of(serve_config(tmp_path, tiny_checkpoint, num_ranks=num_ranks)) as other:
        assert tokens(generate(other, prompts, LONG_GREEDY)) == eight


def test_the_sharded_form_gives_the_same_tokens(engine: Orchestrator, tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompts = prompts_of(4, 1, 60, seed=6)
    sharded = tmp_path / "sharded"
    assert convert(["--from", str(tiny_checkpoint), "--to", str(sharded), "--world", "4"]) == 0
    with engine_of(serve_config(tmp_path, sharded, num_ranks=4)) as other:
        assert tokens(generate(other, prompts, LONG_GREEDY)) == tokens(generate(engine, prompts, LONG_GREEDY))


def test_logprobs_equal_transformers(engine: Orchestrator, reference: torch.nn.Module) -> None:
    prompt = prompts_of(1, 40, 40, seed=7)[0]
    sampling = replace(GREEDY, num_logprobs=5, num_prompt_logprobs=3)
    (got,) = generate(engine, [prompt], sampling)
    expected = logprobs_reference(reference, prompt + got.token_ids)
    assert len(got.logprobs) == len(got.token_ids) == 16
    for index, entry in enumerate(got.logprobs):
        row = expected[len(prompt) - 1 + index]
        assert entry.token_id == got.token_ids[index]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [pair[0] for pair in entry.top] == row.topk(5).indices.tolist()
    assert [entry.token_id for entry in got.prompt_logprobs] == prompt[1:]
    for index, entry in enumerate(got.prompt_logprobs):
        assert entry.logprob == pytest.approx(float(expected[index, entry.token_id]), abs=1e-4)
        assert len(entry.top) == 3


def test_prompt_logprobs_survive_chunking(tiny_checkpoint: Path, tmp_path: Path, reference: torch.nn.Module) -> None:
    prompt = prompts_of(1, 100, 100, seed=8)[0]
    expected = logprobs_reference(reference, prompt)
    with engine_of(serve_config(tmp_path, tiny_checkpoint, max_prefill_tokens=16)) as chunked:
        (got,) = generate(chunked, [prompt], replace(GREEDY, max_tokens=0, num_prompt_logprobs=0))
    assert (got.token_ids, got.finish_reason) == ([], "length")
    assert [entry.token_id for entry in got.prompt_logprobs] == prompt[1:]
    for index, entry in enumerate(got.prompt_logprobs):
        assert entry.logprob == pytest.approx(float(expected[index, entry.token_id]), abs=1e-4)


def test_an_embedding_is_the_mean_of_the_last_hidden_state(engine: Orchestrator, reference: torch.nn.Module) -> None:
    prompt = prompts_of(1, 70, 70, seed=9)[0]
    sink = Collected()
    engine.submit(request_of(prompt, replace(GREEDY, max_tokens=0), embed=True), sink)
    got = torch.tensor(sink.result().embedding)
    with torch.inference_mode():
        expected = reference.model(torch.tensor([prompt])).last_hidden_state[0].mean(0)
    assert sink.finish_reason == "stop"
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-4


def test_stop_token_ends_with_stop_and_is_delivered(engine: Orchestrator) -> None:
    prompt = prompts_of(1, 30, 30, seed=10)[0]
    (free,) = generate(engine, [prompt], LONG_GREEDY)
    stop_id = free.token_ids[5]
    expected = free.token_ids[: free.token_ids.index(stop_id) + 1]
    (got,) = generate(engine, [prompt], replace(LONG_GREEDY, stop_token_ids=(stop_id,)))
    assert (got.token_ids, got.finish_reason) == (expected, "stop")


def test_min_tokens_bans_the_stop_token_until_then(engine: Orchestrator) -> None:
    prompt = prompts_of(1, 30, 30, seed=10)[0]
    (free,) = generate(engine, [prompt], LONG_GREEDY)
    sampling = replace(LONG_GREEDY, stop_token_ids=(free.token_ids[3],), min_tokens=20)
    (got,) = generate(engine, [prompt], sampling)
    assert len(got.token_ids) > 20 or got.finish_reason == "length"
    assert free.token_ids[3] not in got.token_ids[:20]


def test_finish_reason_length_and_the_default_max_tokens(
    tiny_checkpoint: Path, tmp_path: Path, engine: Orchestrator
) -> None:
    prompt = prompts_of(1, 30, 30, seed=11)[0]
    (got,) = generate(engine, [prompt], replace(LONG_GREEDY, max_tokens=7))
    assert (len(got.token_ids), got.finish_reason) == (7, "length")
    with engine_of(serve_config(tmp_path, tiny_checkpoint, max_seq_len=100)) as short:
        (rest,) = generate(short, [prompt], replace(LONG_GREEDY, max_tokens=None))
    assert (len(rest.token_ids), rest.finish_reason) == (70, "length")


def test_too_long_a_request_names_both_numbers(engine: Orchestrator) -> None:
    with pytest.raises(RequestError, match=r"(?s)500.*100.*512") as caught:
        engine.submit(request_of([40] * 500, replace(GREEDY, max_tokens=100)), Collected())
    assert caught.value.kind is ErrorKind.INVALID


def test_a_cancelled_request_ends_and_gives_its_pages_back(engine: Orchestrator) -> None:
    sink = Collected()
    request = request_of([50] * 40, replace(LONG_GREEDY, max_tokens=400))
    engine.submit(request, sink)
    assert sink.first.wait(30)
    engine.cancel(request.request_id)
    assert sink.result().finish_reason == "cancelled"
    generate(engine, [[41, 42]], replace(GREEDY, max_tokens=2))  # the pages are back by the next step
    assert engine.stats().pages_used == 0


def test_mixed_parameters_in_one_batch_do_not_touch_each_other(engine: Orchestrator) -> None:
    prompt = prompts_of(1, 25, 25, seed=12)[0]
    variants = [
        LONG_GREEDY,
        SEEDED,
        replace(SEEDED, seed=99),
        replace(LONG_GREEDY, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
        replace(LONG_GREEDY, logit_bias={77: 100.0}, max_tokens=5),
        replace(SEEDED, min_p=0.1, top_k=0),
    ]
    alone = [generate(engine, [prompt], sampling)[0].token_ids for sampling in variants]
    sinks = [Collected() for _ in variants]
    for sampling, sink in zip(variants, sinks, strict=True):
        engine.submit(request_of(prompt, sampling), sink)
    assert [sink.result().token_ids for sink in sinks] == alone
    assert alone[4] == [77] * 5
    assert len({tuple(one) for one in alone}) == len(variants)
