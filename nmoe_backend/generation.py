"""What the model's own files say of serving it: config.json as it is, and the defaults of a request.

A request that does not say how to sample gets the checkpoint's generation_config.json, overridden by the TOML's
[generation]. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from nmoe_backend.toml_table import Table
from nmoe_backend.types import ConfigError

_MAX_FP32 = 3.4028234663852886e38  # the type that a penalty is applied in


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationDefaults:
    """What a request that does not say gets: generation_config.json, overridden by the TOML's [generation]."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None  # None: whatever remains of max_seq_len
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None = None
    pad_token_id: int | None = None


def read_json(path: Path, remedy: str) -> dict[str, object]:
    """A JSON object from a model's folder; a ConfigError with the remedy where it is missing or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}. {remedy}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}. {remedy}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {type(value).__name__}, needs an object. {remedy}")
    return value


def read_model_config(model_path: Path) -> dict[str, object]:
    """The model's config.json."""
    return read_json(
        model_path / "config.json",
        "model_path must be a checkpoint folder with config.json, *.safetensors and tokenizer.json "
        "(scripts/make_tiny_checkpoint.py writes a tiny one).",
    )


def generation_defaults(
    top: Table, model: Table, model_path: Path, vocab_size: int, top_level_keys: Collection[str]
) -> GenerationDefaults:
    """The TOML wins over generation_config.json, which wins over config.json (token ids only)."""
    toml = Table(top.get("generation") or {}, top.source, "generation")
    toml.require_known(tuple(GenerationDefaults.__dataclass_fields__), tuple(top_level_keys))
    path = model_path / "generation_config.json"
    values = read_json(path, "Restore the file from the checkpoint, or delete it.") if path.exists() else {}
    hub = Table({key: value for key, value in values.items() if value is not None}, str(path))
    greedy = hub.get("do_sample") is False
    return GenerationDefaults(
        temperature=toml.number("temperature", 0.0 if greedy else hub.number("temperature", 1.0, low=0.0), low=0.0),
        top_p=toml.number(
            "top_p", hub.number("top_p", 1.0, low=0.0, high=1.0, open_low=True), low=0.0, high=1.0, open_low=True
        ),
        top_k=toml.integer("top_k", hub.integer("top_k", 0)),
        repetition_penalty=toml.number(
            "repetition_penalty",
            hub.number("repetition_penalty", 1.0, low=0.0, high=_MAX_FP32, open_low=True),
            low=0.0,
            high=_MAX_FP32,
            open_low=True,
        ),
        max_tokens=_max_tokens(toml, hub),
        eos_token_ids=_eos_token_ids(toml, (hub, model), vocab_size),
        bos_token_id=_token_id((toml, hub, model), "bos_token_id", vocab_size),
        pad_token_id=_token_id((toml, hub, model), "pad_token_id", vocab_size),
    )


def _max_tokens(toml: Table, hub: Table) -> int | None:
    if toml.has("max_tokens"):
        return toml.integer("max_tokens", low=1)
    return hub.integer("max_new_tokens", low=1) if hub.has("max_new_tokens") else None


def _eos_token_ids(toml: Table, model_files: tuple[Table, ...], vocab_size: int) -> tuple[int, ...]:
    if toml.has("eos_token_ids"):
        table, key, ids = toml, "eos_token_ids", toml.integers("eos_token_ids")
    else:
        key = "eos_token_id"
        found = next((candidate for candidate in model_files if candidate.get(key) is not None), None)
        if found is None:
            raise toml.error(
                "eos_token_ids",
                "is missing, and neither generation_config.json nor config.json names an eos_token_id. Add it.",
            )
        table = found
        ids = table.integers(key) if isinstance(table.get(key), list) else (table.integer(key),)
    if not ids or max(ids) >= vocab_size:
        raise table.error(key, f"is {list(ids)}, needs at least one id, all below vocab_size = {vocab_size}.")
    return ids


def _token_id(tables: tuple[Table, ...], key: str, vocab_size: int) -> int | None:
    for table in tables:
        if table.get(key) is not None:
            return table.integer(key, high=vocab_size - 1)
    return None
