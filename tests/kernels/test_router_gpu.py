"""The router's kernels against plain torch, at DeepSeek's shape and odd ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nmoe_backend.kernels.router import router_reference

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
COMPUTE = torch.bfloat16


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_tokens", [1, 3, 257])
@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "topk_groups"),
    [(8, 2, 4, 2), (8, 2, 1, 1), (256, 8, 8, 4), (12, 6, 3, 3), (64, 8, 8, 4)],
)
def test_choice_equals_the_reference_where_scores_are_apart(experts, top_k, groups, topk_groups, num_tokens):
    """Scores come from another exp, 1e-7 apart: inputs are on a grid that keeps choices 1e-4 apart or exactly equal."""
    from nmoe_backend.kernels.router_gpu import router

    logits = (_random(1, num_tokens, experts) * 40).round() / 20
    bias = (_random(2, experts) * 8).round() / 8
    ids, weights = router(logits.to(DEVICE), bias.to(DEVICE), top_k, groups, topk_groups, True, 2.5)
    assert ids.dtype == torch.int32
    want_ids, want_weights = router_reference(logits, bias, top_k, groups, topk_groups, True, 2.5)
    differ = (ids.cpu() != want_ids).any(-1)
    choice = (logits.double().sigmoid() + bias.double()).sort(-1).values
    gaps = choice.diff(dim=-1)
    close = ((gaps > 0) & (gaps < 1e-6)).any(-1)  # a tie of the grid that fp32 may see either way
    assert not (differ & ~close).any()
    torch.testing.assert_close(weights.cpu()[~differ], want_weights[~differ], rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_lowest_index():
    from nmoe_backend.kernels.router_gpu import router

    ids, weights = router(torch.zeros(3, 8, device=DEVICE), torch.zeros(8, device=DEVICE), 3, 4, 2, True, 1.0)
    assert ids.tolist() == [[0, 1, 2]] * 3
    torch.testing.assert_close(weights.cpu(), torch.full((3, 3), 1 / 3))


def test_negative_choices_stay_in_the_kept_groups():
    from nmoe_backend.kernels.router_gpu import router

    bias = torch.tensor([-1.0, -9.0, -1.1, -9.0, -5.5, -5.5, -5.5, -5.5], device=DEVICE)
    ids, _ = router(torch.zeros(1, 8, device=DEVICE), bias, 4, 4, 2, True, 1.0)
    assert ids.tolist() == [[0, 2, 1, 3]]


@pytest.mark.parametrize("wide", [False, True], ids=["bf16 weight", "fp32 weight"])
@pytest.mark.parametrize("num_tokens", [1, 65, 256])
def test_logits_are_as_good_as_fp32(num_tokens, wide):
    from nmoe_backend.kernels.router_gpu import SPLITS, router_logits, split_weight

    x, weight = _random(3, num_tokens, 7168).to(COMPUTE), _random(4, 256, 7168) / 85
    weight = weight if wide else weight.to(COMPUTE).float()
    parts = split_weight(weight.to(DEVICE), COMPUTE)
    assert parts.shape[0] == (3 if wide else 1)
    partial = router_logits(x.to(DEVICE), parts)
    assert partial.shape == (SPLITS, num_tokens, 256)
    want = x.double() @ weight.double().T
    error = (partial.double().sum(0).cpu() - want).abs().max()
    assert error < 1.5e-5  # a plain fp32 product's own, for logits of standard deviation 1


def test_logits_of_a_token_do_not_depend_on_the_number_of_tokens():
    from nmoe_backend.kernels.router_gpu import router_logits, split_weight

    x, weight = _random(5, 4100, 7168).to(COMPUTE).to(DEVICE), _random(6, 256, 7168).to(COMPUTE).float().to(DEVICE)
    parts = split_weight(weight, COMPUTE)
    many, few, one = router_logits(x, parts), router_logits(x[:300], parts), router_logits(x[2:3], parts)
    assert many.shape[0] == 1 and few.shape[0] == one.shape[0] > 1
    bias = torch.zeros(256, device=DEVICE)
    ids, weights = ([r[i] for r in (_choose(t, bias) for t in (many, few, one))] for i in (0, 1))
    for result in (ids, weights):
        assert torch.equal(result[0][:300], result[1]) and torch.equal(result[0][2:3], result[2])


def _choose(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from nmoe_backend.kernels.router_gpu import router

    return router(logits, bias, 8, 8, 4, True, 2.5)


def test_shapes_that_do_not_fit_are_errors():
    from nmoe_backend.kernels.router_gpu import router, split_weight

    with pytest.raises(ValueError, match="top_k=5"):
        router(torch.zeros(1, 8, device=DEVICE), torch.zeros(8, device=DEVICE), 5, 4, 2, True, 1.0)
    with pytest.raises(ValueError, match="not the sum of 3"):
        split_weight(torch.full((1, 8), float("nan"), device=DEVICE))
