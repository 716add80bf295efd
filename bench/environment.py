"""The conditions of a measurement, as stored in its JSON."""

import os
import platform
import subprocess

import torch

from multilora_fast.devices import choose_device, hardware_name, installed_version


def device_name() -> str:
    return hardware_name(choose_device("auto"))


def conditions() -> dict[str, object]:
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in ("torch", "triton", "transformers", "peft", "numpy")},
        "cuda": torch.version.cuda,
        "commit": commit(),
    }


def commit() -> str:
    """COMMIT from the environment if set, else the commit of the checkout, marked dirty if tracked files differ."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def slug() -> str:
    """The device's name as a folder name."""
    return "-".join(device_name().split())


if __name__ == "__main__":
    print(slug())
