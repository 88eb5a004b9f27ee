"""Metrics of a live server, which pushes them four times a second: their values, and waiting for those expected."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client.parser import text_string_to_metric_families

from nmoe_backend.metrics_families import SPECS
from tests.triton_server import TritonServer

LIMIT_S = 20.0


def scrape(server: TritonServer) -> dict[str, float]:
    """`name` or `name{value of the label that tells series apart}` -> value, read by Prometheus' own parser."""
    own = {spec.name: spec.label for spec in SPECS}
    found = {}
    for family in text_string_to_metric_families(server.get("metrics", server.metrics).decode()):
        for sample in family.samples:
            label = "le" if sample.name.endswith("_bucket") else own.get(sample.name, "")
            found[f"{sample.name}{{{sample.labels[label]}}}" if label else sample.name] = sample.value
    return found


def scrape_when(server: TritonServer, holds: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """Pushes come four times a second."""
    limit = time.monotonic() + LIMIT_S
    while not holds(values := scrape(server)):
        assert time.monotonic() < limit, values
        time.sleep(0.05)
    return values


def _some(server: TritonServer, names: Iterable[str]) -> dict[str, float]:
    """0 for what is not there yet."""
    values = scrape(server)
    return {name: values.get(name, 0.0) for name in names}


def snapshot_at_rest(triton: TritonServer, names: list[str]) -> dict[str, float]:
    """The values, named as `scrape` does, once two pushes have changed nothing: what ran before has been counted."""
    last: dict[str, float] = {}
    since = start = time.monotonic()
    while time.monotonic() - since < 0.6:
        assert time.monotonic() - start < 30, "the server does not come to rest"
        found = _some(triton, names)
        if found != last:
            last, since = found, time.monotonic()
        time.sleep(0.02)
    return last


def settled(triton: TritonServer, expected: dict[str, float]) -> None:
    """Until these series, named as `scrape` does, have these values in one scrape: a push sets one after the other."""
    limit = time.monotonic() + 5
    while (found := _some(triton, expected)) != expected:
        assert time.monotonic() < limit, f"got {found}, expected {expected}"
        time.sleep(0.02)
