"""The products before and after absorbed attention against float64."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_block_fp8_gemm_sm90 import DEVICE

pytestmark = pytest.mark.gpu


def _draw(seed: int, *shape: int) -> torch.Tensor:
    drawn = torch.randn(shape, device=DEVICE, generator=torch.Generator(device=DEVICE).manual_seed(seed)).bfloat16()
    torch.cuda.synchronize()  # weights are fetched before the kernels ahead have ended
    return drawn


@pytest.mark.parametrize("num_tokens", [1, 31, 64, 65, 129, 256, 300])
@pytest.mark.parametrize("num_heads", [64, 128])
def test_queries_are_taken_into_the_latent_space(num_tokens, num_heads):
    from nmoe_backend.kernels.mla_absorb_sm90 import absorb_queries, absorb_queries_reference

    q, w = _draw(1, num_tokens, num_heads, 192), _draw(2, num_heads, 256, 512)
    room = torch.full((num_tokens + 1, num_heads, 576), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    absorb_queries(q, w, room[:num_tokens])
    want = absorb_queries_reference(q, w)
    latent = room[:num_tokens, :, :512]
    assert float((latent.double() - want).norm() / want.norm()) < 3e-3
    assert bool(room[:, :, 512:].isnan().all()) and bool(room[num_tokens:].isnan().all())


@pytest.mark.parametrize("num_tokens", [1, 31, 64, 65, 129, 256, 300])
@pytest.mark.parametrize("num_heads", [64, 128])
def test_values_are_expanded_and_quantised(num_tokens, num_heads):
    """bf16 rounds by 2^-9 at most, and e4m3 to half a step: 2^-4 of a value, or 2^-10 of the block's scale."""
    from nmoe_backend.kernels.mla_absorb_sm90 import expand_values, expand_values_reference

    attended, w = _draw(3, num_tokens, num_heads, 512), _draw(4, num_heads, 256, 512)
    attended[0, 0] = 0.0
    values = torch.zeros(num_tokens + 1, num_heads * 128, device=DEVICE, dtype=torch.float8_e4m3fn)
    scales = torch.full((num_heads, num_tokens + 5), float("nan"), device=DEVICE)
    expand_values(attended, w, values[:num_tokens], scales)
    want = expand_values_reference(attended, w)
    want_scales = want.unflatten(1, (num_heads, 128)).abs().amax(-1).clamp(min=1e-4) / 448
    torch.testing.assert_close(scales[:, :num_tokens].double(), want_scales.t(), rtol=2**-8, atol=0.0)
    scale = want_scales.repeat_interleave(128, 1)
    error = (values[:num_tokens].double() * scale - want).abs()
    assert bool((error <= want.abs() * (2**-4 + 2**-7) + scale * (2**-10 + 1e-3)).all())
    assert bool(scales[:, num_tokens:].isnan().all()) and not bool(values[num_tokens:].view(torch.uint8).any())


@pytest.mark.parametrize("num_tokens", [1, 65, 300])
def test_values_that_are_not_quantised_are_what_the_others_came_from(num_tokens):
    from nmoe_backend.kernels.block_fp8 import quantize_rows_reference
    from nmoe_backend.kernels.mla_absorb_sm90 import expand_values, expand_values_reference

    attended, w = _draw(10, num_tokens, 128, 512), _draw(11, 128, 256, 512)
    wide = torch.full((num_tokens + 1, 128 * 128), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    values = torch.zeros(num_tokens, 128 * 128, device=DEVICE, dtype=torch.float8_e4m3fn)
    scales = torch.zeros(128, num_tokens, device=DEVICE)
    expand_values(attended, w, wide[:num_tokens])
    expand_values(attended, w, values, scales)
    want = expand_values_reference(attended, w)
    assert float((wide[:num_tokens].double() - want).norm() / want.norm()) < 3e-3
    assert bool(wide[num_tokens:].isnan().all())
    want_values, want_scales = quantize_rows_reference(wide[:num_tokens])
    assert torch.equal(scales, want_scales)
    steps = (values.view(torch.uint8).int() - want_values.view(torch.uint8).int()).abs()
    assert int(steps.max()) <= 1 and float((steps > 0).double().mean()) < 1e-3  # 1 / s is the hardware's here


def test_a_row_does_not_depend_on_its_neighbours():
    from nmoe_backend.kernels.mla_absorb_sm90 import absorb_queries, expand_values

    q, attended, w = _draw(5, 200, 128, 192), _draw(6, 200, 128, 512), _draw(7, 128, 256, 512)
    results = []
    for rows in (slice(0, 200), slice(150, 151)):
        count = rows.stop - rows.start
        latent = torch.zeros(count, 128, 576, device=DEVICE, dtype=torch.bfloat16)
        values = torch.zeros(count, 128 * 128, device=DEVICE, dtype=torch.float8_e4m3fn)
        scales = torch.zeros(128, count, device=DEVICE)
        absorb_queries(q[rows], w, latent)
        expand_values(attended[rows], w, values, scales)
        results.append((latent, values.view(torch.uint8), scales.t()))
    for batch, alone in zip(*results, strict=True):
        assert torch.equal(batch[150], alone[0])


def test_shapes_that_do_not_fit_are_errors():
    from nmoe_backend.kernels.mla_absorb_sm90 import absorb_queries, expand_values

    q, w = _draw(8, 2, 64, 192), _draw(9, 64, 256, 512)
    latent = torch.zeros(2, 64, 576, device=DEVICE, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="need contiguous"):
        absorb_queries(q, w[:32], latent)
    with pytest.raises(ValueError, match="strided"):
        absorb_queries(q.transpose(0, 1), w[:2], latent)
    with pytest.raises(ValueError, match="need contiguous rows"):
        expand_values(
            latent[..., :512].contiguous(),
            w,
            torch.zeros(2, 64 * 128, device=DEVICE, dtype=torch.float8_e4m3fn),
            torch.zeros(3, 2, device=DEVICE),
        )
