"""Which tokens the grammars of one rank's slots allow in a step: matchers, one bitmask, and its way to the device.

Owned by the rank's thread. A step's masks need the tokens of the step before, which may still run: `step` is called
when the forward pass is launched, waits for those tokens of constrained slots only, and fills and uploads the masks of
the constrained rows while the device computes. Steps without such rows wait for nothing and upload nothing.

The pinned buffers are written again only behind the event of the step that used them last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nmoe_backend.types import Grammar, RequestError, SlotInit, TokenMatcher


@dataclass(frozen=True, slots=True)
class StepMasks:
    """rows: those with a grammar; words [len(rows), ceil(V / 32)] int32 on the device, bit 1 = allowed: the first lines
    of GrammarMasks.words."""

    rows: list[int]
    words: Tensor
    failed: Mapping[int, RequestError]  # row -> why its grammar cannot go on; its mask means nothing
    matchers: list[TokenMatcher]


@dataclass(slots=True)
class _Sampled:
    """Tokens that the matchers have not seen yet."""

    rows: list[int]
    matchers: list[TokenMatcher]
    token_ids: Tensor  # [N] int64 of all rows of that step, on the host when `done`
    done: torch.cuda.Event | None = field(default=None)  # None: they are there


class GrammarMasks:
    """See the module."""

    def __init__(self, max_batch_size: int, vocab_size: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        words = -(-vocab_size // 32)
        self._device = device
        self._bitmask = torch.zeros(max_batch_size, words, dtype=torch.int32, pin_memory=pinned)
        self._uploads = torch.cuda.Stream(device) if pinned else None
        self.words = torch.zeros_like(self._bitmask, device=device) if pinned else self._bitmask
        self._token_ids = torch.zeros(max_batch_size, dtype=torch.int64, pin_memory=pinned)
        self._slots: dict[int, tuple[Grammar, TokenMatcher]] = {}
        self._sampled: _Sampled | None = None

    def admit(self, init: SlotInit) -> None:
        """A sequence takes a slot; after a preemption its grammar goes on behind output_ids."""
        self._slots.pop(init.slot, None)
        grammar = init.sampling.grammar
        if grammar is not None and not init.embed:
            matcher = grammar.matcher()
            matcher.advance(init.output_ids)
            self._slots[init.slot] = (grammar, matcher)

    def step(self, slots: Sequence[int]) -> StepMasks | None:
        """The masks of a step that samples these slots; None where no row has a grammar."""
        rows = [n for n, slot in enumerate(slots) if slot in self._slots] if self._slots else []
        if not rows:
            return None
        self._catch_up()
        matchers = [self._slots[slots[n]][1] for n in rows]
        bitmask = self._bitmask[: len(rows)]
        self._slots[slots[rows[0]]][0].fill_masks(matchers, bitmask.numpy().data)
        errors = ((n, matcher.error()) for n, matcher in zip(rows, matchers, strict=True))
        return StepMasks(
            rows=rows,
            words=self._upload(len(rows)),
            failed={n: error for n, error in errors if error is not None},
            matchers=matchers,
        )

    def record(self, masks: StepMasks, token_ids: Tensor) -> None:
        """token_ids [N] int64: what all rows of the step sampled; starts their way to the host."""
        host, done = self._token_ids[: token_ids.shape[0]], None
        host.copy_(token_ids, non_blocking=True)
        if self._device.type == "cuda":
            done = torch.cuda.Event(blocking=True)  # the thread sleeps: a spinning one would take the others' core
            done.record(torch.cuda.current_stream(self._device))
        self._sampled = _Sampled(masks.rows, masks.matchers, host, done)

    def _catch_up(self) -> None:
        """Show the matchers what their sequences sampled last. A device that hangs is the engine's to notice."""
        sampled, self._sampled = self._sampled, None
        if sampled is None:
            return
        if sampled.done is not None:
            sampled.done.synchronize()
        token_ids = sampled.token_ids.tolist()
        for row, matcher in zip(sampled.rows, sampled.matchers, strict=True):
            matcher.advance((token_ids[row],))

    def _upload(self, count: int) -> Tensor:
        """Lines of the bitmask to the device, on a stream of its own: the forward pass goes on meanwhile, and what is
        launched from now on waits. Who read the lines last is done: `_catch_up` has waited for it."""
        words = self.words[:count]
        if self._uploads is not None:
            with torch.cuda.stream(self._uploads):
                words.copy_(self._bitmask[:count], non_blocking=True)
            torch.cuda.current_stream(self._device).wait_stream(self._uploads)
        return words
