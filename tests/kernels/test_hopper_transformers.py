"""The slim model through the production kernels and graphs against transformers' DeepseekV3ForCausalLM in fp32.

The same fp8 weights: transformers gets them dequantised. What is left of a difference is arithmetic: bf16 activations,
and e4m3 ones in blocks of 128 before each product, which is what fp8 serving of this checkpoint means (DeepSeek's own
kernels do the same). An e4m3 rounding is 2.6 % of a value in the root mean square; through four layers of random
weights, whose outputs cancel more than a trained model's, it moves the logits of a position by 8 % of the largest one
in the median (test_hopper_steps.py says how that is known without our kernels). So, teacher-forced:
* the median position's max |a - b| / max |b| is below 15 %, twice that;
* where transformers' best token leads by 20 % of the largest logit, it is ours too, in 95 % of such positions: to turn
  one takes an error of more than the median's size on both, which a wrong mask, position or page would make.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from scripts.make_tiny_checkpoint import make_checkpoint
from tests.gates.replica import Driver, Generated, Replica, limits_for

pytestmark = pytest.mark.gpu
NUM_TOKENS = 8


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(30, 1000, (length,), generator=generator).tolist() for length in (300, 3, 129, 64, 1)]


def dequantized(path: Path, to: Path) -> Path:
    """The checkpoint with each fp8 tensor multiplied by its blocks' scales, in fp32; its config says nothing of fp8."""
    to.mkdir()
    found: dict[str, Tensor] = {}
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    wide = {}
    for name, tensor in found.items():
        if name.endswith("_scale_inv"):
            continue
        scale = found.get(f"{name}_scale_inv")
        wide[name] = tensor.float()
        if scale is not None:
            rows, columns = tensor.shape
            wide[name] *= scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    save_file(wide, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.fixture(scope="module")
def ours_and_theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Generated], list[Tensor]]:
    """Our run, and transformers' logits over what it fed."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("slim")
    path = make_checkpoint(folder / "fp8", preset="slim", dtype="fp8")
    limits = limits_for(1, 64, max_batch_size=8, max_prefill_tokens=256, max_seq_len=512, num_pages=64)
    replica = Replica(path, 1, limits=limits, dtype=torch.bfloat16, device="cuda:0", keep_quantized=True)
    ours = Driver(replica).generate(prompts(), NUM_TOKENS, chunk=100)
    replica.close()
    model = AutoModelForCausalLM.from_pretrained(
        dequantized(path, folder / "wide"), dtype=torch.float32, attn_implementation="eager"
    ).to("cuda:0")
    with torch.inference_mode():
        fed = [prompt + one.tokens[:-1] for prompt, one in zip(prompts(), ours, strict=True)]
        theirs = [model(torch.tensor([ids], device="cuda:0")).logits[0].float().cpu() for ids in fed]
    return ours, theirs


def test_teacher_forced_logits_are_those_of_transformers(ours_and_theirs):
    errors = torch.cat(
        [(a.logits - b).abs().amax(-1) / b.abs().amax(-1) for a, b in zip(*ours_and_theirs, strict=True)]
    )
    print(f"median {errors.median():.4f}, 95 % {errors.quantile(0.95):.4f}, worst {errors.max():.4f}")
    assert len(errors) == sum(len(prompt) + NUM_TOKENS - 1 for prompt in prompts())
    assert float(errors.median()) < 0.15


def test_the_best_token_is_theirs_where_it_leads(ours_and_theirs):
    clear, same = 0, 0
    for a, b in zip(*ours_and_theirs, strict=True):
        best = b.topk(2, dim=-1).values
        leads = (best[:, 0] - best[:, 1]) / b.abs().amax(-1) > 0.2
        clear += int(leads.sum())
        same += int((a.logits.argmax(-1) == b.argmax(-1))[leads].sum())
    print(f"{same} of {clear}")
    assert clear >= 20 and same >= 0.95 * clear
