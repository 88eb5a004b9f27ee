"""Fixtures shared with the gate tests: devices, one thread an operation, the tiny reference model."""

from tests.gates.conftest import device, one_thread, tiny_checkpoint, tiny_model

__all__ = ["device", "one_thread", "tiny_checkpoint", "tiny_model"]
