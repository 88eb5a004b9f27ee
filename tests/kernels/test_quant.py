"""Layers over weights that stay in fp8 give bit for bit what they give over the same weights dequantised before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nmoe_backend.layers.linear import Linear
from nmoe_backend.layers.ops import ops_for
from nmoe_backend.layers.plain_ops import PlainOps
from nmoe_backend.layers.quant import BlockFp8, Plain, weight_format
from nmoe_backend.layers.rows import Rows
from nmoe_backend.layers.weights import Weights
from nmoe_backend.models.spec import QuantSpec
from nmoe_backend.types import ConfigError

BLOCK = (128, 128)
EXPERTS, TOP_K, HIDDEN, INTER = 6, 3, 136, 200  # neither size is a multiple of 128
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _quantized(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """e4m3 values, fp32 scales that differ a lot between blocks, and their product, element by element."""
    values = (_random(seed, rows, columns) * 20).to(torch.float8_e4m3fn)
    scales = _random(seed + 1, -(-rows // BLOCK[0]), -(-columns // BLOCK[1])).exp() * 0.01
    row, column = torch.meshgrid(torch.arange(rows) // BLOCK[0], torch.arange(columns) // BLOCK[1], indexing="ij")
    return values, scales, values.float() * scales[row, column]


def _linear_weights(rows: int, columns: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As they are kept, and dequantised in fp32."""
    values, scales, product = _quantized(0, rows, columns)
    return {"weight": values, "weight_scale_inv": scales}, {"weight": product}


def _expert_weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    kept: dict[str, list[Tensor]] = {"w13": [], "w13_scale": [], "w2": [], "w2_scale": []}
    plain: dict[str, list[Tensor]] = {"w13": [], "w2": []}
    for expert in range(EXPERTS):
        gate, up = (_quantized(10 * expert + n, INTER, HIDDEN) for n in (0, 3))
        down = _quantized(10 * expert + 6, HIDDEN, INTER)
        kept["w13"].append(torch.cat((gate[0], up[0])))
        kept["w13_scale"].append(torch.cat((gate[1], up[1])))
        kept["w2"].append(down[0])
        kept["w2_scale"].append(down[1])
        plain["w13"].append(torch.cat((gate[2], up[2])))
        plain["w2"].append(down[2])
    stacked = [{name: torch.stack(tensors) for name, tensors in made.items()} for made in (kept, plain)]
    return stacked[0], stacked[1]


def _weights(tensors: dict[str, Tensor], dtype: torch.dtype, device: str, *, cast: bool = False) -> Weights:
    on_device = {name: tensor.to(device, dtype if cast else None) for name, tensor in tensors.items()}
    return Weights(on_device, torch.device(device), dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(256, 384), (200, 136), (576, 512), (64, 48), (1, 129)], ids=str)
def test_a_kept_linear_equals_the_dequantised_one(shape, dtype, device):
    kept, plain = _linear_weights(*shape)
    ops = PlainOps(ops_for(torch.device(device)))
    ours = Linear(ops, [BlockFp8(BLOCK).linear(_weights(kept, dtype, device), shape[1], shape[0])])
    other = Linear(ops, [Plain().linear(_weights(plain, dtype, device, cast=True), shape[1], shape[0])])
    for num_tokens in (0, 1, 33):
        x = _random(7, num_tokens, shape[1]).to(device, dtype)
        assert torch.equal(ours.forward(Rows(x)), other.forward(Rows(x)))
        assert ours.forward(Rows(x)).dtype == dtype


@DTYPES
@pytest.mark.parametrize("num_rows", [0, 1, 40])
def test_kept_experts_equal_the_dequantised_ones(num_rows, dtype, device):
    """I = 200 has two rows of scale blocks for gate and two for up; of one matrix of 400 rows they would be four of
    other rows."""
    kept, plain = _expert_weights()
    ops = PlainOps(ops_for(torch.device(device)))
    ours = ops.pack_experts(BlockFp8(BLOCK).experts(_weights(kept, dtype, device), EXPERTS, HIDDEN, INTER))
    other = ops.pack_experts(Plain().experts(_weights(plain, dtype, device, cast=True), EXPERTS, HIDDEN, INTER))
    assert ours.weights.num_local == other.weights.num_local == EXPERTS
    ids = torch.rand(num_rows, EXPERTS + 2, generator=torch.Generator().manual_seed(4)).argsort(-1)[:, :TOP_K] - 2
    ids = ids.clamp(min=-1).to(device, torch.int32)
    x, weights = _random(2, num_rows, HIDDEN).to(device, dtype), _random(3, num_rows, TOP_K).abs().to(device)
    got = ours.forward(x, ids, weights)
    assert got.dtype == torch.float32
    assert torch.equal(got, other.forward(x, ids, weights))
    assert num_rows == 0 or bool(got.any())


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype != torch.float8_e4m3fn:
            self.num_bytes = max(self.num_bytes, result.nbytes)
        return result


def test_no_more_than_one_expert_is_dequantised_at_a_time():
    kept, _ = _expert_weights()
    weights = BlockFp8(BLOCK).experts(_weights(kept, torch.bfloat16, "cpu"), EXPERTS, HIDDEN, INTER)
    experts = PlainOps(ops_for(torch.device("cpu"))).pack_experts(weights)
    ids = torch.arange(EXPERTS, dtype=torch.int32).view(2, TOP_K)
    with _Largest() as largest:
        experts.forward(_random(0, 2, HIDDEN).bfloat16(), ids, torch.ones(2, TOP_K))
    assert largest.num_bytes == 2 * INTER * HIDDEN * 4  # one expert's gate and up, in fp32


def test_the_format_follows_the_checkpoint_and_what_the_loader_was_told():
    quant = QuantSpec(format="fp8_block", block=BLOCK)
    assert weight_format(quant, keep_quantized=True) == BlockFp8(BLOCK)
    assert weight_format(quant, keep_quantized=False) == Plain()
    assert weight_format(None, keep_quantized=True) == Plain()


@pytest.mark.parametrize("keep_quantized", [True, False])
def test_an_unknown_format_is_an_error_that_names_the_known_ones(keep_quantized):
    with pytest.raises(ConfigError, match="got quantisation format 'int3'; fp8_block can be served"):
        weight_format(QuantSpec(format="int3", block=BLOCK), keep_quantized)


def test_weights_in_another_format_than_the_layers_expect_are_an_error():
    kept, plain = _linear_weights(200, 136)
    with pytest.raises(ConfigError, match=r"weight weight: got .*float32.*need .*float8_e4m3fn"):
        BlockFp8(BLOCK).linear(_weights(plain, torch.float32, "cpu"), 136, 200)
    with pytest.raises(ConfigError, match=r"weight weight: got .*float8_e4m3fn.*need .*float32"):
        Plain().linear(_weights(kept, torch.float32, "cpu"), 136, 200)
    del kept["weight_scale_inv"]
    with pytest.raises(ConfigError, match="weight weight_scale_inv: got nothing"):
        BlockFp8(BLOCK).linear(_weights(kept, torch.float32, "cpu"), 136, 200)
