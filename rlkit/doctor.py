"""What this machine offers, and whether it computes the same twice."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator

import psutil
import torch

from rlkit._version import __version__
from rlkit.products import preferred

PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "stable-baselines3", "safetensors", "tensorboard")
EXTRAS = {"wandb": "wandb", "sbx-rl": "bench", "pytest": "dev"}


def report() -> Iterator[str]:
    """Lines about versions, processor, devices and optional packages."""
    yield f"rlkit {__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield "packages: " + ", ".join(f"{name} {_version(name) or 'absent'}" for name in PACKAGES)
    capability, memory = torch.backends.cpu.get_cpu_capability(), psutil.virtual_memory()
    threads = f"{torch.get_num_threads()} PyTorch threads"
    yield f"processor: {os.cpu_count()} cores, {threads}, {capability}, float32 products by {preferred()}"
    yield f"memory: {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            yield f"cuda:{i}: {properties.name}, {properties.total_memory / 1e9:.0f} GB"
    else:
        yield "cuda: none"
    for package, extra in EXTRAS.items():
        found = _version(package)
        hint = f'absent; pip install "rlkit-trainers[{extra}]"'
        yield f"optional {package}: {found or hint}"


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
