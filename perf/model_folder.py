"""A model folder of full-size DeepSeek-V3 without weights: its config.json and a synthetic tokenizer of 129,280 ids.

    python -m perf.model_folder OUT

For benchmarks with load_format = "dummy" whose answers are text. The tokenizer is byte-level BPE: special tokens, 256
bytes, then all words of two letters, of three, of four, each a shorter word and a letter, until the vocabulary is full.
Text means nothing; that a token is a few letters long, and that every id decodes, is what costs the server its time.
"""

from __future__ import annotations

import json
import shutil
import string
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from perf.results import P1_CONFIG

CONFIG = Path(__file__).parent / "deepseek_v3" / "config.json"
P1_MODEL = 'model_path = "deepseek_v3"'  # P1_CONFIG's line: a folder without a tokenizer
SPECIAL_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
SPACE = "Ġ"  # its letter in the byte-level alphabet; it only begins words


def synthetic_tokenizer(vocab_size: int) -> Tokenizer:
    """See the module; ids 0, 1, 2 are BOS, EOS and padding, as on the hub."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL_TOKENS, *alphabet]
    merges: list[tuple[str, str]] = []
    longer = [*string.ascii_lowercase, SPACE]
    while len(tokens) < vocab_size:
        pairs = [(word, letter) for word in longer for letter in string.ascii_lowercase][: vocab_size - len(tokens)]
        longer = [word + letter for word, letter in pairs]
        tokens += longer
        merges += pairs
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def write_model_folder(folder: Path) -> Path:
    """The folder, made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(CONFIG.read_text())
    synthetic_tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"))
    names = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS, strict=True))
    settings = {**names, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 163840}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    shutil.copyfile(CONFIG, folder / "config.json")  # last: a folder without it is incomplete
    return folder


def with_model(config_path: Path, folder: Path) -> Path:
    """P1's TOML over a model folder made below `folder`; any other TOML as it is."""
    if config_path != P1_CONFIG:
        return config_path
    path, model = folder / config_path.name, write_model_folder(folder / "model")
    path.write_text(config_path.read_text().replace(P1_MODEL, f'model_path = "{model}"'))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the folder that the one argument names."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    print(f"wrote {write_model_folder(Path(arguments[0]))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
