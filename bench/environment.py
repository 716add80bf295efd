"""The conditions of a measurement, for the JSON it is kept in."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()


def conditions() -> dict[str, object]:
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "triton", "transformers", "peft", "numpy")},
        "cuda": torch.version.cuda,
        "commit": commit(),
    }


def commit() -> str:
    """The checkout's commit, marked where tracked files differ from it."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def slug() -> str:
    """The device's name as a folder's."""
    return "-".join(device_name().split())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(slug())
