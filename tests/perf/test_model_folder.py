"""The synthetic tokenizer is one that the server accepts, and fills the vocabulary."""

from __future__ import annotations

import random
from pathlib import Path

from nmoe_backend.text import Text
from perf.model_folder import main


def test_every_id_decodes_and_text_comes_back(tmp_path: Path) -> None:
    assert main([str(tmp_path / "model")]) == 0
    text = Text(tmp_path / "model")
    assert text.vocab_size == 129280
    assert (text.bos_id, text.special_tokens["eos_token"]) == (0, "<｜end▁of▁sentence｜>")
    draw = random.Random(0)
    words = " ".join("".join(draw.choices("abcdefghij", k=draw.randint(1, 9))) for _ in range(50))
    ids = text.encode_plain(words)
    assert text.decode(ids) == words and len(ids) < len(words) / 1.5
    lengths = [len(text.token_bytes(token_id)) for token_id in range(3, 129280)]
    assert min(lengths) == 1 and 3 < sum(lengths) / len(lengths) <= max(lengths) == 4


def test_it_wants_one_folder(capsys) -> None:
    assert main([]) == 2 and main(["--help"]) == 0
    assert "OUT" in capsys.readouterr().out
