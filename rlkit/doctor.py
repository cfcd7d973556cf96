"""What this machine offers, and whether it computes the same twice."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch

from rlkit import rendering
from rlkit._version import __version__
from rlkit.compilation import compiler, compiler_name
from rlkit.products import Library, onednn_products, preferred

PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "stable-baselines3", "safetensors", "tensorboard")
EXTRAS = {
    "wandb": "wandb", "onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "sbx-rl": "bench", "pytest": "dev",
}  # fmt: skip
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16", "svebf16")
"""What /proc/cpuinfo calls units that multiply bf16 numbers, on x86 and on ARM."""
SIDE = 512  # of the matrices whose product is timed
SECONDS = 0.1  # of timing, for each kind of product


def report() -> Iterator[str]:
    """Lines about versions, processor, devices, rendering, compilers and optional packages."""
    yield f"rlkit {__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield "packages: " + ", ".join(f"{name} {_version(name) or 'absent'}" for name in PACKAGES)
    capability, memory = torch.backends.cpu.get_cpu_capability(), psutil.virtual_memory()
    yield f"processor: {os.cpu_count()} cores, {capability}, float32 products by {preferred()}"
    yield threads()
    yield bf16()
    yield f"memory: {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            yield f"cuda:{i}: {properties.name}, {properties.total_memory / 1e9:.0f} GB"
    else:
        yield "cuda: none"
    yield f"rendering: {rendering.describe()}"
    yield cxx()
    for package, extra in EXTRAS.items():
        found = _version(package)
        hint = f'absent; pip install "rlkit-trainers[{extra}]"'
        yield f"optional {package}: {found or hint}"


def threads() -> str:
    """A line about how many threads PyTorch uses, and why."""
    chosen = os.environ.get("OMP_NUM_THREADS")
    why = "OMP_NUM_THREADS is not set" if chosen is None else f"OMP_NUM_THREADS={chosen}"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"threads: PyTorch uses {torch.get_num_threads()}, {usable} cores are usable ({why}); `--threads N` sets it"


def bf16() -> str:
    """A line about the processor's bf16 units, the measured rates of products, and which `--precision` is faster."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    found = [flag for flag in BF16_FLAGS if flag in flags]
    units = ", ".join(found) if found else "no units for it" if flags else "units unknown"
    single, half = rate(torch.float32, preferred()), rate(torch.bfloat16, "blas")
    gain = f"`--precision bf16` computes large products {half / single:.1f} times as fast"
    advice = gain if half > 1.2 * single else "`--precision float32` is as fast or faster"
    return f"bf16: {units}; products at float32 {single:.0f}, bf16 {half:.0f} GFLOP/s: {advice}"


def rate(dtype: torch.dtype, library: Library) -> float:
    """GFLOP/s of the fastest of several matrix products on the CPU; takes about `SECONDS`."""
    a, b = (torch.ones(SIDE, SIDE, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + SECONDS
    with onednn_products() if library == "onednn" else nullcontext():
        torch.mm(a, b)  # the first one prepares
        while time.perf_counter() < end or best == float("inf"):
            start = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - start)
    return 2 * SIDE**3 / best / 1e9


def cxx() -> str:
    """A line about the C++ compiler that torch.compile would use on a CPU."""
    return f"compiler: {compiler() or f'no {compiler_name()}, which `--compile on` needs on a CPU'}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def determinism(steps: int = 300) -> tuple[bool, str]:
    """Train a tiny SAC twice: whether all of their state agrees bit for bit, and a line that says so."""
    import tempfile
    from pathlib import Path

    from rlkit import checkpoint, registry

    hashes = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(2):
            cls = registry.get("sac")
            fields = {"policy_kwargs": {"net_arch": [32, 32]}, "batch_size": 32, "buffer_size": 1000}
            agent = cls(config=cls.make_config({"env": "Pendulum-v1", **fields}))
            path = agent.learn(steps).save(Path(folder) / str(i))
            hashes.append(checkpoint.content_hash(path))
    same = hashes[0] == hashes[1]
    verdict = "the same, bit for bit" if same else "DIFFERENT: exact resumption cannot be promised on this machine"
    return same, f"determinism: two runs of {steps} SAC steps are {verdict} ({hashes[0][:12]}, {hashes[1][:12]})"
