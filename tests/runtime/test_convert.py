"""`nmoe convert`: the same weights in another form, whatever interrupts it, in bounded memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nmoe_backend import convert as convert_module, models
from nmoe_backend.convert import convert, main
from nmoe_backend.models.checkpoint import Checkpoint, sharded_file, source_shape
from nmoe_backend.runtime.weights import load_rank_weights
from nmoe_backend.safetensors_header import encode_header
from nmoe_backend.types import ConfigError
from scripts.make_tiny_checkpoint import DTYPES

ROOT = Path(__file__).parents[2]
WORLD = 4

# Converts, and kills itself at the given progress call: before a byte is copied, inside a tensor, between two ranks.
KILLED_CONVERSION = """
import os, signal, sys
from pathlib import Path
from nmoe_backend import convert
convert._CHUNK_BYTES, convert._SYNC_BYTES = 1000, 20_000
source, out, world_size, at_call = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
calls = 0
def progress(rank, done, total):
    global calls
    calls += 1
    if calls == at_call:
        os.kill(os.getpid(), signal.SIGKILL)
convert.convert(source, out, world_size, progress)
print(calls)
"""

# VmHWM and not getrusage: a child's ru_maxrss starts at its parent's, and the parent has imported torch.
MEASURED_CONVERSION = """
import re, sys
from pathlib import Path
from nmoe_backend.convert import convert
convert(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def rank_weights(
    path: Path, rank: int, dtype: torch.dtype = torch.float32, *, keep: bool = False
) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(path, models.load_spec(path))
    ranks = {"rank": rank, "world_size": WORLD}
    return load_rank_weights(checkpoint, **ranks, device="cpu", dtype=dtype, keep_quantized=keep)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def converted(checkpoints, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("converted")
    for dtype, path in checkpoints.items():
        convert(path, root / dtype, WORLD)
    return {dtype: root / dtype for dtype in checkpoints}


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rank_loads_bit_for_bit_what_the_hubs_form_gives(checkpoints, converted, dtype, keep, rank):
    expected, got = (rank_weights(form[dtype], rank, keep=keep) for form in (checkpoints, converted))
    assert list(got) == list(expected)
    assert all(torch.equal(got[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in expected)


def test_the_files_are_safetensors_with_stored_dtypes_kept_and_the_router_in_float32(checkpoints, converted):
    tensors = load_file(converted["fp8"] / sharded_file(3, WORLD))  # the reference library reads them
    hub = {}
    for file in checkpoints["fp8"].glob("*.safetensors"):
        hub |= load_file(file)
    prefix = "model.layers.1.mlp.experts.6"  # rank 3 of 4 holds experts 6 and 7
    w13 = tensors["layers.1.ffn.w13"]
    assert w13.dtype == torch.float8_e4m3fn
    assert torch.equal(w13[0, :32].float(), hub[f"{prefix}.gate_proj.weight"].float())
    assert torch.equal(w13[0, 32:].float(), hub[f"{prefix}.up_proj.weight"].float())
    assert torch.equal(tensors["layers.1.ffn.w2_scale"][0], hub[f"{prefix}.down_proj.weight_scale_inv"])
    gate = tensors["layers.1.ffn.gate.weight"]
    assert gate.dtype == torch.float32
    assert torch.equal(gate, hub["model.layers.1.mlp.gate.weight"].float())
    assert tensors["embed.weight"].dtype == torch.bfloat16


def test_config_tokenizer_and_generation_config_are_copied(checkpoints, converted):
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (converted["fp8"] / name).read_bytes() == (checkpoints["fp8"] / name).read_bytes()
    assert not [path.name for path in converted["fp8"].iterdir() if path.suffix in (".journal", ".partial", ".tmp")]


@pytest.fixture(scope="module")
def num_progress_calls(checkpoints, tmp_path_factory) -> int:
    out = tmp_path_factory.mktemp("counted") / "out"
    result = run_python(KILLED_CONVERSION, checkpoints["fp8"], out, WORLD, 0)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.24, 0.26, 0.5, 0.77, 1.0])
def test_a_conversion_killed_anywhere_resumes_to_identical_bytes(
    checkpoints, converted, num_progress_calls, tmp_path, share
):
    at_call = max(1, round(share * num_progress_calls))
    result = run_python(KILLED_CONVERSION, checkpoints["fp8"], tmp_path / "x", WORLD, at_call)
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "x" / sharded_file(WORLD - 1, WORLD)).exists()
    resumed: list[tuple[int, int, int]] = []
    convert(checkpoints["fp8"], tmp_path / "x", WORLD, lambda *call: resumed.append(call))
    assert contents(tmp_path / "x") == contents(converted["fp8"])
    if share >= 0.5:  # ranks that were complete are not written again
        assert resumed[0][1] == resumed[0][2]


def test_a_resumed_rank_goes_on_behind_its_last_journaled_tensor(checkpoints, tmp_path, num_progress_calls):
    run_python(KILLED_CONVERSION, checkpoints["fp8"], tmp_path, WORLD, num_progress_calls // (2 * WORLD))
    journal = tmp_path / f"{sharded_file(0, WORLD)}.journal"
    names = journal.read_text().splitlines()
    assert names
    with journal.open("a") as file:
        file.write("layers.0.at")  # a line cut by a crash
    first: list[int] = []
    convert(checkpoints["fp8"], tmp_path, WORLD, lambda rank, done, total: first.append(done))
    params = Checkpoint(tmp_path, models.load_spec(tmp_path)).share(0, WORLD)
    offset = params.tensors[next(p for p in params.params if p.name == names[-1]).sources[-1]].end
    assert first[0] == offset


def test_a_second_run_changes_nothing(checkpoints, converted, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in converted["bfloat16"].iterdir()}
    args = ["--from", str(checkpoints["bfloat16"]), "--to", str(converted["bfloat16"]), "--world", str(WORLD)]
    assert main(args) == 0
    assert {path.name: path.stat().st_mtime_ns for path in converted["bfloat16"].iterdir()} == before
    out = capsys.readouterr().out
    assert out.count("already there") == WORLD
    assert "is complete: 4 ranks" in out


def test_a_source_that_changed_in_between_is_an_error(checkpoints, tmp_path):
    source = shutil.copytree(checkpoints["fp8"], tmp_path / "source")
    run_python(KILLED_CONVERSION, source, tmp_path / "out", WORLD, 30)
    shard = source / "model-00002-of-00003.safetensors"
    stat = shard.stat()
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(ConfigError, match=r"source changed.*files"):
        convert(source, tmp_path / "out", WORLD)


def test_a_source_that_changes_while_it_is_read_leaves_no_complete_file(checkpoints, tmp_path):
    source = shutil.copytree(checkpoints["fp8"], tmp_path / "source")
    with pytest.raises(ConfigError, match="changed while it was converted"):
        convert(
            source, tmp_path / "out", WORLD, lambda *_: os.utime(source / "model-00001-of-00003.safetensors", (1, 1))
        )
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_another_world_in_the_same_folder_is_an_error(checkpoints, converted):
    with pytest.raises(ConfigError, match="for world 4, need 8"):
        convert(checkpoints["fp8"], converted["fp8"], 8)


def test_a_folder_with_foreign_model_files_is_not_written_to(checkpoints, tmp_path):
    (tmp_path / "model0-mp4.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match="empty folder"):
        convert(checkpoints["fp8"], tmp_path, WORLD)


def test_a_tampered_partial_file_is_an_error(checkpoints, tmp_path, num_progress_calls):
    run_python(KILLED_CONVERSION, checkpoints["fp8"], tmp_path, WORLD, num_progress_calls // (2 * WORLD))
    partial = tmp_path / f"{sharded_file(0, WORLD)}.partial"
    partial.write_bytes(b"other" + partial.read_bytes()[5:])
    with pytest.raises(ConfigError, match="do not belong to this conversion"):
        convert(checkpoints["fp8"], tmp_path, WORLD)


def test_too_little_disk_space_is_an_error_before_anything_is_written(checkpoints, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"needs 0\.00 GB more|free some space"):
        convert(checkpoints["fp8"], tmp_path / "new" / "out", WORLD)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("world", "message"), [("0", "at least 1"), ("3", "8 experts cannot be split")])
def test_the_command_reports_an_impossible_world(checkpoints, tmp_path, capsys, world, message):
    assert main(["--from", str(checkpoints["fp8"]), "--to", str(tmp_path / "x"), "--world", world]) == 1
    assert message in capsys.readouterr().err


def test_source_and_target_must_differ(checkpoints):
    with pytest.raises(ConfigError, match="same folder"):
        convert(checkpoints["fp8"], checkpoints["fp8"], WORLD)


def test_sharded_files_of_another_world_name_the_remedy(converted):
    spec = models.load_spec(converted["fp8"])
    with pytest.raises(ConfigError, match=r"got mp4 files, need mp8: run nmoe convert --world 8"):
        Checkpoint(converted["fp8"], spec).share(0, 8)


def test_a_missing_or_misshapen_sharded_tensor_is_listed(converted, tmp_path):
    path = shutil.copytree(converted["fp8"], tmp_path / "x")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4, "v_head_dim": 16}))
    with pytest.raises(ConfigError) as error:
        rank_weights(path, 0)
    assert "layers.3.attn_norm.weight: missing" in str(error.value)
    with pytest.raises(ConfigError, match=r"layers\.0\.attn\.wo\.weight: shape \[64, 128\], needs \[64, 64\]"):
        (path / "config.json").write_text(json.dumps(config | {"v_head_dim": 16}))
        rank_weights(path, 0)


def test_a_folder_with_both_forms_is_ambiguous(checkpoints, converted, tmp_path):
    path = shutil.copytree(checkpoints["fp8"], tmp_path / "x")
    shutil.copy(converted["fp8"] / sharded_file(0, WORLD), path)
    with pytest.raises(ConfigError, match="not clear which is meant"):
        rank_weights(path, 0)


@pytest.mark.slow
def test_peak_memory_stays_below_one_hub_shard_plus_a_gigabyte_for_an_output_of_eight_shards(checkpoints, tmp_path):
    source = sparse_checkpoint(checkpoints["bfloat16"], tmp_path / "source", num_shards=9)
    shards = [path.stat().st_size for path in source.glob("*.safetensors")]
    result = run_python(MEASURED_CONVERSION, source, tmp_path / "out", 1)
    assert result.returncode == 0, result.stderr
    bound, output = max(shards) + 10**9, (tmp_path / "out" / sharded_file(0, 1)).stat().st_size
    assert output > 8 * max(shards)
    assert output > bound  # or the bound would mean nothing
    assert int(result.stdout) < bound
    assert int(result.stdout) < 100e6  # what it really takes, with room


def sparse_checkpoint(template: Path, out: Path, num_shards: int) -> Path:
    """A checkpoint of 1.3 GB with zeros for weights: holes in the files, so it takes no space."""
    out.mkdir()
    config = json.loads((template / "config.json").read_text())
    config |= {"hidden_size": 2048, "moe_intermediate_size": 832, "n_routed_experts": 64}
    (out / "config.json").write_text(json.dumps(config))
    params = models.parameters(models.load_spec(out), 0, 1)
    shapes = {source: source_shape(param) for param in params for source in param.sources}
    total = sum(torch.Size(shape).numel() * 2 for shape in shapes.values())
    weight_map, groups, done = {}, [{} for _ in range(num_shards)], 0
    for name, shape in shapes.items():
        i = done * num_shards // total
        groups[i][name] = ("BF16", shape)
        weight_map[name] = f"model-{i}.safetensors"
        done += torch.Size(shape).numel() * 2
    for i, group in enumerate(groups):
        header = encode_header(group)
        size = len(header) + sum(torch.Size(shape).numel() * 2 for _, shape in group.values())
        with (out / f"model-{i}.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(size)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return out
