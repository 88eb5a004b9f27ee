"""What a preflight check says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nmoe_backend.types import ConfigError

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's result: what was found and, unless it is fine, what to do."""

    name: str
    status: Status
    message: str
    remedy: str = ""

    @property
    def fails(self) -> bool:
        """Cannot work; a warning is no failure."""
        return self.status == "fail"


def ok(name: str, message: str) -> Finding:
    """Fine."""
    return Finding(name, "ok", message)


def warn(name: str, message: str, remedy: str) -> Finding:
    """Works, but somebody should know."""
    return Finding(name, "warn", message, remedy)


def fail(name: str, message: str, remedy: str) -> Finding:
    """Cannot work."""
    return Finding(name, "fail", message, remedy)


def fail_from(name: str, error: ConfigError) -> Finding:
    """Cannot work, as an error says whose last sentence is what to do."""
    message, _, remedy = str(error).rpartition(". ")
    return fail(name, message, remedy)
