"""What structured output costs: compiling a guide, a row's mask, and what a step with such rows pays.

    python -m perf.bench_grammar                       # the tables, then one JSON line
    python -m perf.bench_grammar --save perf/baselines/cpu.json
    python -m perf.bench_grammar --xgrammar            # where xgrammar is installed: the same guides through it

V = 129,280. The tokenizer is a byte-level BPE trained on the standard library's sources (5 s): tokens of the lengths
that code and English have; no checkpoint is needed. Each schema is walked along JSON texts of it (seeded), a token at a
time, as a model under its grammar would write them. `step` is the rank's part of a step with so many constrained rows:
advance the matchers, fill the bitmask, upload it; `apply` is the sampler's use of it on logits [rows, V], on a GPU with
the wait for the device.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nmoe_backend.grammar import GrammarCompiler
from nmoe_backend.kernels.sampling import bits_of, restrict
from nmoe_backend.runtime.grammar_masks import GrammarMasks
from nmoe_backend.text import Text
from nmoe_backend.types import Guide, SamplingParams, SlotInit
from perf import results

VOCAB_SIZE = 129_280
TRAINED_SIZE = 128_815  # DeepSeek-V3's tokenizer; what lies between is padding
SPECIAL = ["<bos>", "<eos>"]
EOS_ID = 1
TEXTS = 12  # walked per schema
ROWS = (1, 8, 64, 256)
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "small", "engines"]


def make_tokenizer(folder: Path) -> Text:
    """tokenizer.json of TRAINED_SIZE ids or a little less."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TRAINED_SIZE,
        min_frequency=1,
        show_progress=False,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    texts = (
        path.read_text(encoding="utf-8", errors="replace") for path in sources if "site-packages" not in path.parts
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return Text(folder)


# --- schemas, and texts of them


def _object(num_fields: int, depth: int, max_length: int | None) -> dict[str, Any]:
    string: dict[str, Any] = {"type": "string"} | ({"maxLength": max_length} if max_length else {})
    kinds = [
        string,
        {"type": "integer", "minimum": 0, "maximum": 1000},
        {"enum": ["alpha", "beta", "gamma"]},
        {"type": "array", "items": string, "maxItems": 4},
        {"type": "boolean"},
        {"type": "number"},
    ]
    fields = {f"field_{n}": kinds[n % len(kinds)] for n in range(num_fields)}
    if depth:
        fields["child"] = _object(num_fields, depth - 1, max_length)
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def schemas() -> dict[str, dict[str, Any]]:
    """Name -> schema: a small one, a tool's, a large one, strings of bounded length, and free JSON."""
    return {
        "3 fields": _object(3, 0, None),
        "20 fields": _object(20, 0, None),
        "20 fields, maxLength 200": _object(20, 0, 200),
        "40 fields, 8 deep": _object(40, 8, None),
        "1,000 enum values": {"enum": [f"value number {n}" for n in range(1000)]},
        "any object": {"type": "object"},
    }


def text_of(schema: dict[str, Any], draw: random.Random) -> Any:
    """A value of the schema."""
    if "enum" in schema:
        return draw.choice(schema["enum"])
    match schema["type"]:
        case "object":
            fields = schema.get("properties") or {word: {"type": "string"} for word in draw.sample(WORDS, 4)}
            return {name: text_of(field, draw) for name, field in fields.items()}
        case "array":
            return [text_of(schema["items"], draw) for _ in range(draw.randint(0, 4))]
        case "string":
            return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 20)))
        case "integer":
            return draw.randint(0, 1000)
        case "number":
            return round(draw.uniform(-100, 100), 3)
        case _:
            return draw.random() < 0.5


# --- measurements


def summary(seconds: list[float]) -> dict[str, float]:
    """Microseconds."""
    return {
        "p50_us": round(median(seconds) * 1e6, 1),
        "p99_us": round(quantiles(seconds, n=100)[98] * 1e6, 1),
        "max_us": round(max(seconds) * 1e6, 1),
    }


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def bench_masks(compiler: GrammarCompiler, paths: dict[str, list[list[int]]]) -> list[dict[str, Any]]:
    """One row at a time: compile, mask and advance."""
    rows = []
    bitmask = torch.zeros(1, -(-VOCAB_SIZE // 32), dtype=torch.int32)
    for name, schema in schemas().items():
        guide = Guide(type="json_schema", text=json.dumps(schema))
        compile_s = timed(lambda guide=guide: compiler.compile(guide).result())
        grammar = compiler.compile(guide).result()
        masks, advances = [], []
        for path in paths[name]:
            matcher = grammar.matcher()
            for token_id in path:
                masks.append(timed(lambda: grammar.fill_masks([matcher], bitmask.numpy().data)))  # noqa: B023
                advances.append(timed(lambda: matcher.advance((token_id,))))  # noqa: B023
            assert matcher.error() is None, matcher.error()
        rows.append(
            {
                "schema": name,
                "bytes": len(guide.text),
                "compile_ms": round(compile_s * 1e3, 2),
                "tokens": len(masks),
                "mask": summary(masks),
                "advance": summary(advances),
            }
        )
    return rows


def bench_xgrammar(tokenizer: Tokenizer, paths: dict[str, list[list[int]]]) -> list[dict[str, Any]]:
    """The same through xgrammar's matcher, which keeps masks of tokens that do not depend on the stack."""
    import xgrammar  # not a dependency

    vocab = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    info = xgrammar.TokenizerInfo(
        vocab, xgrammar.VocabType.BYTE_LEVEL, vocab_size=VOCAB_SIZE, stop_token_ids=[EOS_ID], add_prefix_space=False
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=8)
    bitmask = xgrammar.allocate_token_bitmask(1, VOCAB_SIZE)
    rows = []
    for name, schema in schemas().items():
        text = json.dumps(schema)
        compile_s = timed(lambda text=text: compiler.compile_json_schema(text))
        grammar = compiler.compile_json_schema(text)
        masks, advances, refused = [], [], 0
        for path in paths[name]:
            matcher = xgrammar.GrammarMatcher(grammar)
            for token_id in path:
                masks.append(timed(lambda: matcher.fill_next_token_bitmask(bitmask)))  # noqa: B023
                began = time.perf_counter()
                if not matcher.accept_token(token_id):
                    refused += 1
                    break
                advances.append(time.perf_counter() - began)
        rows.append(
            {
                "schema": name,
                "compile_ms": round(compile_s * 1e3, 2),
                "tokens": len(masks),
                "texts_refused": refused,
                "mask": summary(masks),
                "advance": summary(advances),
            }
        )
    return rows


def bench_steps(compiler: GrammarCompiler, path: list[int], device: torch.device) -> list[dict[str, Any]]:
    """The rank's part of a step, by number of constrained rows; each at another place of one text."""
    guide = Guide(type="json_schema", text=json.dumps(schemas()["20 fields"]))
    grammar = compiler.compile(guide).result()
    rows = []
    for count in ROWS:
        masks = GrammarMasks(count, VOCAB_SIZE, device)
        for slot in range(count):
            sampling = SamplingParams(seed=0, grammar=grammar)
            done = tuple(path[: slot % (len(path) // 2)])
            masks.admit(SlotInit(slot=slot, sampling=sampling, prompt_ids=(5,), output_ids=done))
        logits = torch.randn(count, VOCAB_SIZE, device=device)
        fills, applies = [], []
        for step in range(len(path) // 2):
            began = time.perf_counter()
            filled = masks.step(range(count))
            fills.append(time.perf_counter() - began)
            assert filled is not None and not filled.failed
            _synchronize(device)
            began = time.perf_counter()
            restrict(logits, bits_of(filled.words, VOCAB_SIZE))
            _synchronize(device)
            applies.append(time.perf_counter() - began)
            ids = [path[slot % (len(path) // 2) + step] for slot in range(count)]
            masks.record(filled, torch.tensor(ids, device=device))
        rows.append({"rows": count, "fill_and_upload": summary(fills[2:]), "apply": summary(applies[2:])})
    return rows


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--xgrammar", action="store_true")
    parser.add_argument("--save", type=Path, metavar="BASELINE", help="write the result there, as its entry `grammar`")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        text = make_tokenizer(Path(folder))
        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        began = time.perf_counter()
        compiler = GrammarCompiler(text, Path(folder), vocab_size=VOCAB_SIZE, eos_token_ids=(EOS_ID,))
        start_s = round(time.perf_counter() - began, 2)
    draw = random.Random(0)
    paths = {
        name: [text.encode_plain(json.dumps(text_of(schema, draw))) for _ in range(TEXTS)]
        for name, schema in schemas().items()
    }
    result: dict[str, Any] = {
        "name": "grammar",
        "commit": results.commit_id(),
        "machine": f"{results.machine()}, {device}",
        "method": "perf/bench_grammar.py, llguidance, V = 129,280",
        "start_s": start_s,
        "masks": bench_masks(compiler, paths),
    }
    result["steps"] = bench_steps(compiler, max(paths["20 fields"], key=len), device)
    if args.xgrammar:
        result["xgrammar"] = bench_xgrammar(tokenizer, paths)
    compiler.close()
    for table in ("masks", "steps", "xgrammar"):
        for row in result.get(table, ()):
            print(table, row, file=sys.stderr)
    if args.save:
        results.save_lines(args.save, {"grammar": result})
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
