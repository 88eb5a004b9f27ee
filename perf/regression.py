"""Which figures of a run are worse than the baseline's: every entry that both files hold with a `value` and a `unit`.

    python -m perf.regression perf/baselines/cpu.json results/night.json [--percent 5]

Exit code 1 where one is more than so many percent worse, or where the baseline has one that the run lacks. More is
better for what is counted a second, less for times and for idle time. Figures that are percentages themselves are
compared by points: 1.1 % idle after 1.0 % is no tenth worse. A baseline of 0 counts failures: any is worse.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TIMES = ("s", "ms", "us")
IDLE = "% idle"


def regressions(baseline: Mapping[str, Any], run: Mapping[str, Any], percent: float) -> list[str]:
    """A line for each figure that is worse or missing."""
    lines = []
    for name, known in baseline.items():
        if "value" not in known or "unit" not in known:
            continue
        if name not in run:
            lines.append(f"{name}: the baseline has {known['value']} {known['unit']}, the run has no such entry")
            continue
        before, now = float(known["value"]), float(run[name]["value"])
        is_percentage = known["unit"].startswith("%")
        if before == 0.0 and not is_percentage:
            lines += [f"{name}: {now:g} {known['unit']}, was 0 at {known['commit']}"] if now else []
            continue
        change = now - before if is_percentage else 100.0 * (now / before - 1.0)
        less_is_better = known["unit"] in (*TIMES, IDLE)
        if (change if less_is_better else -change) > percent:
            sign = "points" if is_percentage else "%"
            lines.append(f"{name}: {now:g} {known['unit']}, was {before:g} at {known['commit']}: {change:+.1f} {sign}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what is worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--percent", type=float, default=5.0, help="worse by more than this is a regression")
    options = parser.parse_args(argv)
    worse = regressions(json.loads(options.baseline.read_text()), json.loads(options.run.read_text()), options.percent)
    print("\n".join(worse) or f"nothing is more than {options.percent:g} % worse than {options.baseline}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
