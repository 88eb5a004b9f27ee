"""RMSNorm with residual and quantisation in one kernel, against the three plain operations one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nmoe_backend.kernels.rms_norm import rms_norm_reference

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float32]


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _inputs(num_tokens: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, residual, weight = _random(0, num_tokens, dim) * 3, _random(1, num_tokens, dim) * 3, 1 + 0.3 * _random(2, dim)
    return x.to(dtype).to(DEVICE), residual.to(dtype).to(DEVICE), weight.to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "dim"), [(1, 7168), (300, 7168), (33, 1536), (17, 512), (5, 200), (2, 16384)])
def test_it_equals_add_then_norm_then_quantise(num_tokens, dim, dtype):
    """The sum is exact; the norm differs by the order of a sum: rarely, and then by one rounding; the rest is exact."""
    from nmoe_backend.kernels.rms_norm_gpu import quantize_rows_reference, rms_norm

    x, residual, weight = _inputs(num_tokens, dim, dtype)
    summed = x + residual
    want = rms_norm_reference(summed, weight, 1e-6)
    out = torch.full_like(x, float("nan"))
    values = scales = None
    if dim % 128 == 0:
        values = torch.full(x.shape, 9.0, device=DEVICE).to(torch.float8_e4m3fn)
        scales = torch.full((dim // 128, num_tokens), float("nan"), device=DEVICE).t()
    rms_norm(x, weight, 1e-6, residual=residual, out=out, values=values, scales=scales)
    assert torch.equal(residual, summed)
    ulp = 2**-7 if dtype == torch.bfloat16 else 2**-20
    torch.testing.assert_close(out, want, rtol=ulp, atol=1e-6)
    if dtype == torch.bfloat16:
        assert (out != want).float().mean() < 2e-3
    if values is not None and scales is not None:
        want_values, want_scales = quantize_rows_reference(out)
        assert torch.equal(scales, want_scales)
        assert torch.equal(values.view(torch.uint8), want_values.view(torch.uint8))


def test_without_residual_it_reads_a_slice_and_may_write_in_place():
    from nmoe_backend.kernels.rms_norm_gpu import rms_norm

    fused = _random(3, 9, 2112).to(DTYPES[0]).to(DEVICE)
    weight = (1 + 0.3 * _random(4, 1536)).to(DTYPES[0]).to(DEVICE)
    before, want = fused.clone(), rms_norm_reference(fused[:, :1536], weight, 1e-6)
    rms_norm(fused[:, :1536], weight, 1e-6, out=fused[:, :1536])
    torch.testing.assert_close(fused[:, :1536], want, rtol=2**-7, atol=1e-6)
    assert torch.equal(fused[:, 1536:], before[:, 1536:])


def test_a_row_of_zeros_quantises_to_zeros():
    from nmoe_backend.kernels.rms_norm_gpu import rms_norm

    x, weight = torch.zeros(2, 256, dtype=DTYPES[0], device=DEVICE), torch.ones(256, dtype=DTYPES[0], device=DEVICE)
    values = torch.ones(2, 256, device=DEVICE).to(torch.float8_e4m3fn)
    scales = torch.zeros(2, 2, device=DEVICE)
    rms_norm(x, weight, 1e-6, values=values, scales=scales)
    assert (values.float() == 0).all() and torch.allclose(scales, torch.full_like(scales, 1e-4 / 448))


def test_shapes_that_do_not_fit_are_errors():
    from nmoe_backend.kernels.rms_norm_gpu import rms_norm

    x = torch.zeros(2, 200, device=DEVICE)
    with pytest.raises(ValueError, match="D=200"):
        rms_norm(x, x[0], 1e-6, values=x, scales=x)
    with pytest.raises(ValueError, match="got shapes"):
        rms_norm(x, x[0], 1e-6, out=x[:, :100])
