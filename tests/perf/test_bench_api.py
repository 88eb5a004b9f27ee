"""What the benchmark of the front end makes of arrival times."""

from __future__ import annotations

import pytest

from perf.bench_api import STEP_S, added_ms
from perf.bench_streaming import Arrivals


def _stream(first_step: int, late_s: float) -> Arrivals:
    times = [(first_step + n) * STEP_S + late_s for n in range(20)]
    return Arrivals(sent_s=0.0, times=times, counts=[1] * len(times))


@pytest.mark.parametrize("starts", [(3,), (3, 3, 4, 4), (5, 3, 4, 4)], ids=str)
def test_what_is_added_does_not_depend_on_the_steps_in_which_streams_begin(starts: tuple[int, ...]) -> None:
    direct = [_stream(start, 0.001) for start in starts]
    added = added_ms(direct, [_stream(start, 0.003) for start in starts])
    assert added and added == pytest.approx([2.0] * len(added))
