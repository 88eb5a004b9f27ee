"""genai-perf unmodified, in its TensorRT-LLM form and in its vLLM form, offline with the tiny model's tokenizer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from perf import perf_analyzer
from tests.server.metrics import snapshot_at_rest
from tests.triton_server import TritonServer

GENERATED = "nmoe_generation_tokens_total"
TOOLS = Path(__file__).resolve().parents[2] / ".venv-tools" / "bin"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "backend"),
    [("ensemble", "tensorrtllm"), ("deepseek_v3", "tensorrtllm"), ("deepseek_v3_vllm", "vllm")],
)
def test_genai_perf_measures_what_the_server_sent(
    triton: TritonServer, model_path: Path, tmp_path: Path, model: str, backend: str
) -> None:
    assert (TOOLS / "genai-perf").exists(), "genai-perf is not set up. Run scripts/_tools, or scripts/test --all."
    command = [
        str(TOOLS / "genai-perf"), "profile", "-m", model, "--endpoint-type", "kserve", "--backend", backend,
        "--streaming", "-u", triton.grpc, "--tokenizer", str(model_path), "--num-dataset-entries", "5",
        "--synthetic-input-tokens-mean", "20", "--synthetic-input-tokens-stddev", "0",
        "--output-tokens-mean", "8", "--output-tokens-mean-deterministic",
        "--concurrency", "2", "--request-count", "12", "--artifact-dir", str(tmp_path / "artifacts"),
    ]  # fmt: skip
    environment = perf_analyzer.environment(triton.config.torch_extensions_dir)
    environment |= {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PATH": f"{TOOLS}:{environment['PATH']}"}
    before = snapshot_at_rest(triton, [GENERATED])[GENERATED]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "artifacts").iterdir()
    result = json.loads((folder / "profile_export_genai_perf.json").read_text())
    assert result["request_count"]["avg"] >= 12
    assert result["input_sequence_length"]["avg"] == 20
    assert 0 < result["time_to_first_token"]["avg"] <= result["request_latency"]["avg"]
    profile = json.loads((folder / "profile_export.json").read_text())
    requests = profile["experiments"][0]["requests"]
    assert all(sum(bool(response) for response in one["response_outputs"]) >= 2 for one in requests)  # it streamed
    generated = snapshot_at_rest(triton, [GENERATED])[GENERATED] - before
    assert generated >= 12 * 8 and generated % 8 == 0  # min and max tokens were both understood
