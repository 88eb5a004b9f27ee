"""`nmoe top` over scripted endpoints."""

from __future__ import annotations

import io
import math
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given, strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from rich.console import Console, RenderableType

from nmoe_backend import top
from nmoe_backend.metrics_families import SPECS
from nmoe_backend.top import Scrape, frame, main, quantile


class Server:
    """The metrics of a server as Prometheus' own client writes them; all 0 at first."""

    def __init__(self, ranks: int = 2) -> None:
        self.registry = CollectorRegistry()
        kinds = {"gauge": Gauge, "counter": Counter}
        self.families: dict[str, Gauge | Counter | Histogram] = {}
        for spec in SPECS:
            labels = [*spec.constant_labels, *([spec.label] if spec.label else [])]
            if spec.kind == "histogram":
                made = Histogram(spec.name, spec.help, labels, buckets=spec.buckets, registry=self.registry)
            else:
                made = kinds[spec.kind](spec.name, spec.help, labels, registry=self.registry)  # type: ignore[assignment]
            self.families[spec.name] = made
        for rank in range(ranks):
            for name in ("sequences", "kv_cache_utilization_percent", "prefill_backlog_tokens"):
                self.gauge(f"nmoe_rank_{name}", 0.0, str(rank))

    def gauge(self, name: str, value: float, *labels: str) -> None:
        made = self.families[name]
        assert isinstance(made, Gauge)
        (made.labels(*labels) if labels else made).set(value)

    def count(self, name: str, value: float) -> None:
        made = self.families[name]
        assert isinstance(made, Counter)
        made.inc(value)

    def observe(self, name: str, *values: float) -> None:
        made = self.families[name]
        assert isinstance(made, Histogram)
        for value in values:
            made.observe(value)

    def text(self) -> str:
        return generate_latest(self.registry).decode()

    def scrape(self, at_s: float = 0.0) -> Scrape:
        return Scrape.parse(self.text(), at_s)


@contextmanager
def endpoint(server: Server) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = server.text().encode()
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def shown(what: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_a_proxy_that_the_environment_names_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    with endpoint(Server()) as address:
        assert isinstance(top.read(f"http://{address}/metrics"), Scrape)


def test_the_quantile_of_the_docstring() -> None:
    buckets = {1.0: 2.0, 2.0: 4.0, math.inf: 4.0}
    assert (quantile(buckets, 0.5), quantile(buckets, 0.75)) == (1.0, 1.5)
    assert quantile({1.0: 0.0, math.inf: 0.0}, 0.5) is None and quantile({}, 0.5) is None
    assert quantile({1.0: 1.0, math.inf: 9.0}, 0.9) == 1.0  # beyond the last bound


@given(st.lists(st.floats(0.0, 9.9), min_size=1, max_size=50), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    buckets = {float(bound): float(sum(value <= bound for value in values)) for bound in (*range(1, 11), math.inf)}
    true = sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
    found = quantile(buckets, share)
    assert found is not None and abs(found - true) <= 1.0


def test_a_frame_holds_load_ranks_and_latencies() -> None:
    server = Server()
    server.gauge("nmoe_engine_alive", 1)
    for name, value in (("requests_running", 7), ("requests_waiting", 3), ("decode_tokens_per_second", 1234)):
        server.gauge(f"nmoe_{name}", value)
    server.gauge("nmoe_kv_cache_utilization_percent", 37.5)
    server.gauge("nmoe_rank_sequences", 5, "0")
    server.gauge("nmoe_rank_sequences", 2, "1")
    server.gauge("nmoe_rank_kv_cache_utilization_percent", 62.5, "1")
    server.observe("nmoe_time_to_first_token_seconds", *[0.02] * 10)
    text = shown(frame("here", server.scrape(), None))
    for words in ("here  alive", "running 7", "waiting 3", "KV 37.5 %", "decode 1,234 tok/s"):
        assert words in text
    assert "OVERFLOW" not in text
    lines = [line.strip("│ ").split() for line in text.splitlines()]
    assert ["0", "5", "0.0", "0"] in lines and ["1", "2", "62.5", "0"] in lines
    assert ["time", "to", "first", "token", "17.5", "23.5", "24.9"] in lines  # within (10, 25] ms
    assert ["inter-token", "-", "-", "-"] in lines


def test_rates_and_percentiles_are_those_of_the_interval() -> None:
    server = Server()
    server.observe("nmoe_inter_token_latency_seconds", *[2.0] * 100)
    server.count("nmoe_generation_tokens_total", 1000)
    before = server.scrape(10.0)
    server.observe("nmoe_inter_token_latency_seconds", *[0.004] * 10)
    server.count("nmoe_generation_tokens_total", 500)
    text = shown(frame("here", server.scrape(12.0), before))
    assert "decode 250 tok/s" in text and "DEAD" in text
    assert ["inter-token", "3.8", "4.8", "5.0"] in [
        line.strip("│ ").split() for line in text.splitlines()
    ]  # within (2.5, 5] ms


def test_a_restarted_server_shows_its_own_figures() -> None:
    old, new = Server(), Server()
    old.observe("nmoe_inter_token_latency_seconds", *[2.0] * 9)
    old.count("nmoe_generation_tokens_total", 1000)
    new.observe("nmoe_inter_token_latency_seconds", 0.004)
    text = shown(frame("here", new.scrape(2.0), old.scrape(1.0)))
    assert "decode 0 tok/s" in text and "3.8" in text


def test_an_overflow_is_shouted() -> None:
    server = Server()
    server.count("nmoe_moe_overflow_total", 1)
    assert "OVERFLOW 1" in shown(frame("here", server.scrape(), None))


def test_once_prints_every_endpoint_and_fails_where_one_does_not_answer() -> None:
    server = Server()
    server.gauge("nmoe_requests_running", random.Random(0).randrange(100, 999))
    console = Console(file=io.StringIO(), width=160)
    with endpoint(server) as address:
        assert main(["--once", address, f"http://{address}/metrics"], console) == 0
        assert main(["--once", address, f"http://{address}/elsewhere"], console) == 1
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("running") == 3 and "404" in text


def test_an_endpoint_without_our_metrics_says_so() -> None:
    assert "is this the metrics_port?" in shown(frame("here", Scrape.parse("up 1\n", 0.0), None))


def test_the_live_view_goes_on_when_a_server_is_gone_and_ends_with_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[str] = []
    looks = iter([Server().scrape(1.0), "no metrics: refused", Server().scrape(3.0)])

    def wait(_interval_s: float) -> None:
        frames.append("")
        if len(frames) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(top, "read", lambda url: next(looks))
    monkeypatch.setattr(top.time, "sleep", wait)
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    assert main(["host:1"], console) == 0
    assert "no metrics: refused" in console.file.getvalue()  # type: ignore[attr-defined]
