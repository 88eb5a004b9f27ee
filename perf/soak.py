"""Minutes of random mixed load over `nmoe serve`: no token wrong, lost or doubled, memory flat, all pages back.

Ranks with known tokens (known_tokens.py) take 2 ms a step on few KV pages, so that sequences are preempted; everything
else is the product: both faces, streams and whole answers, short and long, a quarter of them cancelled on the way.
Loopback only, bounded in time, clients and lengths; seeded: a client's n-th request is the same in every run.

Memory: the anonymous memory (heaps, stacks) of every process of the server and its shared memory, every two seconds.
Growth is the slope of the least-squares line through the last two thirds, in which queues and allocators have settled.

    python -m perf.soak [--minutes 10] [--seed 0] [--save]
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmoe_backend.server_process import group_members
from perf import results
from perf.known_tokens import known_tokens
from perf.scripted import ROOT
from scripts.make_tiny_checkpoint import make_checkpoint
from tests.faults.serve import Serve
from tests.server.client import Stream

CLIENTS = 12
MAX_PROMPT, MAX_TOKENS = 700, 400
CANCELLED = 0.25
MAX_GROWTH_MB_PER_MIN = 1.0
BASELINE = ROOT / "perf" / "baselines" / "cpu.json"
_SAMPLE_S = 2.0
_LIMIT_S = 60.0  # of one request


@dataclass(frozen=True)
class Ask:
    """One request. `leave_after`: tokens after which the client goes away; None: it reads to the end."""

    prompt: list[int]
    max_tokens: int
    leave_after: int | None


class Tally:
    """What became of the requests; safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: list[str] = []

    def add(self, face: str, verdict: str, num_tokens: int, example: str) -> None:
        """One request."""
        with self._lock:
            self.counts.update({verdict: 1, face: 1, "tokens": num_tokens})
            if verdict not in ("right", "cancelled") and len(self.examples) < 10:
                self.examples.append(f"{face}: {verdict}: {example}")


def verdict(expected: Sequence[object], got: Sequence[object], left: bool) -> str:
    """`right`, `cancelled` (and right so far), or how it is not: lost, doubled, wrong."""
    if left and got == expected[: len(got)]:
        return "cancelled"
    if got == expected:
        return "right"
    at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    rest = got[at : at + 8]
    for shift in range(1, 9):
        if rest == expected[at + shift : at + shift + len(rest)]:
            return "lost"
        if at >= shift and rest and rest == expected[at - shift : at - shift + len(rest)]:
            return "doubled"
    return "wrong"


def draw(rng: random.Random, letters: Sequence[int]) -> Ask:
    """Lengths are log-uniform: many short ones, a few long ones."""
    prompt = rng.choices(letters, k=round(MAX_PROMPT ** rng.random()))
    max_tokens = round(MAX_TOKENS ** rng.random())
    # well before the end: a cancellation that meets the last response leaks the request in this Triton's gRPC front end
    leaves = max_tokens > 40 and rng.random() < CANCELLED / 0.4  # 40 % are that long
    return Ask(prompt, max_tokens, rng.randrange(1, max_tokens // 2) if leaves else None)


def ask_grpc(serve: Serve, ask: Ask) -> tuple[Sequence[object], str]:
    """`deepseek_v3`, one connection; leaving cancels the stream."""
    got: list[int] = []
    stream = Stream(serve.grpc)
    with stream:
        stream.send({"input_ids": ask.prompt, "max_tokens": ask.max_tokens, "ignore_eos": True, "stream": True})
        while True:
            response = stream.read()
            if isinstance(response, str):
                return got, response
            got += response.values["output_ids"]
            if response.final:
                return got, ""
            if ask.leave_after is not None and len(got) >= ask.leave_after:
                stream.disconnect()
                return got, ""


def ask_events(serve: Serve, ask: Ask) -> tuple[Sequence[object], str]:
    """The front end's stream; leaving closes the connection."""
    body = {"prompt": ask.prompt, "stream": True}
    text, num_chunks = "", 0
    connection, answer = _post(serve, ask, body)
    try:
        if answer.status != 200:
            return "", f"{answer.status} {answer.read()[:200]!r}"
        for line in answer:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    return text, str(event["error"])
                text += event["choices"][0]["text"]
                num_chunks += 1
            elif line.startswith(b"data: [DONE]"):
                return text, ""
            if ask.leave_after is not None and num_chunks >= ask.leave_after:
                return text, ""
        return text, "the stream broke off"
    finally:
        connection.close()


def ask_whole(serve: Serve, ask: Ask) -> tuple[Sequence[object], str]:
    """The front end's whole answer, two choices of it, which are the same; nobody leaves."""
    connection, answer = _post(serve, ask, {"prompt": ask.prompt, "n": 2})
    try:
        whole = json.loads(answer.read())
        if answer.status != 200:
            return "", f"{answer.status} {whole}"
        first, second = (choice["text"] for choice in whole["choices"])
        used = whole["usage"]["completion_tokens"]
        return first, "" if first == second and used == 2 * ask.max_tokens else f"choices differ, or {used} tokens"
    finally:
        connection.close()


def _post(serve: Serve, ask: Ask, body: Mapping[str, object]) -> tuple[http.client.HTTPConnection, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", serve.ports["openai_port"], timeout=_LIMIT_S)
    fields = {**body, "model": "tiny", "max_tokens": ask.max_tokens, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(fields), {"Content-Type": "application/json"})
    return connection, connection.getresponse()


FACES: Mapping[str, Callable[[Serve, Ask], tuple[Sequence[object], str]]] = {
    "gRPC": ask_grpc, "events": ask_events, "whole": ask_whole,
}  # fmt: skip


def client(serve: Serve, seed: str, until_s: float, tally: Tally) -> None:
    """One request after the other."""
    rng = random.Random(seed)
    while time.monotonic() < until_s:
        ask, face = draw(rng, serve.letters), rng.choice(list(FACES))
        got, error = FACES[face](serve, ask)
        expected: Sequence[object] = known_tokens(serve.letters, ask.prompt, ask.max_tokens)
        if face != "gRPC":
            expected = serve.tokenizer.decode(list(expected))
        left = ask.leave_after is not None and face != "whole"
        outcome = "failed" if error else verdict(expected, got, left)
        tally.add(face, outcome, len(got) if face == "gRPC" else 0, f"{error} got {got[-40:]!r} of {ask.max_tokens}")


def processes(serve: Serve) -> dict[str, int]:
    """Name -> process id of everything that `nmoe serve` runs, itself included."""
    children = serve.children()
    named = {"nmoe serve": serve.process.pid, "front end": children["front end"], "tritonserver": children["triton"]}
    stubs = [pid for pid in group_members(children["triton"]) if pid != children["triton"]]
    return named | {"engine (stub)" if pid == serve.stub() else f"stub {pid}": pid for pid in stubs}


def memory_mb(serve: Serve, pids: Mapping[str, int]) -> dict[str, float]:
    """By process, and of /dev/shm. Pages of files are left out: how many count depends on who else has mapped them."""
    sizes = {}
    for name, pid in pids.items():
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        sizes[name] = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Anonymous:")) / 1024
    return sizes | {"shared memory": sum(path.stat().st_blocks for path in serve.shared_memory()) / 2048}


def growth_mb_per_min(samples: Sequence[tuple[float, float]]) -> float:
    """Slope of (seconds, MB) over the last two thirds."""
    settled = samples[len(samples) // 3 :]
    times, sizes = zip(*settled, strict=True)
    return statistics.linear_regression(times, sizes).slope * 60


def soak(folder: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Run it; the figures."""
    checkpoint = make_checkpoint(folder / "tiny", dtype="float32")
    tally = Tally()
    sizes: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    limits = {"num_pages": 72, "max_seq_len": 1104, "max_batch_size": 8}  # one longest sequence fits a rank, two do not
    with Serve(folder / "serve", checkpoint, engine="perf.known_tokens", step_ms=2.0, **limits) as serve:
        pids = processes(serve)
        began_s = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as pool:
            until_s = began_s + seconds
            futures = [pool.submit(client, serve, f"{seed}/{index}", until_s, tally) for index in range(CLIENTS)]
            while time.monotonic() < until_s and not any(future.done() for future in futures):
                for name, size in memory_mb(serve, pids).items():
                    sizes[name].append((time.monotonic() - began_s, size))
                time.sleep(_SAMPLE_S)
            for future in futures:
                future.result()
        serve.assert_serves()  # all pages back, too
        assert processes(serve) == pids, "a process was replaced"
        preemptions = serve.metric("nmoe_preemptions_total")
        generated = serve.metric("nmoe_generation_tokens_total")
    counts = tally.counts
    return {
        "seconds": seconds, "seed": seed, "requests": sum(counts[face] for face in FACES),
        **{name: counts[name] for name in ("right", "cancelled", "wrong", "lost", "doubled", "failed")},
        "generated_tokens": generated, "preemptions": preemptions, "examples": tally.examples,
        "memory_mb": {name: round(samples[-1][1], 1) for name, samples in sizes.items()},
        "growth_mb_per_min": {name: round(growth_mb_per_min(samples), 3) for name, samples in sizes.items()},
    }  # fmt: skip


def faults_of(result: Mapping[str, Any], max_growth: float) -> list[str]:
    """What is not as it should be; empty: all is well."""
    faults = [f"{result[name]} {name}" for name in ("wrong", "lost", "doubled", "failed") if result[name]]
    faults += [
        f"{name} grows by {growth} MB a minute"
        for name, growth in result["growth_mb_per_min"].items() if growth > max_growth
    ]  # fmt: skip
    return faults if result["right"] and result["cancelled"] else [*faults, "nothing was asked"]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(description="Random mixed load over `nmoe serve`, every token checked.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="put the figures into perf/baselines/cpu.json")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="nmoe-soak-") as folder:
        result = soak(Path(folder), args.minutes * 60, args.seed)
    result |= {
        "name": "soak", "value": result["wrong"] + result["lost"] + result["doubled"],
        "unit": "tokens wrong, lost or doubled", "goal": "0; memory flat; all pages back",
        "commit": results.commit_id(), "machine": results.machine(),
        "method": f"python -m perf.soak, {CLIENTS} clients over gRPC and the OpenAI front end, 2 ranks",
    }  # fmt: skip
    faults = faults_of(result, MAX_GROWTH_MB_PER_MIN)
    if args.save:
        results.save_lines(BASELINE, {"soak": result})
    print(json.dumps(result))
    print("; ".join(faults) or "0 wrong, 0 lost, 0 doubled tokens; memory flat; all pages back")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
