"""configs/deploy/haproxy.cfg: four real servers behind a real HAProxy: one killed, added, drained under load."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.deploy import gateway
from tests.deploy.gateway import CONFIG, SERVERS, Gateway, Replica
from tests.deploy.load import Load
from tests.deploy.manifests import KUBERNETES
from tests.waiting import wait_until

SHORTER_THAN = 10_000  # bytes: the latency pool's


def test_haproxy_and_the_http_route_draw_the_same_line() -> None:
    (limit,) = re.findall(r"req\.hdr_val\(content-length\) lt (\d+)", CONFIG.read_text())
    rules = yaml.safe_load((KUBERNETES / "gateway" / "http-route.yaml").read_text())["spec"]["rules"]
    (pattern,) = [
        match["headers"][0]["value"]
        for rule in rules
        for match in rule.get("matches", [])
        if match["headers"][0]["name"] == "content-length"
    ]
    assert int(limit) == SHORTER_THAN
    for length in (0, 1, SHORTER_THAN - 1, SHORTER_THAN, 10 * SHORTER_THAN):
        assert bool(re.fullmatch(pattern, str(length))) is (length < SHORTER_THAN)


@pytest.mark.slow
def test_haproxy_accepts_the_configuration_without_a_warning() -> None:
    said = gateway.check(CONFIG)
    assert "Configuration file is valid" in said and "WARNING" not in said, said


class Site:
    """Four replicas and the gateway in front of them."""

    def __init__(self, replicas: dict[str, Replica], front: Gateway) -> None:
        self.replicas, self.front = replicas, front

    def wait_until_up(self, *names: str) -> None:
        """Until the gateway uses these."""
        pools = {name: "latency" if name.startswith("l") else "throughput" for name in names}
        wait_until(lambda: all(self.front.is_up(pools[name], name) for name in names), f"{names} are up", 20.0)

    def complete(
        self, headers: dict[str, str] | None = None, prompt: str = "Hello", padding: int = 0, **fields: str
    ) -> Any:
        """The headers of a whole answer. The gateway is idle before: a client has its last byte before HAProxy has
        counted the request off, and the bound on a replica's share would send the next one elsewhere."""
        wait_until(self.front.is_idle, "no request is left", 20.0)
        body = json.dumps({"prompt": prompt, "model": "tiny", "max_tokens": 2, **fields}).encode() + b" " * padding
        request = urllib.request.Request(
            f"{self.front.url}/v1/completions", body, {"Content-Type": "application/json", **(headers or {})}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 2
            return answer.headers


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, api_checkpoint: Path) -> Iterator[Site]:
    """All four run. Tests leave it as they found it."""
    folder = tmp_path_factory.mktemp("gateway")
    replicas = {name: Replica(name, folder, api_checkpoint) for name in SERVERS}
    with ExitStack() as started:
        for replica in replicas.values():  # not from other threads: children end with the thread that started them
            replica.start()
            started.callback(replica.kill)
        one = Site(replicas, started.enter_context(Gateway(folder, replicas)))
        one.wait_until_up(*SERVERS)
        yield one


@pytest.mark.slow
def test_short_prompts_go_to_one_pool_long_ones_to_the_other_and_a_wish_goes_first(site: Site) -> None:
    assert site.complete()["x-served-by"] in ("l1", "l2")
    assert site.complete(padding=SHORTER_THAN)["x-served-by"] in ("t1", "t2")
    assert site.complete({"x-nmoe-pool": "throughput"})["x-served-by"] in ("t1", "t2")
    assert site.complete({"x-nmoe-pool": "latency"}, padding=SHORTER_THAN)["x-served-by"] in ("l1", "l2")


@pytest.mark.slow
def test_a_session_stays_with_one_replica_and_sessions_spread(site: Site) -> None:
    def replica_of(session: str) -> str:
        answer = site.complete({"x-session-id": session})
        assert answer["x-session-id"] == session
        return str(answer["x-served-by"])

    homes = {session: replica_of(session) for session in map(str, range(24))}
    assert Counter(homes.values()).keys() == {"l1", "l2"}
    assert {session: replica_of(session) for session in homes} == homes


@pytest.mark.slow
def test_without_an_id_the_beginning_of_the_prompt_is_the_session_and_the_answer_names_it(site: Site) -> None:
    places = set()
    for number in range(12):
        first = site.complete(prompt=f"{number} system prompt " + "x " * 300)
        again = site.complete(
            {"x-session-id": first["x-session-id"]}, prompt="the next turn, from a client that echoes"
        )
        assert again["x-served-by"] == first["x-served-by"]
        places.add(first["x-served-by"])
    assert places == {"l1", "l2"}
    longer = [site.complete(prompt="y " * 600 + turn)["x-served-by"] for turn in ("one", "two", "three")]
    assert len(set(longer)) == 1


@pytest.mark.slow
def test_openais_prompt_cache_key_is_a_session_whatever_the_prompt_is(site: Site) -> None:
    homes = []
    for key in map(str, range(12)):
        first, again = (site.complete(prompt=f"{turn} turn", prompt_cache_key=key) for turn in ("one", "another"))
        assert (again["x-session-id"], again["x-served-by"]) == (first["x-session-id"], first["x-served-by"])
        homes.append((first["x-session-id"], first["x-served-by"]))
    assert len({session for session, _ in homes}) == 12 and {home for _, home in homes} == {"l1", "l2"}


@pytest.mark.slow
def test_metrics_of_replicas_stay_inside_and_the_gateway_has_its_own(site: Site) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{site.front.url}/metrics", timeout=10)
    with urllib.request.urlopen(f"http://{site.front.metrics}/metrics", timeout=10) as answer:
        assert b"haproxy_server_status" in answer.read()


@pytest.mark.slow
def test_triton_clients_stream_through_it(site: Site) -> None:
    import queue

    import tritonclient.grpc as grpc

    answers: queue.Queue[Any] = queue.Queue()
    with grpc.InferenceServerClient(site.front.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        values = {"text_input": ("BYTES", object, "Hello"), "max_tokens": ("INT32", np.int32, 5)}
        inputs = [grpc.InferInput(name, [1, 1], kind) for name, (kind, _, _) in values.items()]
        for tensor, (_, dtype, value) in zip(inputs, values.values(), strict=True):
            tensor.set_data_from_numpy(np.array([[value]], dtype=dtype))
        client.async_stream_infer("deepseek_v3", inputs)
        result, error = answers.get(timeout=60)
        assert error is None and result.as_numpy("output_ids") is not None
        client.stop_stream()


@pytest.mark.slow
def test_a_killed_replica_costs_its_own_live_answers_only_and_comes_back(site: Site) -> None:
    with Load(site.front.url, per_s=6.0, max_tokens=40) as load:
        wait_until(lambda: load.served_since(0.0).keys() == {"l1", "l2"}, "both replicas answered", 60.0)
        killed_s = time.monotonic()
        site.replicas["l1"].kill()
        wait_until(lambda: load.served_since(killed_s)["l2"] > 20, "20 answers of the one that is left", 60.0)
        assert not site.front.is_up("latency", "l1")
        site.replicas["l1"].start()
        site.wait_until_up("l1")
        back_s = time.monotonic()
        wait_until(lambda: load.served_since(back_s)["l1"] > 5, "it takes traffic again", 60.0)
    failed = [one for one in load.outcomes if one.end != "ok"]
    assert all(one.served_by == "l1" and one.begun_s < killed_s for one in failed), failed


@pytest.mark.slow
def test_a_replica_that_answers_but_is_not_ready_is_left_out(site: Site) -> None:
    """Its Triton is gone, its front end is not: the check fails, and a request that it refuses is another one's."""
    replica = site.replicas["l1"]
    with Load(site.front.url, per_s=6.0, max_tokens=40) as load:
        wait_until(lambda: load.served_since(0.0).keys() == {"l1", "l2"}, "both replicas answered", 60.0)
        killed_s = time.monotonic()
        replica.triton.process.kill()
        wait_until(lambda: not site.front.is_up("latency", "l1"), "it is left out", 20.0)
        wait_until(lambda: load.served_since(killed_s)["l2"] > 20, "20 answers of the one that is left", 60.0)
        assert replica.front.process.exit_code() is None
        replica.triton.__enter__()
        site.wait_until_up("l1")
        back_s = time.monotonic()
        wait_until(lambda: load.served_since(back_s)["l1"] > 5, "it takes traffic again", 60.0)
    failed = [one for one in load.outcomes if one.end != "ok"]
    assert all(one.served_by == "l1" and one.begun_s < killed_s for one in failed), failed


@pytest.mark.slow
def test_a_drained_replica_costs_nobody_anything(site: Site) -> None:
    with Load(site.front.url, per_s=6.0, max_tokens=40) as load:
        wait_until(lambda: load.served_since(0.0).keys() == {"l1", "l2"}, "both replicas answered", 60.0)
        site.replicas["l2"].drain()
        gone_s = time.monotonic()
        wait_until(lambda: load.served_since(gone_s)["l1"] > 20, "20 answers of the one that is left", 60.0)
        site.replicas["l2"].start()
        site.wait_until_up("l2")
    assert set(load.ends) == {"ok"}, load.ends


@pytest.mark.slow
def test_a_pool_without_replicas_is_served_by_the_other(site: Site) -> None:
    for name in ("t1", "t2"):
        site.front.command(f"set server throughput/{name} state maint")
    assert site.complete(padding=SHORTER_THAN)["x-served-by"] in ("l1", "l2")
    for name in ("t1", "t2"):
        site.front.command(f"set server throughput/{name} state ready")
    site.wait_until_up("t1", "t2")
