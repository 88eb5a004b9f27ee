"""The Hopper MLA prefill kernel against attention in float64, at DeepSeek's shape and odd ones."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu

DIM, LATENT, SCALE = 576, 512, 192**-0.5
# bf16 keys, values, probabilities and output: 2**-9 relative each, measured 2.6e-3 at most.
TOLERANCE = 5e-3
# (start, length) of each row: one token, whole and broken blocks, prefixes, a row of no tokens.
ROWS = [(0, 300), (0, 1), (128, 128), (700, 200), (0, 0), (127, 2), (1000, 57), (5, 3), (64, 0), (0, 256)]


class Case:
    """Rows of (start, length) after `first` other tokens; every cache value that no row may use is NaN."""

    def __init__(
        self, rows: Sequence[tuple[int, int]], page_size: int = 64, num_heads: int = 128, first: int = 3, seed: int = 0
    ) -> None:
        generator = torch.Generator(device="cuda").manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

        self.rows = list(rows)
        lens = torch.tensor([first, *(length for _, length in rows)], device="cuda")
        self.cu_seqlens = lens.cumsum(0).to(torch.int32)
        self.starts = torch.tensor([start for start, _ in rows], device="cuda", dtype=torch.int32)
        self.num_tokens = int(lens.sum()) + 5
        self.q = random(self.num_tokens, num_heads, 192)
        self.w_kv_b = random(num_heads, 256, LATENT) * LATENT**-0.5
        counts = [-(-(start + length) // page_size) for start, length in rows]
        order = torch.randperm(sum(counts) + 3, generator=generator, device="cuda").to(torch.int32)
        self.cache = torch.full((len(order), page_size, DIM), float("nan"), device="cuda", dtype=torch.bfloat16)
        self.tables = order[-1].repeat(len(rows), max(*counts, 1)).contiguous()
        used = 0
        for row, (count, (start, length)) in enumerate(zip(counts, rows, strict=True)):
            pages = order[used : used + count]
            used += count
            self.tables[row, :count] = pages
            keys = random(count * page_size, DIM)
            keys[start + length :] = float("nan")
            self.cache[pages.long()] = keys.view(count, page_size, DIM)

    @property
    def num_rows(self) -> Tensor:
        return torch.tensor([len(self.rows)], dtype=torch.int32, device="cuda")

    def tokens(self, row: int) -> slice:
        return slice(int(self.cu_seqlens[row]), int(self.cu_seqlens[row + 1]))

    def expected(self, row: int) -> Tensor:
        start, length = self.rows[row]
        end = start + length
        keys = self.cache[self.tables[row].long()].flatten(0, 1)[:end].double()
        q = self.q[self.tokens(row)].double()
        future = torch.arange(end, device="cuda") > torch.arange(start, end, device="cuda")[:, None]
        out = torch.empty(length, q.shape[1], 128, device="cuda", dtype=torch.float64)
        for head in range(q.shape[1]):
            expanded = (keys[:, :LATENT] @ self.w_kv_b[head].double().T).bfloat16().double()
            scores = q[:, head, :128] @ expanded[:, :128].T + q[:, head, 128:] @ keys[:, LATENT:].T
            scores = (scores * SCALE).masked_fill(future, float("-inf"))
            out[:, head] = scores.softmax(-1) @ expanded[:, 128:]
        return out


def run(case: Case, piece_keys: int, spare_pieces: int, out: Tensor, out_scales: Tensor | None = None) -> None:
    from nmoe_backend.kernels.mla_sm90 import prefill as kernel, prefill_plan as plans

    pieces = max(1, -(-plans.num_key_rows(case.rows) // piece_keys)) + spare_pieces
    plan = plans.make_mla_prefill_plan(
        len(case.rows), case.num_tokens, pieces, case.q.shape[1], torch.device("cuda"), piece_keys
    )
    for buffer in (plan.keys, plan.expanded, plan.sums, plan.maxima):
        buffer.fill_(float("nan"))
    plans.plan_mla_prefill(plan, case.cu_seqlens, case.starts, case.num_rows)
    kernel.mla_prefill(case.q, case.cache, case.tables, case.w_kv_b, plan, out, SCALE, out_scales)


def prefill(case: Case, piece_keys: int = 4096, spare_pieces: int = 0) -> Tensor:
    out = torch.full((case.num_tokens, case.q.shape[1], 128), float("nan"), device="cuda", dtype=torch.bfloat16)
    run(case, piece_keys, spare_pieces, out)
    return out


def assert_right(case: Case, out: Tensor) -> None:
    """Every row within the tolerance, for each token; other tokens untouched."""
    for row, (_, length) in enumerate(case.rows):
        if length:
            expected = case.expected(row)
            error = (out[case.tokens(row)].double() - expected).flatten(1).norm(dim=1)
            worst = float((error / expected.flatten(1).norm(dim=1)).max())
            assert worst <= TOLERANCE, f"row {row}: {worst}"
    first, last = int(case.cu_seqlens[0]), int(case.cu_seqlens[-1])
    assert out[:first].isnan().all() and out[last:].isnan().all()


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("piece_keys", [4096, 512])
def test_ragged_rows_match_float64(page_size: int, piece_keys: int) -> None:
    case = Case(ROWS, page_size)
    assert_right(case, prefill(case, piece_keys))


@pytest.mark.parametrize("piece_keys", [4096, 512])
def test_quantised_rows_are_those_of_the_bf16_ones_bit_for_bit(piece_keys: int) -> None:
    from nmoe_backend.kernels.block_fp8 import quantize_rows_reference

    case = Case(ROWS, num_heads=20)
    case.w_kv_b[3, 128:] *= 1e-6  # a head below the smallest scale
    wide = prefill(case, piece_keys)
    values = torch.full(wide.shape, 3.0, device="cuda").to(torch.float8_e4m3fn)
    scales = torch.full((20, case.num_tokens + 11), -1.0, device="cuda")
    run(case, piece_keys, 0, values, scales)
    used = torch.zeros(case.num_tokens, dtype=torch.bool, device="cuda")
    used[int(case.cu_seqlens[0]) : int(case.cu_seqlens[-1])] = True
    want_values, want_scales = quantize_rows_reference(wide.flatten(1))
    found = values.flatten(1).view(torch.uint8)
    assert torch.equal(found[used], want_values.view(torch.uint8)[used])
    assert torch.equal(scales[:, : case.num_tokens][:, used], want_scales[:, used])
    assert bool((values[~used].float() == 3.0).all())
    assert bool((scales[:, case.num_tokens :] == -1.0).all() and (scales[:, : case.num_tokens][:, ~used] == -1.0).all())


@pytest.mark.parametrize("num_heads", [4, 20])
def test_other_numbers_of_heads_match_float64(num_heads: int) -> None:
    case = Case(ROWS, num_heads=num_heads)
    assert_right(case, prefill(case, 512))


def test_a_long_prefix_in_many_pieces_matches_float64() -> None:
    case = Case([(9000, 300), (0, 40)], num_heads=16)
    assert_right(case, prefill(case, 1024))


def test_one_token_attends_to_itself() -> None:
    case = Case([(0, 1)])
    latent = case.cache[case.tables[0, 0].long(), 0, :LATENT]
    assert torch.equal(prefill(case)[3], (latent @ case.w_kv_b[:, 128:].transpose(1, 2)).view(-1, 128))


def test_rows_without_tokens_write_nothing() -> None:
    case = Case([(0, 0), (70, 0)])
    assert prefill(case).isnan().all()


def test_result_is_bitwise_independent_of_the_rest_of_the_batch() -> None:
    case = Case(ROWS)
    together = prefill(case)
    for row in (0, 3, 6):
        alone = Case(ROWS)
        alone.starts, alone.cu_seqlens = case.starts[row : row + 1], case.cu_seqlens[row : row + 2]
        alone.rows, alone.tables = [ROWS[row]], case.tables[row : row + 1].contiguous()
        assert torch.equal(prefill(alone)[case.tokens(row)], together[case.tokens(row)])


def test_result_is_bitwise_independent_of_the_pieces() -> None:
    case = Case(ROWS)
    expected = prefill(case, 4096).nan_to_num()
    for piece_keys, spare_pieces in ((4096, 3), (512, 0), (512, 40), (128, 1)):
        assert torch.equal(prefill(case, piece_keys, spare_pieces).nan_to_num(), expected)


@pytest.mark.parametrize("cut", [128, 333, 900])
def test_result_is_bitwise_independent_of_the_chunks(cut: int) -> None:
    whole = Case([(0, 1000)])
    expected = prefill(whole)[3:1003]
    for start, end in ((0, cut), (cut, 1000)):
        whole.rows = [(start, end - start)]
        whole.starts.fill_(start)
        whole.cu_seqlens.copy_(torch.tensor([3 + start, 3 + end]))
        assert torch.equal(prefill(whole)[3 + start : 3 + end], expected[start:end])


def test_repeated_runs_are_bitwise_equal() -> None:
    case = Case([(0, 2000), (0, 1500), (300, 777)], first=0)
    first = prefill(case)
    assert_right(case, first)
    for _ in range(10):
        again = prefill(case)
        assert torch.equal(again[:4277], first[:4277])


def test_graph_replay_follows_rows_in_device_memory() -> None:
    from nmoe_backend.kernels.mla_sm90 import prefill as kernel, prefill_plan as plans

    case = Case([(500, 300), (0, 400), (200, 0)], num_heads=32)
    num_rows = case.num_rows
    plan = plans.make_mla_prefill_plan(3, case.num_tokens, 4, 32, torch.device("cuda"), 1024).part(3, 512)
    out = torch.empty(case.num_tokens, 32, 128, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        plans.plan_mla_prefill(plan, case.cu_seqlens, case.starts, num_rows)
        kernel.mla_prefill(case.q, case.cache, case.tables, case.w_kv_b, plan, out, SCALE)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for rows in ([(500, 300), (0, 400), (0, 0)], [(0, 77), (399, 1), (0, 0)], [(799, 1), (0, 0), (0, 0)]):
        case.rows = rows
        num_rows.fill_(len([length for _, length in rows if length]))  # what stands behind is not looked at
        case.starts.copy_(torch.tensor([start for start, _ in rows]))
        case.cu_seqlens.copy_(torch.tensor([3, *(length for _, length in rows)]).cumsum(0))
        out.fill_(float("nan"))
        graph.replay()
        assert_right(case, out)


def test_pages_beyond_two_gi_elements() -> None:
    case = Case([(900, 150), (0, 90)], num_heads=16)
    small = case.cache
    num_pages = 2**31 // (64 * DIM) + 200
    case.cache = torch.empty(num_pages, 64, DIM, device="cuda", dtype=torch.bfloat16)
    shift = num_pages - small.shape[0]
    case.cache[shift:] = small
    case.tables += shift
    assert_right(case, prefill(case, 1024))


def test_plan_of_the_documented_example() -> None:
    from nmoe_backend.kernels.mla_sm90 import prefill_plan as plans

    assert plans.num_key_rows([(100, 200), (7, 0)]) == 384
    plan = plans.make_mla_prefill_plan(1, 200, 2, 4, torch.device("cuda"), 256)
    cu_seqlens = torch.tensor([0, 200], dtype=torch.int32, device="cuda")
    starts = torch.tensor([100], dtype=torch.int32, device="cuda")
    plans.plan_mla_prefill(plan, cu_seqlens, starts, torch.ones_like(starts))
    assert plan.num_items.tolist() == [3, 1]
    assert plan.items[0, :3, :7].tolist() == [
        [28, 0, 128, 0, 2, 1, 1],
        [156, 0, 44, 0, 2, 1, 0],
        [-100, 100, 128, 0, 1, 1, 1],
    ]
    assert plan.items[1, 0, :7].tolist() == [156, 0, 44, 0, 1, 0, 1]
    assert plan.num_blocks.tolist() == [3]
    assert plan.blocks[:, :3].tolist() == [[0, 0, 128], [0, 128, 128], [0, 256, 44], [-1, 0, 0]]


def test_shapes_without_a_kernel_are_refused() -> None:
    from nmoe_backend.kernels.mla_sm90 import prefill as kernel, prefill_plan as plans

    with pytest.raises(ValueError, match="positive multiple of 128"):
        plans.make_mla_prefill_plan(1, 64, 1, 128, torch.device("cuda"), 100)
    plan = plans.make_mla_prefill_plan(1, 4, 1, 128, torch.device("cuda"), 128)
    with pytest.raises(ValueError, match="need at most 1 of 128"):
        plan.part(2, 128)
    case = Case([(0, 4)])
    out = torch.empty(case.num_tokens, 128, 128, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="strided"):
        kernel.mla_prefill(case.q, case.cache[::2], case.tables, case.w_kv_b, plan, out, SCALE)
    with pytest.raises(ValueError, match="e4m3 with scales or bfloat16 without"):
        kernel.mla_prefill(case.q, case.cache, case.tables, case.w_kv_b, plan, out, SCALE, torch.empty(128, 12))
    with pytest.raises(ValueError, match="a plan of as many heads"):
        kernel.mla_prefill(case.q[:, :64], case.cache, case.tables, case.w_kv_b[:64], plan, out[:, :64], SCALE)
