"""What the devices of this machine are to several processes that share them."""

from __future__ import annotations

import os

from featstore.errors import invalid


def local_device(device: str) -> str:
    """Turn "auto" into the best device here, and check any other."""
    if device == "cpu":
        return device  # without the import of what knows GPUs
    from featstore.backbones import resolve_device

    return resolve_device(device)


def n_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_of_threads(n_workers: int) -> int:
    """Give the threads that each of some workers computes with.

    It is the share of the cores, or what ``OMP_NUM_THREADS`` says if that is less.
    """
    share = max(1, n_cores() // n_workers)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(asked) or share) if asked.isdecimal() else share


def environments(n_workers: int, device: str) -> list[dict[str, str]]:
    """Give the environment of each worker: on a machine with GPUs, a GPU of its own."""
    if not device.startswith("cuda"):
        return [{} for _ in range(n_workers)]
    if device != "cuda":
        hint = "Choose GPUs with CUDA_VISIBLE_DEVICES."
        raise invalid("device", device, "cuda, without a number, with --workers", hint=hint)
    gpus = visible_gpus()
    if n_workers > len(gpus):
        hint = "Each worker has a GPU of its own; --device cpu takes the processor."
        raise invalid("workers", n_workers, f"at most the {len(gpus)} GPUs here", hint=hint)
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:n_workers]]


def visible_gpus() -> list[str]:
    """Name the GPUs that this process sees, as ``CUDA_VISIBLE_DEVICES`` does."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = [name.strip() for name in named.split(",") if name.strip()]
    return gpus or [str(number) for number in range(torch.cuda.device_count())]
