import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"', (here / "multilora_fast/__init__.py").read_text(), re.M).group(1)

rooms = ["kernels", "ops", "layers", "adapters", "peft", "memory", "benchmark", "training", "demo"]
rooms += ["integrations", "cli", "startup"]

train = ["accelerate>=1.1", "bitsandbytes>=0.49; sys_platform == 'linux'"]
data = ["datasets>=4"]  # which run no code of a data set
demo = ["accelerate>=1.1", "gguf>=0.10", "datasets>=3", "matplotlib>=3.8"]
bench = ["pytest>=8", "pytest-benchmark>=5", "matplotlib>=3.8"]
build = ["build>=1.2", "setuptools>=77", "wheel"]
lint = ["ruff>=0.9", "mypy>=1.15", "pre-commit>=4"]
dev = [*bench, *train, *data, "trl>=1.16; sys_platform == 'linux'", "hypothesis>=6", *lint, *build]

architectures = ["trl>=1.16", "datasets>=3", "diffusers>=0.36", "lightning>=2.5", "sentence-transformers>=5"]

setup(
    name="multilora-fast",
    version=version,
    description="MultiLoRA (parallel LoRA branches with learned scales) at the cost of LoRA, in Triton and PyTorch",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["multilora_fast", *(f"multilora_fast.{room}" for room in rooms)],
    package_data={"multilora_fast": ["py.typed"], "multilora_fast.kernels": ["README.md"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "triton>=3.6; sys_platform == 'linux'",
        "transformers>=5.17",
        "peft>=0.19",
        "safetensors>=0.4",
        "typer>=0.12",
        "tqdm>=4.60",
    ],
    extras_require={
        "demo": demo,
        "train": train,
        "data": data,
        "bench": bench,
        "dev": dev,
        "architectures": architectures,
        "all": [*demo, *dev],
    },
    entry_points={"console_scripts": ["multilora-fast = multilora_fast.cli:main"]},
)
