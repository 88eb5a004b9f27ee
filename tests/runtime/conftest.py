"""Tiny checkpoints in every form, written once per session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts.make_tiny_checkpoint import DTYPES, make_checkpoint

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """dtype -> tiny checkpoint with an MTP layer in three shards. Not to be changed: copy it first."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {dtype: make_checkpoint(root / dtype, dtype=dtype, mtp=True, shards=3) for dtype in DTYPES}
