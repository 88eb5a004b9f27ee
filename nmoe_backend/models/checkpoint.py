"""A checkpoint on disk as one rank sees it: which bytes of which file make each of its tensors.

Knows both forms, the hub's (index and shards, or one file) and nmoe-sharded (`model{rank}-mp{world}.safetensors`), and
turns either into one catalogue keyed by the hub's names, so that loading and converting do not care which it was.
Reads headers only. Everything that does not fit the spec is reported at once, in one ConfigError.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from nmoe_backend import models
from nmoe_backend.models.spec import ModelSpec, ParamSpec
from nmoe_backend.safetensors_header import TensorInfo, read_header, read_index
from nmoe_backend.types import ConfigError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_SHARDED_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
_HUB_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_FLOATS = ("BF16", "F16", "F32")
_MAX_LISTED = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class RankCheckpoint:
    """One rank's share: `tensors` holds exactly the sources of its parameters, with the right shape and dtype."""

    params: tuple[ParamSpec, ...]
    tensors: Mapping[str, TensorInfo]  # hub name -> bytes
    ignored: tuple[str, ...]  # tensors of MTP layers

    def pieces(self, param: ParamSpec) -> list[TensorInfo]:
        """The sources of one parameter in order: back to back they are its bytes."""
        return [self.tensors[source] for source in param.sources]


def sharded_file(rank: int, world_size: int) -> str:
    """Name of one rank's file in the nmoe-sharded form."""
    return f"model{rank}-mp{world_size}.safetensors"


def scale_name(name: str) -> str:
    """Name of the parameter that holds a quantised parameter's scales."""
    return f"{name}_scale_inv" if name.endswith(".weight") else f"{name}_scale"


def num_parts(param: ParamSpec) -> int:
    """How many sources stand one below the other in each row block: per expert where experts are stacked."""
    return len(param.sources) // (param.shape[0] if len(param.shape) == 3 else 1)


def source_shape(param: ParamSpec) -> tuple[int, ...]:
    """Shape of each of a parameter's sources; w13 `[local, 2 * I, D]` comes from sources of `[I, D]`."""
    if len(param.shape) != 3:
        return param.shape
    return (param.shape[1] // num_parts(param), param.shape[2])


class Checkpoint:
    """The files of a model folder, in either form. Headers of the hub's form are read once, for all ranks: 160 files
    with 90,000 tensors take 1.2 s."""

    def __init__(self, model_path: Path, spec: ModelSpec) -> None:
        """Raises ConfigError for a folder with no checkpoint, two, or a file that is missing or damaged."""
        self.spec = spec
        self._model_path = model_path
        self._worlds = _sharded_worlds(model_path)
        self._hub: dict[str, TensorInfo] = {}
        self._ignored: tuple[str, ...] = ()
        self._problems: list[str] = []  # of the hub form's names; what is wrong with shapes, the ranks' shares say
        has_hub_form = (model_path / INDEX_FILE).exists() or (model_path / SINGLE_FILE).exists()
        if self._worlds and has_hub_form:
            raise ConfigError(
                f"{model_path} holds the hub's form and an nmoe-sharded one; it is not clear which is meant. "
                "Keep each in a folder of its own."
            )
        if not self._worlds:
            self._read_hub()

    def share(self, rank: int, world_size: int) -> RankCheckpoint:
        """One rank's. Raises one ConfigError that lists all that does not fit."""
        params = models.parameters(self.spec, rank, world_size)
        names = {param.name for param in params}
        if self._worlds:
            return self._sharded_share(rank, world_size, params, names)
        problems = [*self._problems]
        for param in params:
            stored = {source: (source_shape(param), self._hub.get(source)) for source in param.sources}
            problems += _misfits(param, _allowed_dtypes(param, names), stored)
        _raise_if_any(self._model_path, self.spec, problems)
        ours = {source: self._hub[source] for param in params for source in param.sources}
        return RankCheckpoint(params=tuple(params), tensors=ours, ignored=self._ignored)

    def _read_hub(self) -> None:
        for file in hub_files(self._model_path):
            header = read_header(file)
            self._problems += [f"{name}: twice, also in {file.name}" for name in header.keys() & self._hub.keys()]
            self._hub |= header
        known = {source for param in models.parameters(self.spec, 0, 1) for source in param.sources}
        extra = sorted(self._hub.keys() - known)
        self._ignored = tuple(name for name in extra if _is_mtp(name, self.spec))
        self._problems += [f"{name}: unexpected" for name in extra if not _is_mtp(name, self.spec)]
        self._problems += [f"{name}: missing" for name in sorted(known - self._hub.keys())]

    def _sharded_share(self, rank: int, world_size: int, params: list[ParamSpec], names: Set[str]) -> RankCheckpoint:
        if world_size not in self._worlds:
            got = " and ".join(f"mp{world}" for world in self._worlds)
            raise ConfigError(
                f"{self._model_path}: got {got} files, need mp{world_size}: run nmoe convert --world {world_size} on "
                "the hub's checkpoint, or change the number of GPUs."
            )
        header = read_header(self._model_path / sharded_file(rank, world_size))
        problems = [f"{name}: missing" for name in sorted(names - header.keys())]
        problems += [f"{name}: unexpected" for name in sorted(header.keys() - names)]
        for param in params:
            stored = {param.name: (param.shape, header.get(param.name))}
            problems += _misfits(param, _allowed_dtypes(param, names), stored)
        _raise_if_any(self._model_path, self.spec, problems)
        tensors: dict[str, TensorInfo] = {}
        for param in params:
            pieces = header[param.name].split(len(param.sources), source_shape(param))
            tensors |= dict(zip(param.sources, pieces, strict=True))
        return RankCheckpoint(params=tuple(params), tensors=tensors, ignored=())


def hub_files(model_path: Path) -> list[Path]:
    """The weight files of a checkpoint in the hub's form. Raises ConfigError when one is missing or there is none."""
    index = model_path / INDEX_FILE
    if index.exists():
        files = [model_path / name for name in sorted(set(read_index(index).values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ConfigError(
                f"{model_path}: {INDEX_FILE} names {len(files)} files, and {len(missing)} are missing: "
                f"{_listing(missing, ', ')}. Fetch them."
            )
        return files
    if (model_path / SINGLE_FILE).is_file():
        return [model_path / SINGLE_FILE]
    raise ConfigError(
        f"{model_path} holds no checkpoint: needs {INDEX_FILE} with its shards, {SINGLE_FILE}, or "
        f"{sharded_file(0, 8)} and its peers."
    )


def _misfits(
    param: ParamSpec, allowed: tuple[str, ...], stored: Mapping[str, tuple[tuple[int, ...], TensorInfo | None]]
) -> Iterator[str]:
    """What is wrong with the tensors that make one parameter; absent ones are reported elsewhere."""
    dtypes: set[str] = set()
    for name, (shape, info) in stored.items():
        if info is None:
            continue
        dtypes.add(info.dtype)
        if info.shape != shape:
            yield f"{name}: shape {list(info.shape)}, needs {list(shape)}"
        if info.dtype not in allowed:
            yield f"{name}: dtype {info.dtype}, needs {' or '.join(allowed)}"
    if len(dtypes) > 1 and not param.float32 and dtypes <= set(allowed):
        yield f"{param.name}: its sources mix {' and '.join(sorted(dtypes))}"


def _allowed_dtypes(param: ParamSpec, names: Set[str]) -> tuple[str, ...]:
    if param.float32:
        is_scale = param.name.endswith(("_scale", "_scale_inv"))
        return ("F32",) if is_scale else _FLOATS
    return ("F8_E4M3",) if scale_name(param.name) in names else _FLOATS


def _is_mtp(name: str, spec: ModelSpec) -> bool:
    match = _HUB_LAYER.match(name)
    return match is not None and int(match[1]) >= len(spec.layers)


def _sharded_worlds(model_path: Path) -> list[int]:
    matches = (_SHARDED_FILE.fullmatch(path.name) for path in model_path.glob("model*-mp*.safetensors"))
    return sorted({int(match[2]) for match in matches if match})


def _raise_if_any(model_path: Path, spec: ModelSpec, problems: list[str]) -> None:
    if problems:
        raise ConfigError(
            f"{model_path} does not fit its config.json ({spec.architecture}, {len(spec.layers)} layers): "
            f"{len(problems)} tensors are wrong.\n  {_listing(problems, chr(10) + '  ')}\n"
            "Fetch the checkpoint again, or correct config.json."
        )


def _listing(items: Iterable[str], separator: str) -> str:
    items = list(items)
    rest = len(items) - _MAX_LISTED
    return separator.join(items[:_MAX_LISTED] + ([f"... and {rest} more"] if rest > 0 else []))
