"""The three forms of latent attention against plain attention in float64, and against each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nmoe_backend.kernels import mla_decode
from nmoe_backend.kernels.kv_write import kv_write_reference
from nmoe_backend.kernels.mla_decode import mla_decode_reference
from nmoe_backend.kernels.mla_prefill import mla_prefill_paged_reference, mla_prefill_reference

HEADS, NOPE, ROPE, VALUE, LATENT = 3, 20, 8, 12, 28
SCALE = 0.21


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _plain(q_nope: Tensor, q_rope: Tensor, keys: Tensor, w_kv_b: Tensor) -> Tensor:
    """One query and head at a time, float64: the last len(q) tokens of `keys` [Tk, C + R] are the queries' own."""
    q = torch.cat((q_nope, q_rope), -1).double()
    keys, w = keys.double(), w_kv_b.double()
    out = torch.empty(q.shape[0], HEADS, VALUE, dtype=torch.float64)
    for token in range(q.shape[0]):
        seen = keys[: keys.shape[0] - q.shape[0] + token + 1]
        for head in range(HEADS):
            k = torch.cat((seen[:, :LATENT] @ w[head, :NOPE].T, seen[:, LATENT:]), -1)
            v = seen[:, :LATENT] @ w[head, NOPE:].T
            out[token, head] = (k @ q[token, head] * SCALE).softmax(0) @ v
    return out


def _error(ours: Tensor, reference: Tensor) -> float:
    return float((ours.cpu().double() - reference).abs().max() / reference.abs().max())


def _paged(keys: list[Tensor], page_size: int, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
    """Cache (NaN where nothing was written) and block tables [S, n] of sequences whose tokens are `keys`."""
    counts = [-(-len(k) // page_size) for k in keys]
    free = torch.randperm(sum(counts) + 2, generator=generator).tolist()
    cache = torch.full((len(free), page_size, LATENT + ROPE), float("nan"), dtype=keys[0].dtype, device=device)
    tables = torch.full((len(keys), max(counts)), free[-1], dtype=torch.int32)
    for row, (k, count) in enumerate(zip(keys, counts, strict=True)):
        pages = [free.pop(0) for _ in range(count)]
        tables[row, :count] = torch.tensor(pages, dtype=torch.int32)
        idx = torch.tensor([pages[p // page_size] * page_size + p % page_size for p in range(len(k))])
        k = k.to(device)
        kv_write_reference(cache, idx.to(device), k[:, :LATENT], k[:, LATENT:])
    return cache, tables.to(device)


@pytest.mark.parametrize("num_tokens", [1, 2, 31, 300])
def test_dense_prefill_equals_plain_attention(num_tokens, device):
    generator = torch.Generator().manual_seed(num_tokens)
    q_nope, q_rope = _random(generator, num_tokens, HEADS, NOPE), _random(generator, num_tokens, HEADS, ROPE)
    keys, w = _random(generator, num_tokens, LATENT + ROPE), _random(generator, HEADS, NOPE + VALUE, LATENT) * 0.2
    got = mla_prefill_reference(*(t.to(device) for t in (q_nope, q_rope, keys, w)), SCALE)
    assert _error(got, _plain(q_nope, q_rope, keys, w)) < 1e-5


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize(("start", "length"), [(1, 1), (15, 2), (16, 16), (63, 70), (130, 1), (5, 290)])
def test_prefill_over_a_paged_prefix_equals_plain_attention(start, length, page_size, device):
    generator = torch.Generator().manual_seed(start)
    q_nope, q_rope = _random(generator, length, HEADS, NOPE), _random(generator, length, HEADS, ROPE)
    keys = _random(generator, start + length, LATENT + ROPE)
    w = _random(generator, HEADS, NOPE + VALUE, LATENT) * 0.2
    cache, tables = _paged([_random(generator, 40, LATENT + ROPE), keys], page_size, generator, device)
    got = mla_prefill_paged_reference(
        q_nope.to(device), q_rope.to(device), cache, tables[1], start, w.to(device), SCALE
    )
    assert _error(got, _plain(q_nope, q_rope, keys, w)) < 1e-5


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("lengths", [[1], [16, 1], [64, 65, 63], [1, 200, 17, 129, 33]], ids=str)
def test_absorbed_decode_equals_plain_attention(lengths, page_size, device):
    generator = torch.Generator().manual_seed(len(lengths))
    rows = len(lengths)
    q_nope, q_rope = _random(generator, rows, HEADS, NOPE), _random(generator, rows, HEADS, ROPE)
    keys = [_random(generator, length, LATENT + ROPE) for length in lengths]
    w = _random(generator, HEADS, NOPE + VALUE, LATENT) * 0.2
    cache, tables = _paged(keys, page_size, generator, device)
    lens = torch.tensor(lengths, device=device)
    got = mla_decode_reference(q_nope.to(device), q_rope.to(device), cache, tables, lens, w.to(device), SCALE)
    want = torch.cat([_plain(q_nope[i : i + 1], q_rope[i : i + 1], keys[i], w) for i in range(rows)])
    assert _error(got, want) < 1e-5


def test_decode_in_passes_equals_decode_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    q_nope, q_rope = _random(generator, 5, HEADS, NOPE), _random(generator, 5, HEADS, ROPE)
    keys = [_random(generator, length, LATENT + ROPE) for length in (3, 40, 17, 1, 33)]
    w = _random(generator, HEADS, NOPE + VALUE, LATENT)
    cache, tables = _paged(keys, 16, generator, "cpu")
    inputs = (q_nope, q_rope, cache, tables, torch.tensor([3, 40, 17, 1, 33]), w, SCALE)
    at_once = mla_decode_reference(*inputs)
    for tokens in (1, 100):
        monkeypatch.setattr(mla_decode, "PASS_TOKENS", tokens)
        torch.testing.assert_close(mla_decode_reference(*inputs), at_once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_three_forms_agree_on_the_same_token(dtype, device):
    """The last of 50 tokens, as the end of a dense prompt, as a chunk over a prefix, and as a decode row."""
    generator = torch.Generator().manual_seed(9)
    q_nope, q_rope = _random(generator, 50, HEADS, NOPE), _random(generator, 50, HEADS, ROPE)
    keys, w = _random(generator, 50, LATENT + ROPE), _random(generator, HEADS, NOPE + VALUE, LATENT) * 0.2
    q_nope, q_rope, keys, w = (t.to(device, dtype) for t in (q_nope, q_rope, keys, w))
    cache, tables = _paged([keys], 16, generator, device)
    dense = mla_prefill_reference(q_nope, q_rope, keys, w, SCALE)[-1:]
    paged = mla_prefill_paged_reference(q_nope[-1:], q_rope[-1:], cache, tables[0], 49, w, SCALE)
    lens = torch.tensor([50], device=device)
    absorbed = mla_decode_reference(q_nope[-1:], q_rope[-1:], cache, tables, lens, w, SCALE)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # bf16: two roundings of 2^-8 in another order
    torch.testing.assert_close(paged, dense, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(absorbed, dense, rtol=tolerance, atol=tolerance)
