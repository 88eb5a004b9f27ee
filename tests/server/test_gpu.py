"""On a GPU machine: a real tritonserver gives exactly the engine's tokens, eight virtual ranks on one GPU.

What takes its time with an empty kernel cache is compiling: of `slim`'s kernels, for each size of a step, by eight rank
threads that all miss the cache at once. So there is room for few rows and short chunks; prompts come one at a time.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from nmoe_backend.config import ServeConfig
from scripts.make_tiny_checkpoint import make_checkpoint
from tests.generation import GREEDY, engine_of, generate, replace, tokens
from tests.server.metrics import scrape, scrape_when
from tests.triton_server import TritonServer

TOML = """
model_path = "{checkpoint}"
device = "cuda"
max_batch_size = 2
max_prefill_tokens = 128
max_seq_len = 1024
gpu_memory_utilization = 0.5
rank_timeout_s = 120.0
[kv_layout]
page_size = 64
[[replicas]]
replica_id = 0
gpus = [0, 0, 0, 0, 0, 0, 0, 0]
"""


@pytest.mark.gpu
@pytest.mark.parametrize("preset, dtype", [("tiny", "float32"), ("tiny", "fp8"), ("slim", "fp8")])
def test_the_server_on_a_gpu_gives_exactly_the_engines_tokens(preset: str, dtype: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", preset=preset, dtype=dtype)
    toml = tmp_path / "gpu.toml"
    toml.write_text(TOML.format(checkpoint=tmp_path / "model"))
    draw = random.Random(0)
    prompts = [[draw.randrange(30, 1000) for _ in range(draw.randint(1, 300))] for _ in range(4)]
    sampling = replace(GREEDY, max_tokens=16, ignore_eos=True)
    with engine_of(ServeConfig.from_toml(toml), progress=print) as engine:
        # One at a time: the same batch shapes as below.
        offline = [tokens(generate(engine, [prompt], sampling))[0] for prompt in prompts]
    body = {"max_tokens": 16, "temperature": 0.0, "ignore_eos": True}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    visits = (config["num_hidden_layers"] - config["first_k_dense_replace"]) * config["num_experts_per_tok"]
    num_fed = sum(len(prompt) + 15 for prompt in prompts)  # a last token is fed to nobody
    with TritonServer(toml) as server:
        answers = [server.generate({"input_ids": prompt, **body})["output_ids"] for prompt in prompts]
        values = scrape_when(server, lambda values: values["nmoe_generation_tokens_total"] == 16 * len(prompts))
        assert sum(values[f"nmoe_expert_rows_total{{{rank}}}"] for rank in range(8)) == num_fed * visits
        wait_until_busy(server, {"input_ids": prompts[0], **body})
    assert answers == offline


def wait_until_busy(server: TritonServer, body: dict[str, object]) -> None:
    """Until the server says that its GPU computes, which it does meanwhile."""
    limit = time.monotonic() + 20.0
    while scrape(server)["nmoe_gpu_utilization_percent{0}"] == 0.0:
        assert time.monotonic() < limit, "the GPU is never seen to compute"
        server.generate(body)
