"""A program of the product's that runs while a test or a benchmark does: ready inside its `with`, stopped behind it."""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from typing import Generic, Self, TypeVar

from nmoe_backend.server_process import ChildProcess

Child = TypeVar("Child", bound=ChildProcess)


class Running(ABC, Generic[Child]):
    """A context manager. `lines` is everything that the program printed."""

    stop_s: float  # in which it ends by itself

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._process: Child | None = None

    @abstractmethod
    def _start(self) -> Child:
        """Its lines go to `lines`."""

    @abstractmethod
    def _wait_until_ready(self) -> None:
        """AssertionError, with its lines, where it ends or takes too long."""

    def __enter__(self) -> Self:
        self._process = self._start()
        try:
            self._wait_until_ready()
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stop(self.stop_s)

    @property
    def process(self) -> Child:
        """The running program."""
        assert self._process is not None, "enter it first"
        return self._process

    def terminate(self) -> None:
        """SIGTERM, and do not wait."""
        os.kill(self.process.pid, signal.SIGTERM)
