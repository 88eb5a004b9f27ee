"""Waiting for the world outside, which nobody signals to a test."""

from __future__ import annotations

import time
from collections.abc import Callable

POLL_S = 0.02


def wait_until(holds: Callable[[], bool], what: str, limit_s: float = 30.0) -> None:
    """Polls; an AssertionError that says `what` did not come about."""
    limit = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < limit, f"{what}: not within {limit_s:g} s"
        time.sleep(POLL_S)
