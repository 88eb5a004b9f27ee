"""Index building, gathering and the grouped fp8 GEMMs against float64 products of the same quantised operands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
NUM_SMS = 132
FP8 = torch.float8_e4m3fn
NAN = 0x7F  # e4m3's
TOLERANCE = 3e-3  # bf16 rounds by 1.7e-3 in the mean


class Layer:
    """Random experts, what a rank has received, and the buffers of one pass; all that nobody wrote is NaN."""

    def __init__(
        self, ids: Tensor, num_experts: int, d: int, i: int, step_tokens: int = 0, window_rows: int = 0
    ) -> None:
        from nmoe_backend.kernels.expert_rows_gpu import expert_rows, num_expert_rows

        g = torch.Generator(device=DEVICE).manual_seed(1)
        self.ids, self.num_experts, self.d, self.i = ids, num_experts, d, i
        self.step_tokens = step_tokens or ids.shape[1]
        self.rows = expert_rows(ids, num_experts, window_rows)
        r = num_expert_rows(self.rows.window_rows, num_experts)
        self.payload = _fp8(g, *ids.shape[:2], d)
        self.scales = torch.rand(*ids.shape[:2], d // 128, device=DEVICE, generator=g) * 0.01 + 0.001
        absent = (ids < 0).all(-1)
        absent[:, self.step_tokens :] = True
        self.payload.view(torch.uint8)[absent] = NAN
        self.scales[absent] = float("nan")
        self.w13, self.w2 = _fp8(g, num_experts, 2, i, d), _fp8(g, num_experts, d, i)
        self.w13_scales = torch.rand(num_experts, 2, i // 128, d // 128, device=DEVICE, generator=g) * 1e-3 + 1e-4
        self.w2_scales = torch.rand(num_experts, d // 128, i // 128, device=DEVICE, generator=g) * 1e-3 + 1e-4
        self.x = torch.full((r, d), NAN, dtype=torch.uint8, device=DEVICE).view(FP8)
        self.x_scales = torch.full((d // 128, r), float("nan"), device=DEVICE)
        self.h = torch.full((r, i), NAN, dtype=torch.uint8, device=DEVICE).view(FP8)
        self.h_scales = torch.full((i // 128, r), float("nan"), device=DEVICE)
        self.y = torch.full((r, d), float("nan"), dtype=torch.bfloat16, device=DEVICE)

    def index(self) -> None:
        from nmoe_backend.kernels.expert_rows_gpu import expert_row_index

        expert_row_index(self.rows, self.ids, self.num_experts, self.step_tokens)

    def run(self, window: int = 0) -> None:
        from nmoe_backend.kernels.expert_gemm_sm90 import expert_down, expert_up
        from nmoe_backend.kernels.expert_rows_gpu import gather_expert_rows

        rows = self.rows
        gather_expert_rows(rows, window, self.payload, self.scales, self.x, self.x_scales, self.step_tokens)
        tiles, num_tiles = rows.tiles[window], rows.num_tiles[window : window + 1]
        expert_up(self.x, self.x_scales, self.w13, self.w13_scales, tiles, num_tiles, self.h, self.h_scales, NUM_SMS)
        expert_down(self.h, self.h_scales, self.w2, self.w2_scales, tiles, num_tiles, self.y, NUM_SMS)

    def check(self, window: int = 0) -> None:
        """Every expert's rows of h and y, and that nothing else was written."""
        row_idx, ids = self.rows.row_idx[:, : self.step_tokens].clone(), self.ids[:, : self.step_tokens]
        slots = self.rows.slots_of(window)
        if slots is not None:
            order = torch.arange(row_idx[..., 0].numel(), device=DEVICE).view(row_idx.shape[:2])
            row_idx[(order < slots[0]) | (order >= slots[1])] = -1
        written = torch.zeros(self.y.shape[0], dtype=torch.bool, device=DEVICE)
        for expert in range(self.num_experts):
            chosen = (ids == expert) & (row_idx >= 0)
            r = row_idx[chosen].long()
            assert not written[r].any() and r.unique().numel() == r.numel()
            written[r] = True
            src, token, _ = chosen.nonzero(as_tuple=True)
            if r.numel():
                self.check_rows(expert, r, self.payload[src, token], self.scales[src, token])
        assert bool(self.y[~written].isnan().all()) and bool(self.h_scales[:, ~written].isnan().all())
        assert bool((self.h.view(torch.uint8)[~written] == NAN).all())

    def check_rows(self, expert: int, r: Tensor, x: Tensor, scales: Tensor) -> None:
        """Rows r of h and y, of one expert: x [r, D], scales [r, D / 128]."""
        from nmoe_backend.kernels.expert_gemm_sm90 import expert_down_reference, expert_up_reference

        want = expert_up_reference(x, scales.t(), self.w13[expert], self.w13_scales[expert])
        h, h_scales = self.h[r], self.h_scales[:, r]
        want_scales = want.abs().unflatten(1, (-1, 128)).amax(-1).clamp(min=1e-4).t() / 448
        assert float(((h_scales - want_scales) / want_scales).abs().max()) < 2e-3
        exact = (want / h_scales.t().double().repeat_interleave(128, 1)).float().to(FP8)
        steps = (exact.view(torch.uint8).int() - h.view(torch.uint8).int()).abs()
        assert float((steps > 0).double().mean()) < 0.05  # next to the middle of two values
        assert _error(h.double() * h_scales.t().double().repeat_interleave(128, 1), want) < 0.04
        want = expert_down_reference(h, h_scales, self.w2[expert], self.w2_scales[expert])
        assert _error(self.y[r], want) < TOLERANCE


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def _fp8(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, generator=g, dtype=torch.bfloat16).mul_(60).clamp_(-448, 448).to(FP8)


def _choices(counts: list[int], world_size: int = 2, top_k: int = 4, seed: int = 0) -> Tensor:
    """Local ids [W, T, K] in which expert e is chosen counts[e] times, at most once a slot; some slots are absent."""
    g = torch.Generator().manual_seed(seed)
    slots = max(max(counts), -(-sum(counts) // top_k)) * 2
    tokens = -(-slots // world_size) + 3
    ids = torch.full((world_size * tokens, top_k), -1, dtype=torch.int32)
    room = torch.full((world_size * tokens,), top_k)
    for expert in sorted(range(len(counts)), key=lambda e: -counts[e]):
        order = torch.where(room > 0, torch.rand(room.shape, generator=g), -1.0).argsort(descending=True)
        for slot in order[: counts[expert]]:
            room[slot] -= 1
            ids[slot, room[slot]] = expert
    return ids.view(world_size, tokens, top_k).to(DEVICE)


def _counts(ids: Tensor, num_experts: int) -> Tensor:
    """How many choices fell on each expert."""
    return torch.stack([(ids == expert).sum() for expert in range(num_experts)])


@pytest.mark.parametrize(
    "counts",
    [
        [0, 0, 0, 0],
        [0, 0, 1, 0],
        [1, 1, 1, 1],
        [64, 65, 63, 0],
        [16, 17, 80, 81],
        [700, 15, 66, 9],
        [127, 128, 129, 1],
        [0, 700, 3, 0],
        [300, 0, 257, 64],
        [40, 90, 61, 72],
    ],
    ids=str,
)
@pytest.mark.parametrize(("d", "i"), [(7168, 2048), (256, 128), (2048, 768)], ids=str)
def test_experts_equal_the_float64_product_of_the_same_operands(counts, d, i):
    layer = Layer(_choices(counts), 4, d, i)
    layer.index()
    for _ in range(2):
        layer.run()
        layer.check()


def test_thirty_two_experts_of_deepseek():
    """Poisson spread round 64 rows, one expert empty."""
    counts = torch.poisson(torch.full((32,), 64.0), generator=torch.Generator().manual_seed(5)).int().tolist()
    counts[7] = 0
    layer = Layer(_choices(counts, world_size=8, top_k=8), 32, 7168, 2048)
    layer.index()
    layer.run()
    layer.check()


def test_an_index_equals_its_reference():
    from nmoe_backend.kernels.expert_rows_gpu import expert_row_index, expert_row_index_reference, expert_rows

    g = torch.Generator().manual_seed(2)
    shapes = ((8, 256, 8, 32, 256), (8, 4096, 8, 32, 4000), (1, 1, 1, 1, 1), (3, 77, 6, 40, 50))
    for world_size, tokens, top_k, num_experts, step in shapes:
        ids = torch.rand(world_size, tokens, num_experts, generator=g).argsort(-1)[..., :top_k].to(torch.int32)
        ids[torch.rand(ids.shape, generator=g) < 0.7] = -1
        ids = ids.to(DEVICE)
        rows = expert_rows(ids, num_experts, 0)
        for times in (1, 2):
            expert_row_index(rows, ids, num_experts, step)
            assert torch.equal(rows.totals, times * _counts(ids[:, :step], num_experts))
        want, spans = expert_row_index_reference(ids, num_experts, step)
        assert torch.equal(rows.row_idx[:, :step], want[:, :step])
        tiles = []
        for expert, (begin, end) in enumerate(spans):
            tiles += [[expert, len(tiles), begin, end]] * -(-(end - begin) // 128)
        first = {expert: at for at, (expert, *_) in reversed(list(enumerate(tiles)))}
        tiles = [[expert, first[expert], begin, end] for expert, _, begin, end in tiles]
        assert rows.num_tiles.tolist() == [len(tiles)]
        assert rows.tiles[0, : len(tiles)].tolist() == tiles


def test_windows_cover_every_choice_once():
    """All choices of all slots on one rank, in buffers for a quarter of them."""
    ids = torch.arange(4, dtype=torch.int32, device=DEVICE).expand(4, 512, 4).contiguous()
    layer = Layer(ids, 4, 256, 128, window_rows=2048)
    layer.index()
    assert layer.rows.num_windows == 4
    slots = layer.rows.window_slots.flatten().tolist()
    assert slots[0] == 0 and slots[-1] == 4 * 512 and slots[1:-1:2] == slots[2:-1:2]
    assert bool((layer.rows.row_idx >= 0).all())
    assert torch.equal(layer.rows.totals, _counts(ids, 4))
    for window in range(4):
        layer.y.fill_(float("nan"))
        layer.h_scales.fill_(float("nan"))
        layer.h.view(torch.uint8).fill_(NAN)
        layer.run(window)
        layer.check(window)


def test_windows_that_nothing_fills_do_nothing():
    """A hundred choices in the middle of the slots, in buffers for many times as many."""
    ids = torch.full((4, 512, 4), -1, dtype=torch.int32, device=DEVICE)
    ids[2, 100:125] = torch.arange(4, dtype=torch.int32, device=DEVICE)
    layer = Layer(ids, 4, 256, 128, window_rows=1024)
    layer.index()
    assert layer.rows.num_tiles.tolist() == [4, *[0] * 7]
    assert all(first == end for first, end in layer.rows.window_slots[1:].tolist())
    for window in range(layer.rows.num_windows):
        layer.run(window)
    layer.check()


def test_slots_past_the_step_are_not_looked_at():
    layer = Layer(_choices([50, 60, 70, 80]), 4, 256, 128, step_tokens=40)
    layer.index()
    layer.run()
    layer.check()


def test_a_graph_replays_with_new_choices_and_repeats_bit_for_bit():
    layer = Layer(_choices([100, 3, 0, 64]), 4, 2048, 768)
    other = torch.full_like(layer.ids, -1)
    other[:, :-1] = layer.ids[:, 1:].flip(0)
    layer.index()
    layer.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.index()
        layer.run()
    first = layer.ids.clone()
    layer.payload.copy_(_fp8(torch.Generator(device=DEVICE).manual_seed(9), *layer.payload.shape))
    layer.scales.fill_(0.004)
    results = []
    for ids in [first, other] * 20:
        layer.ids.copy_(ids)
        layer.y.fill_(float("nan"))
        layer.h_scales.fill_(float("nan"))
        layer.h.view(torch.uint8).fill_(NAN)
        graph.replay()
        if len(results) < 2:
            layer.check()
            results.append(layer.y.clone())
        assert torch.equal(layer.y.view(torch.int16), results[0 if ids is first else 1].view(torch.int16))


def test_a_row_does_not_depend_on_the_others_nor_on_its_place():
    few, many = Layer(_choices([1, 0, 0, 0]), 4, 7168, 2048), Layer(_choices([150, 20, 90, 0], seed=4), 4, 7168, 2048)
    many.w13, many.w13_scales, many.w2, many.w2_scales = few.w13, few.w13_scales, few.w2, few.w2_scales
    for layer in (few, many):
        layer.index()
    slot = (few.ids == 0).nonzero()[0]
    for src, token, k in (many.ids == 0).nonzero().tolist()[::37]:
        many.payload.view(torch.uint8)[src, token] = few.payload.view(torch.uint8)[slot[0], slot[1]]
        many.scales[src, token] = few.scales[slot[0], slot[1]]
        for layer in (few, many):
            layer.run()
        got = many.y[many.rows.row_idx[src, token, k]]
        assert torch.equal(got, few.y[few.rows.row_idx[tuple(slot)]])


def test_a_row_has_the_same_bits_in_a_tile_of_any_size():
    """One row and one expert's weights everywhere: tiles of all kinds follow each other in a program."""
    counts = [1, 16, 17, 64, 65, 80, 81, 128, 129, 700, 2, 300, 40, 256]
    layer = Layer(_choices(counts), len(counts), 7168, 2048)
    for weights in (layer.w13, layer.w2):
        weights.view(torch.uint8)[1:] = weights.view(torch.uint8)[:1]
    for scales in (layer.w13_scales, layer.w2_scales):
        scales[1:] = scales[:1]
    src, token, k = (layer.ids == 0).nonzero()[0].tolist()
    layer.payload.view(torch.uint8)[:] = layer.payload.view(torch.uint8)[src, token].clone()
    layer.scales[:] = layer.scales[src, token].clone()
    layer.index()
    layer.run()
    r = layer.rows.row_idx[layer.rows.row_idx >= 0].long()
    assert r.numel() == sum(counts)
    one = layer.rows.row_idx[src, token, k].long().view(1)
    layer.check_rows(0, one, layer.payload[src, token].view(1, -1), layer.scales[src, token].view(1, -1))
    for rows in (layer.h.view(torch.uint8), layer.h_scales.t(), layer.y.view(torch.int16)):
        assert bool((rows[r] == rows[one]).all())


def test_rows_beyond_two_to_the_31_bytes():
    """One expert takes 160,000 rows of 7,168 bf16."""
    layer = Layer(torch.zeros(8, 20_000, 1, dtype=torch.int32, device=DEVICE), 2, 7168, 128)
    layer.index()
    layer.run()
    r = layer.rows.row_idx[7, -200:, 0].long()
    assert r.tolist() == list(range(159_800, 160_000))
    layer.check_rows(0, r, layer.payload[7, -200:], layer.scales[7, -200:])


def test_a_whole_layer_replays_behind_dispatch_and_before_give_back():
    """One GPU as every rank in turn (loopback): expert e of any rank has the weights of expert e % 2 here."""
    from nmoe_backend.kernels.block_fp8 import quantize_rows_reference
    from nmoe_backend.kernels.rdep_gpu import RdepLayout, RdepPeers, rdep_combine, rdep_dispatch, rdep_give_back

    world_size, tokens, top_k, local, d, i = 4, 96, 3, 2, 512, 256
    layout = RdepLayout(
        world_size=world_size, max_tokens=tokens + 8, hidden_size=d, top_k=top_k, num_local=local, row_dtype=FP8,
        scales_per_row=d // 128, return_dtype=torch.bfloat16,
    )  # fmt: skip
    arena = torch.zeros(layout.offsets()["end"] + 256, dtype=torch.uint8, device=DEVICE)
    arena = arena[-arena.data_ptr() % 256 :][: layout.offsets()["end"]]
    view = layout.views(arena)
    view["ids"].fill_(-1)
    peers = RdepPeers(
        layout=layout, arenas=torch.tensor([arena.data_ptr()] * world_size, device=DEVICE),
        slots=torch.arange(world_size, dtype=torch.int32, device=DEVICE), own=arena,
    )  # fmt: skip
    layer = Layer(view["ids"], local, d, i, step_tokens=tokens)
    layer.payload, layer.scales = view["payload"], view["scales"]
    g = torch.Generator(device=DEVICE).manual_seed(7)
    x = torch.randn(tokens, d, device=DEVICE, generator=g).bfloat16()
    values, scales = quantize_rows_reference(x)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=DEVICE)
    weights = torch.rand(tokens, top_k, device=DEVICE, generator=g)
    count, out = torch.tensor([tokens], dtype=torch.int32, device=DEVICE), torch.empty(tokens, d, device=DEVICE)

    def step() -> None:
        rdep_dispatch(peers, values, scales.t(), ids, weights, count)
        layer.index()
        layer.run()
        rdep_give_back(peers, layer.y, layer.rows.row_idx, tokens)
        rdep_combine(peers, ids, count, None, out)

    graph = torch.cuda.CUDAGraph()
    for attempt in range(4):
        ids.copy_(torch.rand(tokens, world_size * local, device=DEVICE, generator=g).argsort(-1)[:, :top_k])
        num_tokens = (tokens, 1, 50, tokens)[attempt]
        count.fill_(num_tokens)
        if attempt == 0:
            step()
            with torch.cuda.graph(graph):
                step()
        out.fill_(float("nan"))
        graph.replay()
        layer_out = torch.zeros(num_tokens, d, device=DEVICE, dtype=torch.float64)
        for token in range(num_tokens):
            for k in range(top_k):
                rank, expert = divmod(int(ids[token, k]), local)
                at = (view["ids"][rank, token] == expert).nonzero().item()
                row = layer.rows.row_idx[rank, token, at].long().view(1)
                layer.check_rows(expert, row, values[token : token + 1], scales.t()[token : token + 1])
                layer_out[token] += weights[token, k] * layer.y[row[0]]
        assert _error(out[:num_tokens], layer_out) < 2 * TOLERANCE
        assert bool(out[num_tokens:].isnan().all())


def test_operands_that_do_not_fit_are_an_error():
    from nmoe_backend.kernels.expert_gemm_sm90 import expert_down
    from nmoe_backend.kernels.expert_rows_gpu import expert_rows

    layer = Layer(_choices([1, 2, 3, 4]), 4, 256, 128)
    tiles, num_tiles = layer.rows.tiles[0], layer.rows.num_tiles
    with pytest.raises(ValueError, match="D % 256"):
        expert_down(layer.h, layer.h_scales, layer.w2[:, :128].contiguous(), layer.w2_scales[:, :1].contiguous(), tiles,
                    num_tiles, layer.y[:, :128], NUM_SMS)  # fmt: skip
    with pytest.raises(ValueError, match="one block of columns a row"):
        expert_down(layer.h, layer.h_scales.t(), layer.w2, layer.w2_scales, tiles, num_tiles, layer.y, NUM_SMS)
    with pytest.raises(ValueError, match="Lower the tokens"):
        expert_rows(torch.empty(8, 20_000, 8, dtype=torch.int32, device="meta"), 32, 0)
