"""An engine whose ranks break on demand: what clients see of the fatal path."""

from __future__ import annotations

from typing import Any

from nmoe_backend.config import ServeConfig, engine_limits
from nmoe_backend.engine import Engine
from nmoe_backend.orchestrator import Orchestrator
from nmoe_backend.types import PendingOutput, RankError, StepPlan
from perf.scripted import ScriptedRank

FAILS_AT_STEP = 40


class FailingRank(ScriptedRank):
    """Breaks at a fixed step."""

    def execute(self, plan: StepPlan) -> PendingOutput:
        """As a scripted rank, until it breaks."""
        if plan.step_id >= FAILS_AT_STEP:
            raise RankError("device 1 fell off the bus")
        return super().execute(plan)


def start_failing(config: ServeConfig) -> Any:
    """Two ranks, one of which breaks."""
    ranks = [ScriptedRank(0, 0.01, [5, 6, 7]), FailingRank(1, 0.01, [8, 9])]
    engine = Engine(ranks, engine_limits(config, config.num_pages))
    engine.start()
    return Orchestrator([engine])
