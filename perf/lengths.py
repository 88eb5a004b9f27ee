"""Lengths of prompts and answers as in conversations, drawn from a seeded distribution.

Both are log-normal. Their means are those of ShareGPT's conversations in Kwon et al., "Efficient Memory Management for
Large Language Model Serving with PagedAttention" (2023), figure 11: 161 tokens in, 338 out. The spreads are ours: wide
enough that one prompt in a hundred has more than a thousand tokens.

    python -m perf.lengths [--requests 32] [--seed 0] [--scale 0.25] [--longest 256] > perf/perf_analyzer_input.json
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MEAN_PROMPT, MEAN_ANSWER = 161.31, 337.99
SPREAD_PROMPT, SPREAD_ANSWER = 1.3, 1.0  # standard deviation of the logarithm
WORDS = (
    "the of and to in is that for it as was with be by on not he this are or his from at which but have an had they "
    "you were their one all we can her has there been if more when will would who so no"
)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """`scale` shortens everything, for small servers; what is longer than a bound is drawn again."""

    scale: float = 1.0
    max_prompt: int = 8192
    max_answer: int = 2048

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """(tokens of the prompt, tokens of the answer), 1 at least."""
        return (
            _log_normal(rng, MEAN_PROMPT * self.scale, SPREAD_PROMPT, self.max_prompt),
            _log_normal(rng, MEAN_ANSWER * self.scale, SPREAD_ANSWER, self.max_answer),
        )


def words(rng: random.Random, count: int) -> str:
    """A text of so many short words, most of which are one token."""
    return " ".join(rng.choices(WORDS.split(), k=count))


def _log_normal(rng: random.Random, mean: float, spread: float, most: int) -> int:
    return next(length for length in _lengths(rng, mean, spread) if length <= most)


def _lengths(rng: random.Random, mean: float, spread: float) -> Iterator[int]:
    while True:
        yield max(1, round(rng.lognormvariate(math.log(mean) - spread**2 / 2, spread)))


def analyzer_input(count: int, seed: int, lengths: Lengths) -> dict[str, object]:
    """What perf_analyzer's --input-data holds: requests of `deepseek_v3` or `ensemble` with answers of known length."""
    rng = random.Random(seed)
    data: list[dict[str, object]] = []
    for _ in range(count):
        prompt, answer = lengths.draw(rng)
        data.append(
            {
                "text_input": [words(rng, prompt)], "max_tokens": [answer], "min_length": [answer], "stream": [True],
                "bad_words": {"content": [""], "shape": [1]},
            }
        )  # fmt: skip
    return {"data": data}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the input of perf_analyzer."""
    parser = argparse.ArgumentParser(description="Requests with conversations' lengths, for perf_analyzer.")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=0.25, help="of the lengths")
    parser.add_argument("--longest", type=int, default=256, help="tokens of a prompt or an answer")
    args = parser.parse_args(argv)
    lengths = Lengths(scale=args.scale, max_prompt=args.longest, max_answer=args.longest)
    print(json.dumps(analyzer_input(args.requests, args.seed, lengths), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
