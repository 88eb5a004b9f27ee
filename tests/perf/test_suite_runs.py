"""The suite runs stand-ins of its benchmarks: on which GPU, beside what, and what the others lose where one fails."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from nmoe_backend.server_process import group_members
from perf import suite
from perf.suite import Benchmark
from tests.waiting import wait_until

STAND_IN = """
import json, os, sys
from pathlib import Path
name, folder = sys.argv[1], Path(sys.argv[2])
print("on", os.environ["CUDA_VISIBLE_DEVICES"] or "no GPU")
document = Path(sys.argv[sys.argv.index("--output") + 1])
entry = {"part": "batch", "rows": 1, "context": 2}
entry |= {"raw_tok_s_gpu": 3, "corrected_tok_s_gpu": 4, "corrected_step_ms": 5}
made = {"gpu": {"name": "NVIDIA H200"}, "results": [entry], "goals": json.loads(sys.argv[3])}
"""
FINISH = """
document.write_text(json.dumps(made))
(folder / f"{name}.ended").touch()
"""
HANG = """
try:
    os.mkfifo(folder / f"{name}.never")
    open(folder / f"{name}.never")
except KeyboardInterrupt:
    (folder / f"{name}.interrupted").touch()
    raise
"""


class StandIns:
    """The full suite's benchmarks as small programs; what a test puts into `between` runs before a program's end."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.out, self.between = folder, folder / "out", dict[str, str]()
        self.baseline = json.loads((suite.results.BASELINES / "h200.json").read_text())
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
        real = Benchmark.command

        def command(benchmark: Benchmark, out: Path, args: argparse.Namespace) -> list[str]:
            program = folder / f"{benchmark.name}.py"
            program.write_text(STAND_IN + self.between.get(benchmark.name, "") + FINISH)
            goals = {goal: self.baseline[goal] for goal in benchmark.goals if goal in self.baseline}
            arguments = real(benchmark, out, args)[3:]
            return [sys.executable, str(program), benchmark.name, str(folder), json.dumps(goals), *arguments]

        monkeypatch.setattr(Benchmark, "command", command)

    def run(self, *argv: str) -> int:
        return suite.main(["--suite", "full", "--output", str(self.out), "--commit", "abc", *argv])

    def devices(self) -> dict[str, str]:
        """Benchmark -> where it ran."""
        return {path.stem: path.read_text().splitlines()[0].removeprefix("on ") for path in self.out.glob("*.log")}


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return StandIns(tmp_path, monkeypatch)


def test_the_full_suite_uses_both_gpus_and_gives_the_host_to_those_that_measure_it(stand_ins: StandIns) -> None:
    meet = "open(folder / 'pipe', '{}').close()\n"  # a pipe opens when both ends are there
    os.mkfifo(stand_ins.folder / "pipe")
    alone = "assert all((folder / f'{other}.ended').exists() for other in ('rdep', 'load', 'streaming'))\n"
    stand_ins.between = {"lmsys_decode": alone + meet.format("r"), "latency": alone + meet.format("w")}
    assert stand_ins.run() == 0
    where = stand_ins.devices()
    assert [where[name] for name in ("rdep", "load", "streaming")] == ["GPU-a,GPU-b", "GPU-a", "no GPU"]
    assert {where["lmsys_decode"], where["latency"]} == {"GPU-a", "GPU-b"}
    assert len(where) == 8 and {where[name] for name in ("prefill", "startup", "kernels")} <= {"GPU-a", "GPU-b"}
    assert (stand_ins.out / "batch_sweep.png").exists()
    goals = json.loads((stand_ins.out / "goals.json").read_text())
    assert {f"P{number}" for number in (1, 2, 3, 4, 5, 6, 7, 9)} <= set(goals)


def test_one_that_fails_and_one_that_hangs_cost_the_others_nothing(
    stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a missing tritonserver does, and a GPU that never answers; what a hanging one has written counts."""
    monkeypatch.setattr(suite, "LIMIT_S", 5.0)
    monkeypatch.setattr(suite, "END_S", 1.0)
    stand_ins.between = {
        "streaming": "raise SystemExit('no tritonserver on PATH')",
        "lmsys_decode": "document.write_text(json.dumps(made))" + HANG,
        "startup": "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + HANG,
    }
    assert stand_ins.run() == 1
    said = capsys.readouterr().out
    assert "streaming: no tritonserver on PATH\n== streaming: exit code 1" in said
    assert "== lmsys_decode: still runs after 5 s, and is ended" in said
    assert (stand_ins.folder / "lmsys_decode.interrupted").exists()
    assert (stand_ins.out / "lmsys_decode.log").read_text().endswith("\nKeyboardInterrupt\n"), "where it stood"
    assert "FAILED: streaming, lmsys_decode, startup" in said
    assert [line.partition(":")[0] for line in said.splitlines() if "WORSE" in line] == ["WORSE P9", "WORSE start_cold"]
    goals = json.loads((stand_ins.out / "goals.json").read_text())
    assert {"P1", "P2", "P3", "P4", "P5", "P6", "P7"} <= set(goals) and "P9" not in goals


def test_one_gpu_runs_them_one_after_the_other_and_the_exchange_not_at_all(
    stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert stand_ins.run() == 0
    assert "rdep needs 2 GPUs, this machine has 1: NOT run" in capsys.readouterr().out
    assert stand_ins.devices() == {
        name: "no GPU" if name == "streaming" else "0"
        for name in ("load", "streaming", "lmsys_decode", "latency", "prefill", "startup", "kernels")
    }


def test_kernels_are_saved_with_their_peers_only(stand_ins: StandIns) -> None:
    made = {"operation": "a", "shape": "b", "us": {"ours": 1.0, "theirs": 2.0}, "ratio": 0.5}
    stand_ins.between = {"kernels": f"made |= {{'results': [{made!r}], 'commit': 'abc', 'machine': 'one'}}"}
    saves = ("--only", "kernels", "--save", "--baseline", str(stand_ins.folder / "saved.json"))
    assert stand_ins.run(*saves) == 0
    assert not (stand_ins.folder / "saved_kernels.json").exists()
    with pytest.raises(SystemExit):
        stand_ins.run(*saves, "--peers", str(stand_ins.folder))
    (stand_ins.folder / "peers.py").touch()
    assert stand_ins.run(*saves, "--peers", str(stand_ins.folder)) == 0
    assert json.loads((stand_ins.folder / "saved_kernels.json").read_text())["a b"]["value"] == 1.0


def test_sigterm_ends_what_runs(stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout 500 nmoe bench ...` must not leave a benchmark on the GPU."""
    stand_ins.between = {"prefill": HANG.replace("try:", f"try:\n    os.kill({os.getpid()}, {signal.SIGTERM:d})")}
    with pytest.raises(SystemExit, match="interrupted; --collect looks at what is in"):
        stand_ins.run("--only", "prefill", "load")
    assert (stand_ins.out / "load.json").exists() and not (stand_ins.out / "prefill.json").exists()
    assert (stand_ins.folder / "prefill.interrupted").exists()


def test_a_second_sigterm_kills_at_once_what_does_not_end(stand_ins: StandIns) -> None:
    """Its whole group: what it has started too."""
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"
    terminate = f"os.kill({os.getpid()}, {signal.SIGTERM:d})"
    stand_ins.between = {
        "load": "import signal, subprocess\n"
        f'child = subprocess.Popen([sys.executable, "-c", {deaf!r}], stdout=subprocess.PIPE)\n'
        "child.stdout.readline()\n"
        "(folder / 'group').write_text(str(os.getpgrp()))\n"
        f"signal.signal(signal.SIGINT, lambda *_: {terminate})\n"
        f"{terminate}\n"
        "while True:\n    signal.pause()\n"
    }
    with pytest.raises(SystemExit, match="interrupted"):
        stand_ins.run("--only", "load")
    group = int((stand_ins.folder / "group").read_text())
    wait_until(lambda: not group_members(group), "the group is gone")
