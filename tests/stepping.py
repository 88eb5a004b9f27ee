"""A scheduler stepped by hand, without threads and clocks, over ranks that check every plan."""

from __future__ import annotations

from collections import deque

from nmoe_backend.scheduler import Scheduler
from nmoe_backend.types import EngineLimits, RankOutput, RankPlan, StepPlan
from tests.fakes import CollectingSink, PlanChecker, make_request


class Steps:
    """Schedules and commits with one step of overlap; time is what `seconds` says of a plan."""

    def __init__(self, limits: EngineLimits, overlap: bool = True) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.checkers = [PlanChecker(limits, idx) for idx in range(limits.num_ranks)]
        self.under_way: deque[tuple[StepPlan, list[RankOutput]]] = deque()
        self.overlap = overlap
        self.times_s: list[float] = []

    def seconds(self, plan: StepPlan) -> float:
        rows = max(share.num_decode for share in plan.ranks)
        return 0.005 + 1e-5 * rows + 1e-4 * max(len(share.token_ids) for share in plan.ranks)

    def add(self, request_id: int, prompt_len: int, max_tokens: int = 4, **changes: object) -> CollectingSink:
        sink = CollectingSink()
        prompt = [(request_id * 7 + i) % 100 for i in range(prompt_len)]
        self.scheduler.add(make_request(request_id, prompt, max_tokens, **changes), sink)
        return sink

    def step(self) -> StepPlan | None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.under_way.append((plan, [checker.run(plan) for checker in self.checkers]))
        if self.under_way and (not self.overlap or plan is None or len(self.under_way) > 1):
            oldest, outputs = self.under_way.popleft()
            self.times_s.append(self.seconds(oldest))
            self.scheduler.commit(oldest.step_id, outputs, self.times_s[-1])
        self.scheduler.check_invariants()
        return plan

    def run(self, most: int = 2000) -> None:
        for _ in range(most):
            if self.step() is None and not self.under_way:
                return
        raise AssertionError("no end")


def only(plan: StepPlan | None) -> RankPlan:
    assert plan is not None
    (share,) = plan.ranks
    return share
