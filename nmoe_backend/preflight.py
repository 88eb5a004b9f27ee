"""Does this config fit this machine's GPUs and memory? The doctor asks, and `warmup.start` before it allocates.

`measure` asks torch and the driver once; each check judges what it returned, so that a test can hand it any machine.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nmoe_backend import environ, memory
from nmoe_backend.config import ReplicaConfig, ServeConfig, pages_per_sequence
from nmoe_backend.findings import Finding, fail, fail_from, ok, warn
from nmoe_backend.types import ConfigError

_MIN_DRIVER: Mapping[int, int] = {12: 525, 13: 580}  # CUDA's major version -> oldest driver branch that runs it
_KERNELS_CAPABILITY = (9, 0)  # sm_90a code runs there and nowhere else, newer GPUs included
_MIN_CAPABILITY = (9, 0)  # of plain torch: nothing older was tried
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One device as torch sees it."""

    name: str
    capability: tuple[int, int]
    free: int  # bytes
    total: int  # bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuFacts:
    """What `measure` found."""

    driver: str | None  # "580.65.06"; None: no driver is loaded
    cuda_build: str | None  # the CUDA that torch was built for, "13.0"; None: torch is a CPU build, or absent
    num_gpus: int = 0  # of the machine
    gpus: Mapping[int, Gpu] = field(default_factory=dict)  # those that were asked for and exist, by ordinal
    no_peer_access: tuple[tuple[int, int], ...] = ()  # pairs (from, to) of them that cannot reach each other


def measure(ordinals: Iterable[int]) -> GpuFacts:
    """Ask the driver and torch about these GPUs. Leaves a CUDA context on each, until the process ends."""
    driver = driver_version(_DRIVER_FILE.read_text()) if _DRIVER_FILE.exists() else None
    try:
        import torch
    except ImportError:
        return GpuFacts(driver=driver, cuda_build=None)
    cuda_build: str | None = torch.version.cuda
    if cuda_build is None or not torch.cuda.is_available():
        return GpuFacts(driver=driver, cuda_build=cuda_build)
    num_gpus = torch.cuda.device_count()
    present = sorted({ordinal for ordinal in ordinals if ordinal < num_gpus})
    gpus = {}
    for index in present:
        free, total = torch.cuda.mem_get_info(index)
        capability = torch.cuda.get_device_capability(index)
        gpus[index] = Gpu(name=torch.cuda.get_device_name(index), capability=capability, free=free, total=total)
    pairs = [(a, b) for a in present for b in present if a != b]
    blocked = tuple(pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair))
    return GpuFacts(driver=driver, cuda_build=cuda_build, num_gpus=num_gpus, gpus=gpus, no_peer_access=blocked)


def measure_apart(ordinals: Iterable[int]) -> GpuFacts:
    """`measure` in a process that ends: `nmoe serve` stays, and its contexts would keep 0.5 GB of each GPU."""
    command = [sys.executable, "-m", __name__, *map(str, ordinals)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise ConfigError(
            f"the GPUs cannot be asked: {reason}. Check the driver with nvidia-smi, and torch's CUDA build."
        )
    found = json.loads(process.stdout.splitlines()[-1])
    gpus = {int(index): Gpu(**{**gpu, "capability": tuple(gpu["capability"])}) for index, gpu in found["gpus"].items()}
    return GpuFacts(**{**found, "gpus": gpus, "no_peer_access": tuple(map(tuple, found["no_peer_access"]))})


def driver_version(text: str) -> str | None:
    """`NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build` gives `580.65.06`."""
    match = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
    return match.group(1) if match else None


def gpu_ordinals(config: ServeConfig) -> list[int]:
    """Every GPU that a replica names."""
    return sorted({gpu for replica in config.replicas for gpu in replica.gpus})


def require_machine(config: ServeConfig) -> None:
    """Raise a ConfigError with everything that keeps this config from running here. Allocates nothing."""
    dims = memory.model_dims(config)
    if config.device == "cuda":
        settings = environ.cuda_settings()  # `nmoe serve` has set them, a bare tritonserver has not
        for name, value in (settings | environ.kernel_cache(config.torch_extensions_dir)).items():
            environ.export(name, value)
        findings = check_gpus(config, dims, measure(gpu_ordinals(config)))
    else:
        findings = check_host_memory(config, dims, memory.host_memory_bytes())
    failed = [f"{finding.message}. {finding.remedy}" for finding in [*check_roles(config), *findings] if finding.fails]
    if failed:
        raise ConfigError("\n".join(failed))


def check_roles(config: ServeConfig) -> list[Finding]:
    """Prefill and decode in replicas of their own are not built yet."""
    roles = sorted({replica.role for replica in config.replicas} - {"both"})
    if not roles:
        return []
    text = f"replicas have the role {' and '.join(roles)}; prefill and decode cannot be split yet"
    return [fail("roles", text, 'Use role = "both" in every [[replicas]].')]


def check_gpus(config: ServeConfig, dims: memory.ModelDims, facts: GpuFacts) -> list[Finding]:
    """Driver first; what depends on devices that are not there is not judged."""
    findings = [check_driver(facts)]
    if not facts.num_gpus:
        remedy = (
            'Run on a machine with NVIDIA GPUs (in a container: --gpus all), or set device = "cpu" for a small model.'
            if facts.cuda_build is not None
            else "Install the gpu lock (pip install -r requirements/gpu.lock): this torch is a CPU build."
        )
        return [*findings, fail("gpus", 'device = "cuda", and torch sees no GPU', remedy)]
    count = check_count(config, facts)
    findings.append(count)
    if count.fails:
        return findings
    fit = [check_capability(config, dims, facts), check_peers(config, facts)]
    return [*findings, *fit, *check_gpu_memory(config, dims, facts)]


def check_cuda_settings(environment: Mapping[str, str] | None = None) -> Finding:
    """No variable stands in the way of ranks that write to each other's memory."""
    try:
        return ok("cuda_settings", ", ".join("=".join(item) for item in environ.cuda_settings(environment).items()))
    except ConfigError as error:
        return fail_from("cuda_settings", error)


def check_driver(facts: GpuFacts) -> Finding:
    """A driver is loaded, and new enough for torch's CUDA."""
    if facts.driver is None and facts.num_gpus:  # a sandbox that hides /proc/driver
        return warn(
            "driver", "torch sees GPUs, but not the driver's version", "Compare nvidia-smi's with torch's CUDA."
        )
    if facts.driver is None:
        return fail("driver", "no NVIDIA driver is loaded", "Install the NVIDIA driver; in a container: --gpus all.")
    needed = _MIN_DRIVER.get(int(facts.cuda_build.split(".")[0])) if facts.cuda_build else None
    if needed is not None and int(facts.driver.split(".")[0]) < needed:
        text = f"NVIDIA driver {facts.driver}, torch's CUDA {facts.cuda_build} needs >= {needed}"
        return fail("driver", text, f"Update the NVIDIA driver to branch {needed} or newer.")
    return ok("driver", f"{facts.driver}, CUDA {facts.cuda_build}")


def check_count(config: ServeConfig, facts: GpuFacts) -> Finding:
    """Every ordinal that the replicas name exists."""
    wanted = [gpu for replica in config.replicas for gpu in replica.gpus]
    absent = [gpu for gpu in wanted if gpu not in facts.gpus]
    if absent:
        text = f"replicas name gpus {absent}, the machine has {facts.num_gpus} (0..{facts.num_gpus - 1})"
        return fail("gpus", text, "Name existing gpus in [[replicas]], or unset CUDA_VISIBLE_DEVICES.")
    virtual = f", {len(wanted)} ranks" if len(set(wanted)) < len(wanted) else ""
    return ok("gpus", f"{len(set(wanted))} of {facts.num_gpus}: {facts.gpus[wanted[0]].name}{virtual}")


def check_capability(config: ServeConfig, dims: memory.ModelDims, facts: GpuFacts) -> Finding:
    """The kernels are Hopper's own; models that they do not fit run in plain torch."""
    found = {gpu: facts.gpus[gpu].capability for gpu in gpu_ordinals(config)}
    kernels = memory.runs_kernels(config, dims)
    bad = sorted(gpu for gpu, it in found.items() if (it != _KERNELS_CAPABILITY if kernels else it < _MIN_CAPABILITY))
    shown = sorted({f"{major}.{minor}" for major, minor in found.values()})
    if bad:
        needed = "the kernels for this model need 9.0" if kernels else "needs >= 9.0"
        text = f"gpus {bad} ({facts.gpus[bad[0]].name}) have compute capability {' and '.join(shown)}, {needed}"
        return fail("capability", text, "Use Hopper GPUs (H100, H200).")
    return ok("capability", ", ".join(shown))


def check_peers(config: ServeConfig, facts: GpuFacts) -> Finding:
    """The ranks of a replica write into each other's memory."""
    blocked = [pair for replica in config.replicas for pair in facts.no_peer_access if set(pair) <= set(replica.gpus)]
    if blocked:
        remedy = "Check `nvidia-smi topo -p2p r`: needs NVLink or PCIe peer access (IOMMU/ACS off), and no MIG."
        return fail("peer_access", f"gpus cannot reach each other: {blocked[:4]}", remedy)
    return ok("peer_access", "every rank reaches its peers")


def check_gpu_memory(config: ServeConfig, dims: memory.ModelDims, facts: GpuFacts) -> list[Finding]:
    """The budget of each replica on its tightest GPU; memory that others hold is named."""
    findings = []
    for replica in config.replicas:
        gpus = [facts.gpus[index] for index in replica.gpus]
        available = min(memory.available_bytes(config, gpu.free, gpu.total) for gpu in gpus)
        if replica.is_virtual:
            available //= replica.world_size
        findings += check_budget(config, dims, replica, available)
        used = max(gpu.total - gpu.free for gpu in gpus)
        if used > 2 * memory.GB:
            remedy = "See `nvidia-smi` for the process and end it."
            findings.append(warn("gpu_in_use", f"{used / memory.GB:.1f} GB of a GPU are taken already", remedy))
    return findings


def check_host_memory(config: ServeConfig, dims: memory.ModelDims, total_available: tuple[int, int]) -> list[Finding]:
    """device = "cpu": all ranks of all replicas share the host's memory."""
    total, free = total_available
    num_ranks = sum(replica.world_size for replica in config.replicas)
    available = memory.available_bytes(config, free, total) // num_ranks
    return [finding for replica in config.replicas for finding in check_budget(config, dims, replica, available)]


def check_budget(config: ServeConfig, dims: memory.ModelDims, replica: ReplicaConfig, available: int) -> list[Finding]:
    """The memory of one rank in GB, and how many sequences its KV pages hold at 2k, 8k and max_seq_len."""
    name = f"memory[{replica.replica_id}]"
    try:
        num_pages = memory.resolve_num_pages(config, dims, replica, available=available, loaded=False)
    except ConfigError as error:
        return [fail_from(name, error)]
    budget = memory.memory_budget(config, dims, replica, num_pages)
    text = f"{budget.describe()}, available {available / memory.GB:.2f} GB"
    if budget.total > available:
        over = (budget.total - available) / memory.GB
        remedy = f"Free {over:.2f} GB a rank, lower num_pages (0 sizes it), max_batch_size or max_prefill_tokens."
        return [fail(name, text, remedy)]
    return [ok(name, text), check_capacity(config, replica, num_pages)]


def check_capacity(config: ServeConfig, replica: ReplicaConfig, num_pages: int) -> Finding:
    """At least one sequence of max_seq_len must fit a rank."""
    name = f"kv_capacity[{replica.replica_id}]"
    lengths = sorted({length for length in (2048, 8192) if length < config.max_seq_len} | {config.max_seq_len})
    counts = [f"{memory.sequences_that_fit(config, num_pages, length)} x {length}" for length in lengths]
    text = f"{num_pages} pages of {config.kv_layout.page_size} tokens a rank hold {' or '.join(counts)} tokens"
    if memory.sequences_that_fit(config, num_pages, config.max_seq_len) < 1:
        return fail(name, text, f"Raise num_pages to >= {pages_per_sequence(config)} or lower max_seq_len.")
    return ok(name, text)


def main(argv: Sequence[str]) -> None:
    """What `measure_apart` starts: the facts as one line of JSON."""
    print(json.dumps(asdict(measure(map(int, argv)))))


if __name__ == "__main__":
    main(sys.argv[1:])
