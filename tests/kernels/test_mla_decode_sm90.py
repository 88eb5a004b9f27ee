"""The Hopper MLA decode kernel against attention in float64, at DeepSeek's shape and odd ones."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu

HEADS, LATENT, DIM = 128, 512, 576
SCALE = 192**-0.5
# bf16 output and probabilities: 2**-9 relative each, measured 2.3e-3 at most.
TOLERANCE = 5e-3


class Case:
    """Rows of given lengths over shuffled pages; every cache value that no row may use is NaN."""

    def __init__(self, lens: Sequence[int], page_size: int, seed: int = 0, spare_pages: int = 3) -> None:
        generator = torch.Generator(device="cuda").manual_seed(seed)
        self.lens = torch.tensor(lens, device="cuda")
        counts = [max(1, -(-length // page_size)) for length in lens]
        num_pages = sum(counts) + spare_pages
        self.cache = torch.full((num_pages, page_size, DIM), float("nan"), device="cuda", dtype=torch.bfloat16)
        self.q = torch.randn(len(lens), HEADS, DIM, generator=generator, device="cuda", dtype=torch.bfloat16)
        order = torch.randperm(num_pages, generator=generator, device="cuda").to(torch.int32)
        self.tables = order[-1].repeat(len(lens), max(counts)).contiguous()
        first = 0
        for row, (length, count) in enumerate(zip(lens, counts, strict=True)):
            pages = order[first : first + count]
            self.tables[row, :count] = pages
            first += count
            keys = torch.randn(count * page_size, DIM, generator=generator, device="cuda", dtype=torch.bfloat16)
            keys[length:] = float("nan")
            self.cache[pages.long()] = keys.view(count, page_size, DIM)

    def expected(self) -> Tensor:
        out = torch.zeros(len(self.lens), HEADS, LATENT, device="cuda", dtype=torch.float64)
        for row, length in enumerate(self.lens.tolist()):
            keys = self.cache[self.tables[row].long()].flatten(0, 1)[:length].double()
            if length:
                out[row] = (self.q[row].double() @ keys.T * SCALE).softmax(-1) @ keys[:, :LATENT]
        return out


def decode(case: Case, split: int | None, rows: slice = slice(None)) -> Tensor:
    from nmoe_backend.kernels.mla_sm90 import decode as kernel, decode_plan as plans

    lens, q, tables = case.lens[rows].contiguous(), case.q[rows].contiguous(), case.tables[rows].contiguous()
    plan = plans.make_mla_decode_plan(
        len(lens), int(case.lens.max()), int(lens.sum()), HEADS, torch.device("cuda"), split=split
    )
    plan.partial.fill_(float("nan"))
    out = torch.full((len(lens), HEADS, LATENT), float("nan"), device="cuda", dtype=torch.bfloat16)
    plans.plan_mla_decode(plan, lens)
    kernel.mla_decode(q, case.cache, tables, plan, out, SCALE)
    return out


def assert_close(out: Tensor, expected: Tensor) -> None:
    for row in range(out.shape[0]):
        error = (out[row].double() - expected[row]).norm()
        assert error <= TOLERANCE * expected[row].norm(), f"row {row}: {error / expected[row].norm()}"


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("split", [512, 2048, None])
def test_ragged_rows_match_float64(page_size: int, split: int) -> None:
    case = Case([2000, 31, 1, 33, 64, 0, 100, 1999, 65, 2048, 4097, 512], page_size)
    assert_close(decode(case, split), case.expected())


def test_one_token_is_its_own_latent() -> None:
    case = Case([1], 64)
    expected = case.cache[case.tables[0, 0].long(), 0, :LATENT].expand(HEADS, -1)
    assert torch.equal(decode(case, 2048)[0], expected)


def test_result_is_bitwise_independent_of_the_rest_of_the_batch() -> None:
    case = Case([700 + 37 * row for row in range(32)], 64)
    together = decode(case, 512)
    for row in (0, 13, 31):
        assert torch.equal(decode(case, 512, slice(row, row + 1))[0], together[row])


@pytest.mark.parametrize("split", [2048, None])
def test_repeated_runs_are_bitwise_equal(split: int | None) -> None:
    case = Case([1900 + row for row in range(200)], 64)
    first = decode(case, split)
    assert_close(first, case.expected())
    for _ in range(10):
        assert torch.equal(decode(case, split), first)


@pytest.mark.parametrize("split", [4096, None])
def test_a_long_context_beside_short_ones(split: int | None) -> None:
    """One row is joined out of 20 to 60 pieces while its neighbours are whole."""
    case = Case([80_000, *(1 + 3 * row for row in range(40))], 64)
    assert_close(decode(case, split), case.expected())


@pytest.mark.parametrize("split", [1024, None])
def test_graph_replay_follows_lengths_in_device_memory(split: int | None) -> None:
    from nmoe_backend.kernels.mla_sm90 import decode as kernel, decode_plan as plans

    case = Case([3000] * 4, 64)
    plan = plans.make_mla_decode_plan(4, 3000, 12000, HEADS, torch.device("cuda"), split)
    out = torch.empty(4, HEADS, LATENT, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        plans.plan_mla_decode(plan, case.lens)
        kernel.mla_decode(case.q, case.cache, case.tables, plan, out, SCALE)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lens in ([500, 1, 2048, 2999], [64, 1025, 3000, 7]):
        case.lens.copy_(torch.tensor(lens))
        graph.replay()
        assert_close(out, case.expected())


def test_pages_beyond_two_gi_elements() -> None:
    case = Case([1500, 90], 64)
    small = case.cache
    num_pages = 2**31 // (64 * DIM) + 200
    case.cache = torch.empty(num_pages, 64, DIM, device="cuda", dtype=torch.bfloat16)
    shift = num_pages - small.shape[0]
    case.cache[shift:] = small
    case.tables += shift
    assert_close(decode(case, 512), case.expected())


def test_shapes_without_a_kernel_are_refused() -> None:
    from nmoe_backend.kernels.mla_sm90 import decode as kernel, decode_plan as plans

    with pytest.raises(ValueError, match="need None or a positive multiple of 64"):
        plans.make_mla_decode_plan(1, 64, 64, HEADS, torch.device("cuda"), split=100)
    case = Case([64], 64)
    plan = plans.make_mla_decode_plan(1, 64, 64, HEADS, torch.device("cuda"), split=None)
    out = torch.empty(1, HEADS, LATENT, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="pages of 16, 32 or 64"):
        kernel.mla_decode(case.q, case.cache.view(-1, 8, DIM), case.tables, plan, out, SCALE)
