"""The fp8 GEMM and the quantiser in front of it against float64 products of the same quantised operands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
NUM_SMS = 132
# bf16 rounds by 1.7e-3 in the mean; the tensor core's 14-bit sums add nothing that can be seen beside it.
TOLERANCE = 3e-3

Operands = tuple[Tensor, Tensor, Tensor, Tensor]


def _operands(num_tokens: int, n: int, k: int, seed: int = 0) -> Operands:
    """x, x_scales with NaN past the tokens, w, w_scales; rows and blocks differ a lot in size."""
    from nmoe_backend.kernels.block_fp8 import quantize_rows_reference

    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    x = torch.randn(num_tokens, k, device=DEVICE, generator=generator)
    x *= torch.rand(num_tokens, 1, device=DEVICE, generator=generator) * 4
    scales = torch.full((-(-k // 128), -(-num_tokens // 4) * 4 + 4), float("nan"), device=DEVICE)
    values, scales[:, :num_tokens] = quantize_rows_reference(x.bfloat16())
    w = (torch.randn(n, k, device=DEVICE, generator=generator) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    w_scales = torch.rand(-(-n // 128), -(-k // 128), device=DEVICE, generator=generator) * 0.02 + 0.001
    return values, scales, w, w_scales


def _expected(x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor) -> Tensor:
    (num_tokens, k), n = x.shape, w.shape[0]
    wide_x = x.double() * x_scales[:, :num_tokens].t().double().repeat_interleave(128, 1)[:, :k]
    by_row = w_scales.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return wide_x @ (w.double() * by_row).t()


def _gemm(operands: Operands, num_sms: int = NUM_SMS) -> Tensor:
    """Writes into the middle of a buffer of NaN and checks that only its rows were touched."""
    from nmoe_backend.kernels.block_fp8_gemm_sm90 import block_fp8_gemm

    x, _, w, _ = operands
    buffer = torch.full((x.shape[0] + 2, w.shape[0]), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    out = buffer[1:-1]
    for _ in range(2):
        block_fp8_gemm(*operands, out, num_sms)
    assert bool(buffer[0].isnan().all()) and bool(buffer[-1].isnan().all())
    return out


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("num_tokens", [1, 17, 32, 64, 65, 128, 200, 256, 300, 1024])
@pytest.mark.parametrize(("n", "k"), [(2112, 7168), (24576, 1536), (4096, 7168), (7168, 2048)], ids=str)
def test_it_gives_the_product_of_the_dequantised_operands(num_tokens, n, k):
    operands = _operands(num_tokens, n, k)
    assert _error(_gemm(operands), _expected(*operands)) < TOLERANCE


@pytest.mark.parametrize(
    "shape", [(5, 200, 512), (37, 456, 7152), (300, 8, 16), (70, 9000, 1152), (1, 36864, 7168)], ids=str
)
def test_odd_shapes(shape):
    """Ragged tiles and blocks on every axis; one k block; tiles beyond the last full wave."""
    operands = _operands(*shape)
    assert _error(_gemm(operands), _expected(*operands)) < TOLERANCE


@pytest.mark.parametrize("num_sms", [1, 7, 132])
def test_any_number_of_programs_gives_the_product(num_sms):
    operands = _operands(40, 1024, 2048)
    assert _error(_gemm(operands, num_sms), _expected(*operands)) < TOLERANCE


def test_a_large_product():
    """More than 2**31 output bytes; the last rows are right too."""
    operands = _operands(33_000, 36_864, 256)
    out = _gemm(operands)
    x, scales, w, w_scales = operands
    tail = (x[-300:], scales[:, 33_000 - 300 : 33_000].contiguous(), w, w_scales)
    assert _error(out[-300:], _expected(*tail)) < TOLERANCE


def test_repeats_and_graph_replays_are_equal_bit_for_bit():
    from nmoe_backend.kernels.block_fp8_gemm_sm90 import block_fp8_gemm

    operands = _operands(32, 2112, 7168)
    out = torch.empty(32, 2112, device=DEVICE, dtype=torch.bfloat16)
    block_fp8_gemm(*operands, out, NUM_SMS)
    first = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block_fp8_gemm(*operands, out, NUM_SMS)
    for _ in range(200):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, first)


def test_a_row_does_not_depend_on_the_other_rows():
    x, scales, w, w_scales = _operands(48, 4096, 7168)
    others = _operands(48, 4096, 7168, seed=1)
    others[0].view(torch.uint8)[11] = x.view(torch.uint8)[11]
    others[1][:, 11] = scales[:, 11]
    assert torch.equal(_gemm((x, scales, w, w_scales))[11], _gemm((others[0], others[1], w, w_scales))[11])


@pytest.mark.parametrize(("n", "k"), [(2112, 7168), (36864, 7168), (7168, 16384)], ids=str)
def test_a_row_does_not_depend_on_the_number_of_rows(n, k):
    """Every tile shape, both orders of the operands."""
    from nmoe_backend.kernels.block_fp8_gemm_sm90 import block_fp8_gemm, gemm_plan

    x, scales, w, w_scales = _operands(1030, n, k)
    results, shapes = {}, set()
    for num_tokens in (1030, 1, 16, 31, 64, 65, 100, 128, 200, 256, 400, 512, 768):
        plan = gemm_plan(num_tokens, n, NUM_SMS)
        shapes.add((plan.block_p, plan.block_q, plan.swap))
        out = torch.empty(num_tokens, n, device=DEVICE, dtype=torch.bfloat16)
        some = torch.empty(scales.shape[0], -(-num_tokens // 16) * 16, device=DEVICE)[:, :num_tokens]
        some.copy_(scales[:, 1030 - num_tokens : 1030])
        block_fp8_gemm(x[-num_tokens:], some, w, w_scales, out, NUM_SMS)
        results[num_tokens] = out
    assert len(shapes) >= 5
    assert [t for t, out in results.items() if not torch.equal(out, results[1030][-t:])] == []


def test_operands_that_do_not_fit_are_an_error():
    x, scales, w, w_scales = _operands(8, 256, 512)
    with pytest.raises(ValueError, match="got x .* need"):
        _gemm((x, scales, w[:, :256], w_scales))
    with pytest.raises(ValueError, match="one block of K a row"):
        _gemm((x, scales[:2], w, w_scales))
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        _gemm((x, torch.zeros(scales.shape[0], 9, device=DEVICE), w, w_scales))
