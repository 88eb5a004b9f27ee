"""perf/lengths.py: what load tools ask for."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

from perf.lengths import MEAN_ANSWER, MEAN_PROMPT, Lengths, main, words


def test_the_means_are_sharegpts_and_a_seed_repeats_itself() -> None:
    draws = [[Lengths(max_prompt=10**6, max_answer=10**6).draw(random.Random(f"{seed}/{i}")) for i in range(20_000)]
             for seed in (1, 1, 2)]  # fmt: skip
    assert draws[0] == draws[1] != draws[2]
    prompts, answers = zip(*draws[0], strict=True)
    assert abs(statistics.fmean(prompts) / MEAN_PROMPT - 1) < 0.05
    assert abs(statistics.fmean(answers) / MEAN_ANSWER - 1) < 0.05
    assert 0.005 < sum(length > 1000 for length in prompts) / len(prompts) < 0.02


def test_what_is_longer_than_its_bound_is_drawn_again() -> None:
    rng = random.Random(0)
    prompts, answers = zip(*[Lengths(max_prompt=50, max_answer=60).draw(rng) for _ in range(2000)], strict=True)
    assert min(prompts) >= 1 and max(prompts) == 50 and max(answers) == 60
    assert prompts.count(50) < 0.05 * len(prompts)  # not cut to the bound


def test_a_text_has_so_many_words() -> None:
    assert len(words(random.Random(0), 37).split()) == 37


def test_the_committed_input_of_perf_analyzer_is_what_the_program_writes(capsys) -> None:
    assert main([]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written == json.loads((Path(__file__).parents[2] / "perf" / "perf_analyzer_input.json").read_text())
    assert len(written["data"]) == 32
