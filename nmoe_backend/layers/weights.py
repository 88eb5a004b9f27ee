"""One rank's weights as layers see them: by name below a prefix, with shape, dtype and device checked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nmoe_backend.types import ConfigError


class Weights:
    """A view of one rank's weights below a name prefix; checks what it hands out."""

    def __init__(
        self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype, prefix: str = ""
    ) -> None:
        self._tensors = tensors
        self._device = device
        self._dtype = dtype
        self._prefix = prefix

    def below(self, name: str) -> Weights:
        """The tensors whose names start with `<prefix><name>.`"""
        return Weights(self._tensors, self._device, self._dtype, f"{self._prefix}{name}.")

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of that name. Raises ConfigError unless it has this shape, the rank's device and the compute dtype
        (or `dtype`)."""
        full = self._prefix + name
        tensor = self._tensors.get(full)
        need = (shape, dtype or self._dtype, self._device)
        got = None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device)
        if tensor is None or got != need:
            raise ConfigError(
                f"weight {full}: got {'nothing' if got is None else got}, need {need}. "
                "Check that config.json belongs to this checkpoint."
            )
        return tensor
