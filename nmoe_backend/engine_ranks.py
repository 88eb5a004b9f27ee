"""The threads of an engine's ranks: plans go in, outputs come out, within a bounded time.

Owns one thread a rank, the only caller of that rank's `execute`. A rank that raises is heard at once although its peers
may be waiting for it in a barrier: handles of all ranks come back through one queue, and are waited on only when all
ranks have launched. Nobody decides here what a failure means; `collect` raises, the engine takes its fatal path.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence as Seq

from nmoe_backend.types import PendingOutput, Rank, RankError, RankOutput, StepPlan

_LOG = logging.getLogger(__name__)
_HEARING_S = 1.0  # beyond the ranks' own waits: one that missed a peer says so first, and names it

_Inbox = queue.SimpleQueue[StepPlan | None]  # None ends the thread
_Result = tuple[int, int, PendingOutput | Exception]  # (rank, step, handle or what it raised)


class RankThreads:
    """One thread a rank. All methods but `abort` are for the engine's thread, or for `close` after it has ended."""

    def __init__(self, ranks: Seq[Rank], timeout_s: float) -> None:
        self._ranks = tuple(ranks)
        self._timeout_s = timeout_s
        self._inboxes: list[_Inbox] = [queue.SimpleQueue() for _ in self._ranks]
        self._results: queue.SimpleQueue[_Result] = queue.SimpleQueue()
        self._early: dict[int, dict[int, PendingOutput]] = {}  # step -> rank -> handle, of steps not collected yet
        # Daemons: a rank that hangs in a driver call must not keep the process from exiting.
        self._threads = [
            threading.Thread(target=self._run, args=(idx, rank), name=f"nmoe-rank-{idx}", daemon=True)
            for idx, rank in enumerate(self._ranks)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def launch(self, plan: StepPlan) -> None:
        """Hand a plan to every rank. Returns at once."""
        for inbox in self._inboxes:
            inbox.put(plan)

    def collect(self, step_id: int) -> list[RankOutput]:
        """Every rank's output of a launched step. Raises RankError when one fails or the time is over."""
        deadline_s = time.monotonic() + self._timeout_s + _HEARING_S
        handles = self._early.pop(step_id, {})
        while len(handles) < len(self._ranks):
            try:
                rank_idx, of_step, result = self._results.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                missing = [idx for idx in range(len(self._ranks)) if idx not in handles]
                raise RankError(f"ranks {missing} did not launch step {step_id} in {self._timeout_s:g} s") from None
            if isinstance(result, Exception):
                raise RankError(f"rank {rank_idx}, step {of_step}: {type(result).__name__}: {result}") from result
            if of_step == step_id:
                handles[rank_idx] = result
            else:
                self._early.setdefault(of_step, {})[rank_idx] = result
        return [handles[idx].wait(max(0.0, deadline_s - time.monotonic())) for idx in range(len(self._ranks))]

    def abort(self) -> None:
        """Make every rank give up. From any thread; a rank whose abort raises does not keep it from the others."""
        for idx, rank in enumerate(self._ranks):
            try:
                rank.abort()
            except Exception:  # noqa: BLE001 - the others must still be told
                _LOG.exception("abort of rank %d failed", idx)

    def close(self, timeout_s: float) -> None:
        """End the threads and close the ranks whose threads have ended; one that hangs is named and left alone."""
        deadline_s = time.monotonic() + timeout_s
        for inbox in self._inboxes:
            inbox.put(None)
        for idx, (rank, thread) in enumerate(zip(self._ranks, self._threads, strict=True)):
            if thread.ident is not None:
                thread.join(max(0.0, deadline_s - time.monotonic()))
            if thread.is_alive():
                _LOG.error(
                    "rank %d still hangs after %.1f s; its memory is freed when the process ends", idx, timeout_s
                )
                continue
            rank.close()

    def _run(self, rank_idx: int, rank: Rank) -> None:
        inbox = self._inboxes[rank_idx]
        while (plan := inbox.get()) is not None:
            try:
                self._results.put((rank_idx, plan.step_id, rank.execute(plan)))
            except Exception as error:  # noqa: BLE001 - raised again by collect(), in the engine's thread
                self._results.put((rank_idx, plan.step_id, error))
                return
