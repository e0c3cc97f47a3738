"""What a backbone runs on, in words that tell two machines apart."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")


def describe_device(device: str) -> str:
    """Name a device: the GPU's name, or the processor's with its number of threads.

    Args:
        device: "cpu", "mps", "cuda" or "cuda:N".
    """
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    n_threads = torch.get_num_threads()
    text = f"{_processor()}, {n_threads} thread{'' if n_threads == 1 else 's'}"
    return text if device == "cpu" else f"{device} of {_processor()}"


def _processor() -> str:
    """Name the processor; Python itself often knows its architecture only."""
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
