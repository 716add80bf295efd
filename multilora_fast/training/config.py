"""Settings of a training run and their validation."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from multilora_fast.adapters.files import RECORD
from multilora_fast.devices import choose_dtype
from multilora_fast.files import UNFINISHED, check_folder
from multilora_fast.training.data import text_of
from multilora_fast.validation import check_alpha, check_hyperparameters

# May change on resume. Files may move: their rows are hashed.
FREE = {"output", "resume", "epochs", "max_steps", "save_steps", "report_to", "files", "named", "eval_files"}


@dataclass(frozen=True)
class TrainSettings:
    model: str
    output: Path
    files: tuple[Path | str, ...] = ()
    named: dict[str, Path | str] = field(default_factory=dict)
    eval_files: dict[str, Path | str] = field(default_factory=dict)
    chat_template: Path | None = None
    learn: str = "answers"
    dtype: str = "auto"
    quantization: str | None = None
    gradient_checkpointing: bool = False
    resume: bool = False
    lora_num: int = 3
    r: int = 32
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    scaling: str = "vector"
    target_modules: tuple[str, ...] = ("all-linear",)
    exclude_modules: tuple[str, ...] | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float = 1e-3
    batch_size: int = 4
    gradient_accumulation: int = 1
    max_length: int = 1024
    packing: bool = False
    liger: bool = False
    report_to: tuple[str, ...] | None = None
    eval_fraction: float = 0.05
    save_steps: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError for a value out of range, missing data, a missing package, or an output directory that must
        not be overwritten."""
        if not self.files and not self.named:
            raise ValueError("no data was given: name JSONL files, or use --task NAME=FILE.")
        check_hyperparameters(r=self.r, lora_num=self.lora_num, lora_dropout=self.lora_dropout, scaling=self.scaling)
        check_alpha(self.lora_alpha)
        choose_dtype(self.dtype, torch.device("cpu"))
        rules = {
            "quantization": (self.quantization in (None, "4bit"), "4bit"),
            "learn": (self.learn in ("answers", "all"), "answers or all"),
            "max_length": (self.max_length >= 2, "at least 2"),
            "seed": (0 <= self.seed < 2**32, "from 0 to 4294967295"),
            "eval_fraction": (0.0 <= self.eval_fraction < 1.0, "in [0, 1)"),
        }
        for name in ("epochs", "max_steps", "learning_rate", "batch_size", "gradient_accumulation", "save_steps"):
            value = getattr(self, name)
            rules[name] = value is None or 0 < value < float("inf"), "more than 0"
        for name, (holds, wanted) in rules.items():
            if not holds:
                raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, not {getattr(self, name)!r}.")
        if not self.target_modules:
            raise ValueError("--target-modules must name a module or be all-linear.")
        packages = {"accelerate": "train"} | ({"bitsandbytes": "--quantization 4bit"} if self.quantization else {})
        packages |= {"liger-kernel": "--liger"} if self.liger else {}
        for package, what in packages.items():
            if find_spec(package.replace("-", "_")) is None:
                raise ValueError(f"{what} needs {package}: run pip install {package}")
        self.template()
        self._check_output()

    def _check_output(self) -> None:
        folder = self.output
        check_folder("--output", folder)
        there = [path for path in folder.iterdir() if not path.name.startswith(UNFINISHED)] if folder.is_dir() else []
        begun = [path.name for path in there] == [RECORD] and _record_in(folder)  # interrupted before a checkpoint
        if there and not begun and not self.resume:
            raise ValueError(f"--output {folder} is not empty: give another directory, or --resume to go on in it.")
        if self.resume and not (folder / RECORD).is_file():
            raise ValueError(f"--resume: {folder} holds no earlier run of multilora-fast train.")

    def template(self) -> str | None:
        """The text of ``chat_template``. Raises ValueError if it cannot be read."""
        path = self.chat_template
        return None if path is None else text_of(path, f"--chat-template {path}")

    def record(self, rows: Iterable[object]) -> dict:
        """The settings that a resumed run must share, as JSON."""
        fixed = {key: value for key, value in asdict(self).items() if key not in FREE}
        template = self.template()
        fixed["chat_template"] = template and hashlib.sha256(template.encode()).hexdigest()
        data = hashlib.sha256("\n".join(map(repr, rows)).encode()).hexdigest()
        return json.loads(json.dumps({**fixed, "data": data}))


def _record_in(folder: Path) -> dict | None:
    """The record of an earlier run, or None if it is missing or damaged."""
    try:
        found = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"model", "lora_num", "data"} <= found.keys() else None


def check_same_run(folder: Path, record: dict) -> None:
    """Raise ValueError naming the first difference if the run in ``folder`` has another record."""
    earlier = _record_in(folder)
    if earlier is None:
        raise ValueError(f"--resume: {folder / RECORD} is damaged: it holds no settings of a run.")
    changed = [key for key in record if earlier.get(key) != record[key]]
    if "data" in changed:
        raise ValueError(f"--resume: the data is not that of the run in {folder}.")
    if changed:
        key = changed[0]
        raise ValueError(
            f"--resume: the run in {folder} had --{key.replace('_', '-')} {earlier.get(key)}, not {record[key]}."
        )
