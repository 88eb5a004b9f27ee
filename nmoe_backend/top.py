"""`nmoe top`: what one or several servers do right now, from their metrics endpoints, in a terminal.

Figures are of the last interval where there are two scrapes, and since the start of the server in the first frame and
with --once. Percentiles are read off histogram buckets as Prometheus' histogram_quantile does.
"""

from __future__ import annotations

import argparse
import http.client
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nmoe_backend.config import ServeConfig
from nmoe_backend.http_probe import url_host

_TIMEOUT_S = 2.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the environment names
_DEFAULT_URL = "http://127.0.0.1:8002/metrics"
_QUANTILES = (0.5, 0.9, 0.99)
_LATENCIES = (
    ("time to first token", "nmoe_time_to_first_token_seconds"),
    ("inter-token", "nmoe_inter_token_latency_seconds"),
    ("in the queue", "nmoe_queue_seconds"),
    ("whole request", "nmoe_request_latency_seconds"),
    ("step", "nmoe_step_duration_seconds"),
)


@dataclass(frozen=True, slots=True)
class Scrape:
    """One look at one endpoint."""

    at_s: float
    series: Mapping[tuple[str, frozenset[tuple[str, str]]], float]  # (name, labels) -> value

    @classmethod
    def parse(cls, text: str, at_s: float) -> Scrape:
        """Prometheus' text format. ValueError where it is not."""
        families = text_string_to_metric_families(text)
        samples = [sample for family in families for sample in family.samples]
        return cls(at_s, {(one.name, frozenset(one.labels.items())): one.value for one in samples})

    def value(self, name: str) -> float:
        """The sum over a family's series; 0 where there is none."""
        return sum(value for (found, _), value in self.series.items() if found == name)

    def by(self, name: str, label: str) -> dict[str, float]:
        """Label value -> value."""
        return {dict(labels)[label]: value for (found, labels), value in self.series.items() if found == name}

    def buckets(self, name: str) -> dict[float, float]:
        """Upper bound -> count of everything up to it."""
        return {float(bound): count for bound, count in self.by(f"{name}_bucket", "le").items()}


def quantile(buckets: Mapping[float, float], share: float) -> float | None:
    """Linear within the bucket that holds it; beyond the last bound that bound; None without an observation.

    Example: {1.0: 2, 2.0: 4, inf: 4}: half of 4 are up to 1.0, three quarters up to 1.5.
    """
    bounds = sorted(buckets)
    if not bounds or buckets[bounds[-1]] <= 0:
        return None
    rank = share * buckets[bounds[-1]]
    low, below = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= rank and buckets[bound] > below:
            return low if bound == float("inf") else low + (bound - low) * (rank - below) / (buckets[bound] - below)
        low, below = (bound, buckets[bound]) if bound != float("inf") else (low, below)
    return low


def read(url: str) -> Scrape | str:
    """What the endpoint says, or why it says nothing."""
    try:
        with _OPENER.open(url, timeout=_TIMEOUT_S) as answer:
            return Scrape.parse(answer.read().decode(), time.monotonic())
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"no metrics: {error}"


def frame(url: str, now: Scrape | str, before: Scrape | None) -> RenderableType:
    """One server."""
    if isinstance(now, str):
        return Panel(Text(now, style="red"), title=url, title_align="left")
    if not now.by("nmoe_rank_sequences", "rank"):
        return Panel(Text("no nmoe_* metrics: is this the metrics_port?", style="red"), title=url, title_align="left")
    alive = now.value("nmoe_engine_alive") == 1
    title = Text.assemble(url, "  ", ("alive", "green") if alive else ("DEAD", "bold red"))
    return Panel(Group(_summary(now, before), _ranks(now), _latencies(now, before)), title=title, title_align="left")


def _summary(now: Scrape, before: Scrape | None) -> RenderableType:
    overflow = now.value("nmoe_moe_overflow_total")
    cells = [
        ("running", f"{now.value('nmoe_requests_running'):.0f}"),
        ("waiting", f"{now.value('nmoe_requests_waiting'):.0f}"),
        ("KV", f"{now.value('nmoe_kv_cache_utilization_percent'):.1f} %"),
        ("decode", f"{_rate('nmoe_generation_tokens_total', 'nmoe_decode_tokens_per_second', now, before):,.0f} tok/s"),
        ("prefill", f"{_rate('nmoe_prompt_tokens_total', 'nmoe_prefill_tokens_per_second', now, before):,.0f} tok/s"),
        ("step", f"{1e3 * now.value('nmoe_step_seconds'):.1f} ms"),
        ("tokens/response", f"{now.value('nmoe_tokens_per_response'):.2f}"),
        ("errors", f"{now.value('nmoe_request_errors_total'):.0f}"),
        ("preempted", f"{now.value('nmoe_preemptions_total'):.0f}"),
        *((("OVERFLOW", f"{overflow:.0f}"),) if overflow else ()),
    ]
    return Text("   ").join(Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in cells)


def _rate(counter: str, gauge: str, now: Scrape, before: Scrape | None) -> float:
    """Over the interval; the server's own last quarter second where there is none."""
    if before is None or now.at_s <= before.at_s:
        return now.value(gauge)
    return max(0.0, now.value(counter) - before.value(counter)) / (now.at_s - before.at_s)


def _ranks(now: Scrape) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("rank", "batch", "KV %", "prefill backlog"):
        table.add_column(name, justify="right")
    sequences, kv, backlog = (
        now.by(f"nmoe_rank_{name}", "rank")
        for name in ("sequences", "kv_cache_utilization_percent", "prefill_backlog_tokens")
    )
    for rank in sorted(sequences, key=int):
        table.add_row(rank, f"{sequences[rank]:.0f}", f"{kv[rank]:.1f}", f"{backlog[rank]:.0f}")
    return table


def _latencies(now: Scrape, before: Scrape | None) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("milliseconds")
    for share in _QUANTILES:
        table.add_column(f"p{100 * share:.0f}", justify="right")
    for title, name in _LATENCIES:
        buckets = now.buckets(name)
        if before is not None:
            old = before.buckets(name)
            recent = {bound: count - old.get(bound, 0.0) for bound, count in buckets.items()}
            buckets = recent if min(recent.values(), default=0.0) >= 0 else buckets  # below 0: it was restarted
        values = [quantile(buckets, share) for share in _QUANTILES]
        table.add_row(title, *("-" if value is None else f"{1e3 * value:.1f}" for value in values))
    return table


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Returns the exit code: with --once 1 where a server did not answer."""
    parser = argparse.ArgumentParser(prog="nmoe top", description="What servers do right now, from their metrics.")
    parser.add_argument("urls", nargs="*", metavar="URL", help=f"metrics endpoints; default: {_DEFAULT_URL}")
    parser.add_argument("--config", "-c", type=Path, metavar="X.toml", help="the endpoint of this TOML's server")
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between frames (default 1)")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    values = parser.parse_args(argv)
    if values.interval <= 0:
        parser.error(f"--interval is {values.interval:g}, needs more than 0 seconds")
    urls = [*values.urls]
    if values.config is not None:
        config = ServeConfig.from_toml(values.config)
        urls.append(f"http://{url_host(config.host)}:{config.metrics_port}/metrics")
    urls = [_full(url) for url in urls or [_DEFAULT_URL]]
    console = console or Console()
    if values.once:
        looks = [read(url) for url in urls]
        console.print(Group(*(frame(url, look, None) for url, look in zip(urls, looks, strict=True))))
        return 1 if any(isinstance(look, str) for look in looks) else 0
    return _watch(urls, values.interval, console)


def _watch(urls: Sequence[str], interval_s: float, console: Console) -> int:
    """Until Ctrl-C."""
    before: dict[str, Scrape] = {}
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                looks = {url: read(url) for url in urls}
                live.update(Group(*(frame(url, look, before.get(url)) for url, look in looks.items())), refresh=True)
                before = {url: look for url, look in looks.items() if isinstance(look, Scrape)}
                time.sleep(interval_s)
    except KeyboardInterrupt:
        return 0


def _full(url: str) -> str:
    """HOST:PORT is enough."""
    url = url if "://" in url else f"http://{url}"
    return url if url.count("/") > 2 else f"{url}/metrics"


if __name__ == "__main__":
    sys.exit(main())
