"""Device and dtype of a command, and the environment that its results depend on."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda, not {name!r}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA GPU on this machine.")
    return torch.device("cuda", 0) if name != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device supports it natively, else float32."""
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"--dtype must be auto, float32 or bfloat16, not {name!r}.")
        return DTYPES[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has = torch.cpu.get_capabilities()
        native = has.get("avx512_bf16", False) or has.get("amx_bf16", False)
    return torch.bfloat16 if native else torch.float32


def hardware_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Device, hardware, threads and versions; None for a package that is not installed."""
    names = ("multilora-fast", "torch", "transformers", "peft", "triton")
    return {
        "device": device.type,
        "hardware": hardware_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in names},
    }
