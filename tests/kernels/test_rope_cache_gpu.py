"""Rotation, latent norm and cache write in one kernel, against the three plain operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nmoe_backend.kernels.kv_write import kv_write_reference
from nmoe_backend.kernels.rms_norm import rms_norm_reference
from nmoe_backend.kernels.rope import rope_reference, rope_table_reference, yarn_frequencies_reference

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
COMPUTE = torch.bfloat16


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _table(rope_dim: int) -> Tensor:
    frequencies = yarn_frequencies_reference(rope_dim, 10000.0, 40.0, 4096, 32.0, 1.0)
    return rope_table_reference(frequencies, 163840 if rope_dim == 64 else 500, 1.0).to(DEVICE)


@pytest.mark.parametrize("dtype", [COMPUTE, torch.float32], ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "heads", "latent_dim", "rope_dim"),
    [(1, 128, 512, 64), (77, 128, 512, 64), (5, 40, 32, 16), (3, 1, 16, 8)],
)
def test_it_equals_rope_norm_and_write(num_tokens, heads, latent_dim, rope_dim, interleaved, dtype):
    """One rounding of the compute dtype apart: a multiply-add that is fused here is not there."""
    from nmoe_backend.kernels.rope_cache_gpu import Rotation, rope_cache

    table, width = _table(rope_dim), latent_dim + rope_dim
    generator = torch.Generator().manual_seed(1)
    positions = torch.randint(table.shape[0], (num_tokens,), generator=generator).to(DEVICE)
    page_size, num_pages = 16, num_tokens // 16 + 2
    idx = torch.randperm(num_pages * page_size, generator=generator)[:num_tokens].to(DEVICE)
    idx[1::5] = -1
    q = _random(2, num_tokens, heads, 128 + rope_dim).to(dtype).to(DEVICE)[..., 128:]
    kv = _random(3, num_tokens, width + 48).to(dtype).to(DEVICE)[:, 48:]
    weight = (1 + 0.3 * _random(4, latent_dim)).to(dtype).to(DEVICE)
    cache = torch.full((num_pages, page_size, width), 5.0, dtype=dtype, device=DEVICE)
    want_cache = cache.clone()
    target = torch.full((num_tokens, heads, width), 5.0, dtype=dtype, device=DEVICE)
    rotation = Rotation(turns=table, positions=positions, interleaved=interleaved)
    rope_cache(q, target[..., latent_dim:], kv, (weight, 1e-6), rotation, cache, idx)

    turns = table[positions]
    k_rope = rope_reference(kv[:, None, latent_dim:], turns, interleaved)[:, 0]
    latent, written = rms_norm_reference(kv[:, :latent_dim], weight, 1e-6), idx >= 0
    kv_write_reference(want_cache, idx[written], latent[written], k_rope[written])
    rtol = {torch.float32: 2e-6}.get(dtype, 2**-7)
    torch.testing.assert_close(target[..., latent_dim:], rope_reference(q, turns, interleaved), rtol=rtol, atol=1e-5)
    torch.testing.assert_close(cache, want_cache, rtol=rtol, atol=1e-5)
    assert (target[..., :latent_dim] == 5.0).all()
    assert torch.equal((cache == 5.0).all(-1), (want_cache == 5.0).all(-1))


def test_queries_may_be_turned_in_place():
    from nmoe_backend.kernels.rope_cache_gpu import Rotation, rope_cache

    table = _table(64)
    rotation = Rotation(turns=table, positions=torch.tensor([7, 4000], device=DEVICE), interleaved=True)
    q, kv = _random(5, 2, 128, 64).to(DEVICE), _random(6, 2, 576).to(DEVICE)
    want = rope_reference(q, table[rotation.positions], True)
    rope_cache(q, q, kv, (torch.ones(512, device=DEVICE), 1e-6), rotation, torch.zeros(1, 16, 576, device=DEVICE),
               torch.tensor([0, 1], device=DEVICE))  # fmt: skip
    torch.testing.assert_close(q, want, rtol=2e-6, atol=1e-6)


@pytest.mark.slow
def test_a_cache_row_beyond_2_to_the_31_elements_is_found():
    from nmoe_backend.kernels.rope_cache_gpu import Rotation, rope_cache

    num_pages = 2**31 // (64 * 576) + 8
    cache = torch.zeros(num_pages, 64, 576, dtype=COMPUTE, device=DEVICE)
    last = num_pages * 64 - 1
    rotation = Rotation(turns=_table(64), positions=torch.zeros(1, dtype=torch.int64, device=DEVICE), interleaved=True)
    q, kv = torch.ones(1, 1, 64, dtype=COMPUTE, device=DEVICE), torch.ones(1, 576, dtype=COMPUTE, device=DEVICE)
    weight = torch.ones(512, dtype=COMPUTE, device=DEVICE)
    rope_cache(q, q, kv, (weight, 1e-6), rotation, cache, torch.tensor([last], device=DEVICE))
    assert (cache[-1, -1] == 1).all() and (cache[-1, -2] == 0).all()
