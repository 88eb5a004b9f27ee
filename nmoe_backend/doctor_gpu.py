"""The doctor's checks of the GPUs. `measure` asks torch and the driver once; the checks judge what it returned."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nmoe_backend import memory
from nmoe_backend.config import ServeConfig
from nmoe_backend.doctor_host import check_budget
from nmoe_backend.findings import Finding, fail, ok, warn

_MIN_DRIVER: Mapping[int, int] = {12: 525, 13: 580}  # CUDA's major version -> oldest driver branch that runs it
_MIN_CAPABILITY = (9, 0)  # fp8 tensor cores as the kernels use them
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
    gpus: tuple[Gpu, ...] = ()
    no_peer_access: tuple[tuple[int, int], ...] = ()  # pairs (from, to) that cannot reach each other


def measure() -> GpuFacts:
    """Ask the driver and torch. Initialises CUDA; allocates nothing."""
    driver = driver_version(_DRIVER_FILE.read_text()) if _DRIVER_FILE.exists() else None
    try:
        import torch
    except ImportError:
        return GpuFacts(driver=driver, cuda_build=None)
    cuda_build: str | None = torch.version.cuda
    if cuda_build is None or not torch.cuda.is_available():
        return GpuFacts(driver=driver, cuda_build=cuda_build)
    count = torch.cuda.device_count()
    gpus = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        capability = torch.cuda.get_device_capability(index)
        gpus.append(Gpu(name=torch.cuda.get_device_name(index), capability=capability, free=free, total=total))
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    blocked = tuple(pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair))
    return GpuFacts(driver=driver, cuda_build=cuda_build, gpus=tuple(gpus), no_peer_access=blocked)


def driver_version(text: str) -> str | None:
    """`NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build` gives `580.65.06`."""
    match = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
    return match.group(1) if match else None


def check_all(config: ServeConfig, dims: memory.ModelDims, facts: GpuFacts) -> list[Finding]:
    """Driver first; what depends on devices that are not there is not judged."""
    findings = [check_driver(facts)]
    if not facts.gpus:
        remedy = (
            'Run on a machine with NVIDIA GPUs (in a container: --gpus all), or set device = "cpu" for a small model.'
            if facts.cuda_build is not None
            else "Install the gpu lock (pip install -r requirements/gpu.lock): this torch is a CPU build."
        )
        return [*findings, fail("gpus", 'device = "cuda", and torch sees no GPU', remedy)]
    count = check_count(config, facts)
    findings.append(count)
    if count.status == "fail":
        return findings
    return [*findings, check_capability(config, facts), check_peers(config, facts), *check_memory(config, dims, facts)]


def check_driver(facts: GpuFacts) -> Finding:
    """A driver is loaded, and new enough for torch's CUDA."""
    if facts.driver is None:
        return fail("driver", "no NVIDIA driver is loaded", "Install the NVIDIA driver; in a container: --gpus all.")
    needed = _MIN_DRIVER.get(int(facts.cuda_build.split(".")[0])) if facts.cuda_build else None
    if needed is not None and int(facts.driver.split(".")[0]) < needed:
        text = f"{facts.driver}, torch's CUDA {facts.cuda_build} needs >= {needed}"
        return fail("driver", text, f"Update the NVIDIA driver to branch {needed} or newer.")
    return ok("driver", f"{facts.driver}, CUDA {facts.cuda_build}")


def check_count(config: ServeConfig, facts: GpuFacts) -> Finding:
    """Every ordinal that the replicas name exists."""
    wanted = [gpu for replica in config.replicas for gpu in replica.gpus]
    absent = [gpu for gpu in wanted if gpu >= len(facts.gpus)]
    if absent:
        text = f"replicas name gpus {absent}, the machine has {len(facts.gpus)} (0..{len(facts.gpus) - 1})"
        return fail("gpus", text, "Name existing gpus in [[replicas]], or unset CUDA_VISIBLE_DEVICES.")
    virtual = f", {len(wanted)} ranks" if len(set(wanted)) < len(wanted) else ""
    return ok("gpus", f"{len(set(wanted))} of {len(facts.gpus)}: {facts.gpus[wanted[0]].name}{virtual}")


def check_capability(config: ServeConfig, facts: GpuFacts) -> Finding:
    """fp8 needs Hopper or newer."""
    found = {gpu: facts.gpus[gpu].capability for replica in config.replicas for gpu in replica.gpus}
    old = {gpu: capability for gpu, capability in found.items() if capability < _MIN_CAPABILITY}
    if old:
        text = f"gpus {sorted(old)} have compute capability {min(old.values())}, needs >= {_MIN_CAPABILITY}"
        return fail("capability", text, "Use Hopper (H100, H200) or newer GPUs.")
    return ok("capability", ", ".join(sorted({f"{major}.{minor}" for major, minor in found.values()})))


def check_peers(config: ServeConfig, facts: GpuFacts) -> Finding:
    """The ranks of a replica write into each other's memory."""
    blocked = [pair for replica in config.replicas for pair in facts.no_peer_access if set(pair) <= set(replica.gpus)]
    if blocked:
        remedy = "Check `nvidia-smi topo -p2p r`: needs NVLink or PCIe peer access (IOMMU/ACS off), and no MIG."
        return fail("peer_access", f"gpus cannot reach each other: {blocked[:4]}", remedy)
    return ok("peer_access", "every rank reaches its peers")


def check_memory(config: ServeConfig, dims: memory.ModelDims, facts: GpuFacts) -> list[Finding]:
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
