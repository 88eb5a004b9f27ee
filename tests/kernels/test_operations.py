"""The smaller operations, each against something slower written another way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nmoe_backend.kernels.block_fp8 import dequantize_blocks_reference
from nmoe_backend.kernels.experts import experts_reference
from nmoe_backend.kernels.kv_write import kv_write_reference
from nmoe_backend.kernels.linear import linear_reference
from nmoe_backend.kernels.rms_norm import rms_norm_reference
from nmoe_backend.kernels.rope import rope_reference, rope_table_reference, yarn_frequencies_reference
from nmoe_backend.kernels.router import router_reference
from nmoe_backend.layers.ops import ops_for
from nmoe_backend.layers.rope import rope_table
from nmoe_backend.types import ConfigError
from tests.gates.replica import hf_spec


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 7), (5, 64), (3, 2, 48)], ids=str)
def test_rms_norm_equals_the_formula_in_float64(shape, device):
    x, weight = _random(0, *shape) * 3, _random(1, shape[-1])
    wide = x.double()
    want = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    got = rms_norm_reference(x.to(device), weight.to(device), 1e-5)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-6)


def test_rms_norm_multiplies_the_weight_after_the_cast_to_bf16(tiny_model, device):
    """Bit for bit what transformers' module returns, which the other order would not."""
    theirs = type(tiny_model.model.norm)(64, eps=1e-5).to(torch.bfloat16)
    theirs.weight.data.copy_(1 + 0.3 * _random(2, 64))
    x = (_random(3, 100, 64) * 5).bfloat16()
    got = rms_norm_reference(x.to(device), theirs.weight.data.to(device), 1e-5).cpu()
    assert torch.equal(got, theirs(x))
    wrong = (
        x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5) * theirs.weight.float()
    ).bfloat16()
    assert not torch.equal(got, wrong)


def test_linear_is_x_times_weight_transposed(device):
    x, weight = _random(0, 3, 5).to(device), _random(1, 4, 5).to(device)
    torch.testing.assert_close(linear_reference(x, weight), x @ weight.T)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_turns_each_pair_by_position_times_frequency(interleaved, device):
    x, frequencies = _random(4, 6, 2, 8), torch.tensor([1.0, 0.3, 0.02, 0.001])
    positions = torch.tensor([0, 1, 5, 17, 100, 3])
    table = rope_table_reference(frequencies, 101, 1.5)
    got = rope_reference(x.to(device), table[positions].to(device), interleaved).cpu()
    for token in range(6):
        for pair in range(4):
            a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 4)
            angle = float(positions[token]) * float(frequencies[pair])
            c, s = 1.5 * math.cos(angle), 1.5 * math.sin(angle)
            for head in range(2):
                u, v = float(x[token, head, a]), float(x[token, head, b])
                assert float(got[token, head, a]) == pytest.approx(u * c - v * s, abs=1e-5)
                assert float(got[token, head, b]) == pytest.approx(v * c + u * s, abs=1e-5)


def test_yarn_table_equals_the_rotary_embedding_of_transformers(tiny_model):
    spec = hf_spec(tiny_model).layers[0].attn.rope
    assert spec.factor == 8.0 and spec.attention_factor != 1.0
    table = rope_table(spec, 512, torch.device("cpu"))
    cos, sin = tiny_model.model.rotary_emb(torch.zeros(1), torch.arange(512)[None])
    torch.testing.assert_close(table.real, cos[0, :, : spec.dim // 2], rtol=0, atol=1e-6)
    torch.testing.assert_close(table.imag, sin[0, :, : spec.dim // 2], rtol=0, atol=1e-6)


def test_yarn_of_factor_1_is_plain_rope():
    want = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(yarn_frequencies_reference(16, 10000.0, 1.0, 0, 32.0, 1.0), want)


def test_deepseek_v3_frequencies_slow_only_the_long_waves():
    """theta 10,000, dim 64, factor 40 over 4,096: pairs 0-10 keep their frequency, from 23 on they slow by 40."""
    plain = yarn_frequencies_reference(64, 10000.0, 1.0, 4096, 32.0, 1.0)
    scaled = yarn_frequencies_reference(64, 10000.0, 40.0, 4096, 32.0, 1.0)
    ratio = plain / scaled
    assert torch.allclose(ratio[:11], torch.ones(11)) and torch.allclose(ratio[23:], torch.full((9,), 40.0))
    assert (ratio[11:23].diff() > 0).all()


@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_kv_write_touches_exactly_its_rows(page_size, device):
    cache = torch.zeros(4, page_size, 7, device=device)
    idx = torch.tensor([3 * page_size + 5, 0, page_size - 1], device=device)
    latent, k_rope = _random(0, 3, 5).to(device), _random(1, 3, 2).to(device)
    kv_write_reference(cache, idx, latent, k_rope)
    want = torch.cat((latent, k_rope), -1)
    for token, (page, offset) in enumerate([(3, 5), (0, 0), (0, page_size - 1)]):
        assert torch.equal(cache[page, offset], want[token])
    assert (cache != 0).any(-1).sum() == 3


def _route(scores: list[float], bias: list[float], top_k: int, num_groups: int, topk_groups: int) -> list[int]:
    """The choice for one token, in plain Python; stable sorts put the lowest index first."""
    choice = [score + b for score, b in zip(scores, bias, strict=True)]
    size = len(choice) // num_groups
    best_two = [sum(sorted(choice[g * size : (g + 1) * size], reverse=True)[:2]) for g in range(num_groups)]
    kept = sorted(range(num_groups), key=lambda g: -best_two[g])[:topk_groups]
    allowed = [e for e in range(len(choice)) if e // size in kept]
    return sorted(allowed, key=lambda e: -choice[e])[:top_k]


@pytest.mark.parametrize("num_tokens", [1, 33])
@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "topk_groups"), [(8, 2, 4, 2), (8, 2, 1, 1), (256, 8, 8, 4), (12, 6, 3, 3)]
)
def test_router_equals_a_loop(experts, top_k, groups, topk_groups, num_tokens, device):
    logits, bias = _random(5, num_tokens, experts), 0.3 * _random(6, experts)
    ids, weights = router_reference(logits.to(device), bias.to(device), top_k, groups, topk_groups, True, 2.5)
    scores = logits.to(device).sigmoid().cpu()
    for token in range(num_tokens):
        want = _route(scores[token].tolist(), bias.tolist(), top_k, groups, topk_groups)
        assert ids[token].tolist() == want
        chosen = scores[token][want].double()
        torch.testing.assert_close(weights[token].cpu().double(), chosen / chosen.sum() * 2.5, rtol=1e-5, atol=0)


def test_router_equals_transformers(tiny_model, device):
    router = tiny_model.model.layers[1].mlp.gate
    x = _random(7, 200, 64)
    with torch.inference_mode():
        logits, want_weights, want_ids = router(x)
    bias = router.e_score_correction_bias
    ids, weights = router_reference(logits.to(device), bias.to(device), 2, 4, 2, True, 2.5)
    ids, weights = ids.cpu(), weights.cpu()
    order, want_order = ids.argsort(-1), want_ids.argsort(-1)
    assert torch.equal(ids.gather(1, order), want_ids.gather(1, want_order))
    torch.testing.assert_close(weights.gather(1, order), want_weights.gather(1, want_order))


def test_router_ties_go_to_the_lowest_index(device):
    """Equal scores everywhere: groups 0 and 1 of 4, experts 0, 1, 2 of the four in them."""
    ids, _ = router_reference(torch.zeros(3, 8, device=device), torch.zeros(8, device=device), 3, 4, 2, True, 1.0)
    assert ids.tolist() == [[0, 1, 2]] * 3


def test_router_never_leaves_the_kept_groups_even_with_negative_scores(device):
    """A mask of 0 instead of -inf would prefer a dropped group to a kept expert whose score + bias is negative."""
    bias = torch.tensor([-1.0, -9.0, -1.1, -9.0, -5.5, -5.5, -5.5, -5.5], device=device)
    ids, _ = router_reference(torch.zeros(1, 8, device=device), bias, 4, 4, 2, True, 1.0)
    assert sorted(ids[0].tolist()) == [0, 1, 2, 3]


def test_experts_of_the_worked_example():
    """SwiGLU with a gate that saturates: silu(50) = 50, so w2 = m / 50 makes an expert multiply by m."""
    w13 = torch.tensor([[[0.0, 50.0], [1.0, 0.0]]] * 2)  # rows are [value, 1]; gate 50, up = value
    w2 = torch.tensor([[[2 / 50], [0.0]], [[-1 / 50], [0.0]]])
    x = torch.tensor([[1.0, 1.0], [2.0, 1.0]])
    ids = torch.tensor([[0, 1], [1, -1]], dtype=torch.int32)
    out = experts_reference(x, ids, torch.tensor([[0.5, 0.25], [1.0, 0.0]]), w13, w2)
    torch.testing.assert_close(out[:, 0], torch.tensor([0.75, -2.0]))


@pytest.mark.parametrize("num_rows", [0, 1, 29])
def test_experts_equal_one_row_and_expert_at_a_time(num_rows, device):
    w13, w2 = _random(0, 5, 2 * 6, 10) * 0.4, _random(1, 5, 10, 6) * 0.4
    x, weights = _random(2, num_rows, 10), _random(3, num_rows, 3).abs()
    ids = torch.rand(num_rows, 7, generator=torch.Generator().manual_seed(4)).argsort(-1)[:, :3] - 2
    ids = ids.clamp(min=-1).to(torch.int32)
    got = experts_reference(*(t.to(device) for t in (x, ids, weights, w13, w2))).cpu()
    want = torch.zeros(num_rows, 10, dtype=torch.float64)
    for row in range(num_rows):
        for expert, weight in zip(ids[row].tolist(), weights[row].double(), strict=True):
            if expert >= 0:
                gate, up = (w13[expert].double() @ x[row].double()).split(6)
                want[row] += weight * (w2[expert].double() @ (gate * gate.sigmoid() * up))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (200, 130), (3, 129, 257)], ids=str)
def test_fp8_blocks_equal_a_loop_over_elements(shape, device):
    values = (_random(8, *shape) * 50).to(torch.float8_e4m3fn)
    blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    scales = _random(9, *blocks).abs() + 0.1
    got = dequantize_blocks_reference(values.to(device), scales.to(device), (128, 128), torch.float32).cpu()
    rows = torch.arange(shape[-2])[:, None] // 128
    columns = torch.arange(shape[-1])[None, :] // 128
    assert torch.equal(got, values.float() * scales[..., rows, columns])


def test_fp8_scales_that_do_not_cover_the_weight_are_an_error():
    with pytest.raises(ValueError, match=r"got scales of shape \(1, 2\) for values \(200, 130\)"):
        dequantize_blocks_reference(torch.zeros(200, 130), torch.ones(1, 2), (128, 128), torch.float32)


def test_a_device_without_operations_is_an_error():
    with pytest.raises(ConfigError, match="meta"):
        ops_for(torch.device("meta"))
