"""A small tokenizer with every byte for tests of text, and what stop strings mean, written the plain way."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message['role'] == 'user' %}<｜User｜>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<｜Assistant｜>{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no role ' + message['role']) }}{% endif %}\n"
    "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)


def make_folder(path: Path, **config: object) -> Path:
    """A byte-level BPE of all 256 bytes, some merges, and added tokens with characters in and out of its alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("h", "e"), ("l", "l"), ("Ġ", "w"), ("Ã", "©"), ("ð", "Ł"), ("Ċ", "Ċ")]
    vocab = {token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("<｜User｜>", special=False)])
    tokenizer.add_tokens([AddedToken("two words é", special=False)])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings_ = {
        "bos_token": BOS,
        "eos_token": {"__type": "AddedToken", "content": EOS},
        "chat_template": TEMPLATE,
        **config,
    }
    (path / "tokenizer_config.json").write_text(json.dumps({**settings_, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return path


def stop_reference(stop: list[str], string: str) -> tuple[str, bool]:
    """Character by character: the first moment at which the text ends in a stop string."""
    for end in range(1, len(string) + 1):
        hits = [end - len(word) for word in stop if string[:end].endswith(word)]
        if hits:
            return string[: min(hits)], True
    return string, False
