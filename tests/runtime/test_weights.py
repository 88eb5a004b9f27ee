"""Loading one rank, from the hub's form: what is read, what comes out, and what is refused."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nmoe_backend import models
from nmoe_backend.models.checkpoint import Checkpoint, scale_name
from nmoe_backend.runtime import weight_reader
from nmoe_backend.runtime.dummy_weights import dummy_rank_weights
from nmoe_backend.runtime.weight_reader import Reader, ReadMeter, run_jobs
from nmoe_backend.runtime.weights import load_rank_weights
from nmoe_backend.safetensors_header import TensorInfo
from nmoe_backend.types import ConfigError

WORLD = 8
DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


def load(path: Path, rank: int = 0, world_size: int = WORLD, dtype: torch.dtype = torch.float32, **kwargs):
    where = {"rank": rank, "world_size": world_size, "device": "cpu", **kwargs}
    return load_rank_weights(opened(path), dtype=dtype, **where)


def opened(path: Path) -> Checkpoint:
    return Checkpoint(path, models.load_spec(path))


def hub_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def dequantised(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Element by element: weight * scale of its block."""
    weight, scale = tensors[name].float(), tensors[f"{name}_scale_inv"]
    rows, columns = torch.meshgrid(*(torch.arange(n) // 128 for n in weight.shape), indexing="ij")
    return weight * scale[rows, columns]


def edited(source: Path, out: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A one-file copy of a checkpoint after `edit` of its tensors."""
    tensors = hub_tensors(source)
    edit(tensors)
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    shutil.copy(source / "config.json", out)
    return out


@pytest.mark.parametrize("rank", [0, 3, 7])
def test_a_rank_holds_the_hubs_values_of_its_own_experts(checkpoints, rank):
    hub, weights = hub_tensors(checkpoints["float32"]), load(checkpoints["float32"], rank)
    expert = f"model.layers.2.mlp.experts.{rank}"
    assert torch.equal(
        weights["layers.2.ffn.w13"][0],
        torch.cat([hub[f"{expert}.gate_proj.weight"], hub[f"{expert}.up_proj.weight"]]),
    )
    assert torch.equal(weights["layers.2.ffn.w2"][0], hub[f"{expert}.down_proj.weight"])
    pairs = {
        "embed.weight": "model.embed_tokens.weight",
        "lm_head.weight": "lm_head.weight",
        "layers.0.ffn.w1.weight": "model.layers.0.mlp.gate_proj.weight",
        "layers.0.ffn.w2.weight": "model.layers.0.mlp.down_proj.weight",
        "layers.0.ffn.w3.weight": "model.layers.0.mlp.up_proj.weight",
        "layers.1.attn.wkv_a.weight": "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
        "layers.1.attn.kv_norm.weight": "model.layers.1.self_attn.kv_a_layernorm.weight",
        "layers.1.ffn.gate.bias": "model.layers.1.mlp.gate.e_score_correction_bias",
        "layers.1.ffn.shared.w2.weight": "model.layers.1.mlp.shared_experts.down_proj.weight",
        "layers.1.ffn_norm.weight": "model.layers.1.post_attention_layernorm.weight",
    }
    assert all(torch.equal(weights[ours], hub[theirs]) for ours, theirs in pairs.items())


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_names_and_shapes_are_those_of_the_table_whatever_the_world(checkpoints, world_size):
    path = checkpoints["bfloat16"]
    weights = load(path, rank=world_size - 1, world_size=world_size)
    table = models.parameters(models.load_spec(path), world_size - 1, world_size)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {p.name: p.shape for p in table}
    assert all(tensor.is_contiguous() for tensor in weights.values())


def test_fp8_weights_come_out_dequantised_block_by_block(checkpoints):
    hub, weights = hub_tensors(checkpoints["fp8"]), load(checkpoints["fp8"], rank=5)
    assert not [name for name in weights if "scale" in name]
    assert torch.equal(
        weights["layers.1.attn.wq_b.weight"], dequantised(hub, "model.layers.1.self_attn.q_b_proj.weight")
    )
    parts = [dequantised(hub, f"model.layers.1.mlp.experts.5.{proj}.weight") for proj in ("gate_proj", "up_proj")]
    assert torch.equal(weights["layers.1.ffn.w13"][0], torch.cat(parts))


def quantised_names(path: Path) -> set[str]:
    """Parameters of a rank that have scales."""
    names = {param.name for param in models.parameters(models.load_spec(path), 0, WORLD)}
    return {name for name in names if scale_name(name) in names}


def test_kept_weights_are_the_bytes_of_the_file_with_their_scales_beside_them(checkpoints):
    hub, weights = hub_tensors(checkpoints["fp8"]), load(checkpoints["fp8"], rank=5, keep_quantized=True)
    pairs = {
        "layers.1.attn.wq_b.weight": "model.layers.1.self_attn.q_b_proj.weight",
        "layers.1.attn.wq_b.weight_scale_inv": "model.layers.1.self_attn.q_b_proj.weight_scale_inv",
        "layers.0.ffn.w2.weight": "model.layers.0.mlp.down_proj.weight",
        "layers.1.ffn.shared.w1.weight_scale_inv": "model.layers.1.mlp.shared_experts.gate_proj.weight_scale_inv",
    }
    for ours, theirs in pairs.items():
        assert weights[ours].dtype == hub[theirs].dtype
        assert torch.equal(weights[ours].float(), hub[theirs].float())
    for suffix, ours in (("weight", "w13"), ("weight_scale_inv", "w13_scale")):
        parts = [hub[f"model.layers.2.mlp.experts.5.{proj}.{suffix}"].float() for proj in ("gate_proj", "up_proj")]
        assert torch.equal(weights[f"layers.2.ffn.{ours}"][0].float(), torch.cat(parts))


def test_kept_weights_are_one_byte_each_but_for_wkv_b(checkpoints):
    """wkv_b is what absorbed attention needs in the compute dtype."""
    path = checkpoints["fp8"]
    plain, weights = load(path, dtype=torch.bfloat16), load(path, dtype=torch.bfloat16, keep_quantized=True)
    kept = {name for name in quantised_names(path) if "wkv_b" not in name}
    assert {name for name, tensor in weights.items() if tensor.dtype == torch.float8_e4m3fn} == kept
    assert weights.keys() == plain.keys() | {scale_name(name) for name in kept}
    assert all(weights[name].nbytes == weights[name].numel() and weights[name].is_contiguous() for name in kept)
    assert all(weights[scale_name(name)].dtype == torch.float32 for name in kept)
    assert all(torch.equal(weights[name], plain[name]) for name in plain.keys() - kept)


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_a_checkpoint_that_is_not_quantised_has_nothing_to_keep(checkpoints, form):
    plain, weights = load(checkpoints[form]), load(checkpoints[form], keep_quantized=True)
    assert weights.keys() == plain.keys()
    assert all(torch.equal(weights[name], plain[name]) for name in plain)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_is_cast_but_the_routers_parameters_stay_float32(checkpoints, form, dtype):
    weights = load(checkpoints[form], dtype=dtype)
    float32 = {name for name, tensor in weights.items() if tensor.dtype == torch.float32}
    routers = {name for name in weights if ".gate." in name}
    assert len(routers) == 4
    assert float32 == (routers if dtype == torch.bfloat16 else set(weights))


@pytest.mark.parametrize(("form", "keep"), [("bfloat16", False), ("fp8", False), ("fp8", True)])
def test_only_this_ranks_experts_are_read_and_each_byte_once(checkpoints, form, keep):
    read: list[TensorInfo] = []
    path = checkpoints[form]
    load(path, rank=6, on_read=read.append, keep_quantized=keep)
    checkpoint = opened(path).share(6, WORLD)
    assert Counter(read) == Counter(checkpoint.tensors.values())
    experts = {name for name in checkpoint.tensors if ".mlp.experts." in name}
    assert {name.split(".experts.")[1].split(".")[0] for name in experts} == {"6"}


def test_mtp_layers_are_listed_and_ignored(checkpoints, caplog):
    path = checkpoints["float32"]
    ignored = opened(path).share(0, WORLD).ignored
    assert "model.layers.3.eh_proj.weight" in ignored
    assert all(name.startswith("model.layers.3.") for name in ignored)
    with caplog.at_level("INFO"):
        load(path)
    assert "model.layers.3.eh_proj.weight" in caplog.text


def test_all_misfits_are_in_one_error(checkpoints, tmp_path):
    def edit(tensors):
        del tensors["model.layers.1.mlp.experts.0.up_proj.weight"]
        tensors["model.layers.1.mlp.experts.9.up_proj.weight"] = torch.zeros(1)
        tensors["model.norm.weight"] = torch.zeros(63)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int32)

    path = edited(checkpoints["float32"], tmp_path / "x", edit)
    with pytest.raises(ConfigError) as error:
        load(path)
    for line in (
        "4 tensors are wrong",
        "model.layers.1.mlp.experts.0.up_proj.weight: missing",
        "model.layers.1.mlp.experts.9.up_proj.weight: unexpected",
        "model.norm.weight: shape [63], needs [64]",
        "lm_head.weight: dtype I32, needs BF16 or F16 or F32",
    ):
        assert line in str(error.value)


def test_a_long_list_of_misfits_is_cut_with_a_count(checkpoints, tmp_path):
    path = edited(checkpoints["float32"], tmp_path / "x", lambda tensors: [tensors.pop(n) for n in list(tensors)[5:80]])
    with pytest.raises(ConfigError, match=r"tensors are wrong(.|\n)*\.\.\. and \d+ more"):
        load(path)


def test_unquantised_weights_under_a_quantisation_config_are_refused(checkpoints, tmp_path):
    name = "model.layers.0.self_attn.o_proj.weight"
    path = edited(checkpoints["fp8"], tmp_path / "x", lambda tensors: tensors.update({name: tensors[name].float()}))
    with pytest.raises(ConfigError, match=rf"{name}: dtype F32, needs F8_E4M3"):
        load(path)


def test_experts_of_mixed_dtypes_are_refused(checkpoints, tmp_path):
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    path = edited(checkpoints["float32"], tmp_path / "x", lambda tensors: tensors.update({name: tensors[name].half()}))
    with pytest.raises(ConfigError, match=r"layers\.1\.ffn\.w13: its sources mix F16 and F32"):
        load(path)


def test_one_file_without_an_index_loads_the_same(checkpoints, tmp_path):
    path = edited(checkpoints["float32"], tmp_path / "x", lambda tensors: None)
    expected = load(checkpoints["float32"], 2)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(path, 2).items())


def test_a_missing_shard_is_named(checkpoints, tmp_path):
    path = shutil.copytree(checkpoints["bfloat16"], tmp_path / "x")
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match="names 3 files, and 1 are missing: model-00002-of-00003"):
        load(path)


def test_a_truncated_shard_is_named(checkpoints, tmp_path):
    path = shutil.copytree(checkpoints["bfloat16"], tmp_path / "x")
    file = path / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ConfigError, match=r"model-00003-of-00003.*truncated"):
        load(path)


def fill(target: torch.Tensor, info: TensorInfo) -> None:
    run_jobs([(info, lambda reader: reader.fill(target, info))], target.device, lambda info: None)


@pytest.mark.parametrize("device", DEVICES)
def test_a_file_that_shrinks_after_its_header_was_read_is_an_error(tmp_path, device):
    (tmp_path / "x").write_bytes(bytes(12))
    info = TensorInfo(dtype="BF16", shape=(8,), file=tmp_path / "x", begin=0, end=16)
    with pytest.raises(ConfigError, match="x ended 4 bytes early: it changed while it was read. Fetch it again"):
        fill(torch.empty(8, dtype=torch.bfloat16, device=device), info)


def test_a_file_that_went_away_is_an_error(tmp_path):
    info = TensorInfo(dtype="F32", shape=(1,), file=tmp_path / "gone", begin=0, end=4)
    with pytest.raises(ConfigError, match=r"cannot read .*gone: No such file or directory"):
        fill(torch.empty(1), info)


def test_after_an_error_the_other_readers_stop(monkeypatch):
    """Reader two is inside its first job until reader one's thread, which failed, is gone."""
    monkeypatch.setattr(weight_reader, "NUM_READERS", 2)
    monkeypatch.setattr(weight_reader, "RUN_BYTES", 4)
    infos = [TensorInfo(dtype="F32", shape=(1,), file=Path("x"), begin=n, end=n + 4) for n in range(0, 40, 4)]
    both, threads, done = threading.Barrier(2, timeout=60), [], []

    def fails(_reader: Reader) -> None:
        threads.append(threading.current_thread())
        both.wait()
        raise ValueError("broken")

    def waits(_reader: Reader) -> None:
        both.wait()
        threads[0].join(60)

    jobs = [(infos[0], fails), (infos[1], waits), *[(info, done.append) for info in infos[2:]]]
    with pytest.raises(ValueError, match="broken"):
        run_jobs(jobs, torch.device("cpu"), lambda info: None)
    assert done == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097, 40000])
def test_a_tensor_of_any_size_arrives_byte_for_byte(tmp_path, monkeypatch, device, count):
    """Sizes around and far above what a staging buffer holds; values that are NaN in fp8 too."""
    monkeypatch.setattr(weight_reader, "STAGE_BYTES", 4096)
    values = torch.randint(-128, 128, (count,), dtype=torch.int8, generator=torch.Generator().manual_seed(count))
    (tmp_path / "x").write_bytes(b"head" + values.numpy().tobytes())
    info = TensorInfo(dtype="F8_E4M3", shape=(count,), file=tmp_path / "x", begin=4, end=4 + count)
    target = torch.zeros(count, dtype=torch.float8_e4m3fn, device=device)
    fill(target, info)
    assert torch.equal(target.cpu().view(torch.int8), values)


def test_what_a_cpu_keeps_as_it_is_stored_is_read_into_the_result_itself(checkpoints, monkeypatch):
    """No tensor is made to read into."""
    monkeypatch.delattr(Reader, "read")
    load(checkpoints["float32"])


def test_neighbours_in_a_file_are_one_run_up_to_a_size(monkeypatch):
    monkeypatch.setattr(weight_reader, "RUN_BYTES", 8)
    spans = [("a", 0, 4), ("a", 4, 8), ("a", 8, 12), ("a", 12, 40), ("b", 40, 44)]
    infos = [TensorInfo(dtype="U8", shape=(e - b,), file=Path(f), begin=b, end=e) for f, b, e in spans]
    runs = weight_reader._runs([(info, print) for info in infos])
    assert [[job[0] for job in run] for run in runs] == [infos[:2], infos[2:3], infos[3:4], infos[4:]]


def test_eight_ranks_at_once_load_what_each_loads_alone(checkpoints):
    checkpoint = opened(checkpoints["fp8"])
    ranks = {"world_size": WORLD, "device": "cpu", "dtype": torch.bfloat16}
    with ThreadPoolExecutor(WORLD) as pool:
        together = list(pool.map(lambda rank: load_rank_weights(checkpoint, rank=rank, **ranks), range(WORLD)))
    for rank, weights in enumerate(together):
        alone = load(checkpoints["fp8"], rank, dtype=torch.bfloat16)
        assert all(torch.equal(weights[name], alone[name]) for name in alone)


@pytest.mark.gpu
@pytest.mark.parametrize(("form", "keep"), [("float32", False), ("bfloat16", True), ("fp8", False), ("fp8", True)])
def test_a_gpu_gets_the_bytes_that_a_cpu_gets(checkpoints, monkeypatch, form, keep):
    monkeypatch.setattr(weight_reader, "STAGE_BYTES", 4096)
    how = {"rank": 3, "dtype": torch.bfloat16, "keep_quantized": keep}
    here, there = load(checkpoints[form], **how), load(checkpoints[form], device=torch.device("cuda:0"), **how)
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        assert there[name].dtype == tensor.dtype and there[name].is_cuda
        assert torch.equal(there[name].cpu().view(torch.uint8), tensor.view(torch.uint8)), name


def test_the_meter_says_how_much_and_how_fast(monkeypatch):
    now = iter([0.0, 4.0, 11.0, 11.0, 11.0, 20.0, 20.0])
    monkeypatch.setattr(weight_reader.time, "monotonic", lambda: next(now))
    said: list[str] = []
    meter = ReadMeter(said.append)
    info = TensorInfo(dtype="U8", shape=(22 * 10**9,), file=Path("x"), begin=0, end=22 * 10**9)
    meter(info)
    assert said == []
    meter(info)
    assert said == ["44.00 GB at 4.00 GB/s so far"]
    assert meter.summary() == "44.00 GB at 2.20 GB/s"


def test_a_folder_without_weights_says_what_it_needs(checkpoints, tmp_path):
    shutil.copy(checkpoints["bfloat16"] / "config.json", tmp_path)
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json"):
        load(tmp_path)


def test_a_float16_checkpoint_loads_with_its_router_in_float32(checkpoints, tmp_path):
    def edit(tensors):
        tensors |= {name: tensor.half() for name, tensor in tensors.items()}

    weights = load(edited(checkpoints["float32"], tmp_path / "x", edit), dtype=torch.bfloat16)
    assert weights["layers.1.ffn.gate.weight"].dtype == torch.float32
    expected = hub_tensors(checkpoints["float32"])["model.norm.weight"].half().to(torch.bfloat16)
    assert torch.equal(weights["norm.weight"], expected)


@pytest.mark.parametrize("keep", [False, True])
def test_dummy_weights_have_a_checkpoints_names_shapes_and_dtypes(checkpoints, keep):
    spec = models.load_spec(checkpoints["fp8"])
    how = {"rank": 3, "world_size": WORLD, "device": torch.device("cpu"), "dtype": torch.bfloat16}
    made, again = (dummy_rank_weights(spec, keep_quantized=keep, **how) for _ in range(2))
    loaded = load(checkpoints["fp8"], 3, dtype=torch.bfloat16, keep_quantized=keep)
    assert {name: (t.shape, t.dtype) for name, t in made.items()} == {n: (t.shape, t.dtype) for n, t in loaded.items()}
    assert all(torch.equal(made[name].view(torch.uint8), again[name].view(torch.uint8)) for name in made)
    assert all(bool(tensor.float().isfinite().all()) and bool(tensor.float().any()) for tensor in made.values())


def test_more_experts_than_the_config_says_are_unexpected(checkpoints, tmp_path):
    path = shutil.copytree(checkpoints["bfloat16"], tmp_path / "x")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"n_routed_experts": 4, "n_group": 2}))
    with pytest.raises(ConfigError, match=r"experts\.7\.up_proj\.weight: unexpected"):
        load(path, world_size=4)
