"""On a GPU machine: a real tritonserver gives exactly the engine's tokens, eight virtual ranks on one GPU."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nmoe_backend.config import ServeConfig
from scripts.make_tiny_checkpoint import make_checkpoint
from tests.generation import GREEDY, engine_of, generate, replace, tokens
from tests.triton_server import TritonServer

TOML = """
model_path = "{checkpoint}"
device = "cuda"
max_batch_size = 16
max_prefill_tokens = 256
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
    with engine_of(ServeConfig.from_toml(toml)) as engine:  # one at a time: the same batch shapes as below
        offline = [tokens(generate(engine, [prompt], sampling))[0] for prompt in prompts]
    body = {"max_tokens": 16, "temperature": 0.0, "ignore_eos": True}
    with TritonServer(toml) as server:
        answers = [server.generate({"input_ids": prompt, **body})["output_ids"] for prompt in prompts]
    assert answers == offline
