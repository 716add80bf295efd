"""The output directory of a training run: atomic writes, so that a run can be killed at any time and resumed."""

import filecmp
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import TrainerState

from multilora_fast.adapters.files import CONFIG, RECORD, WEIGHTS, read_multilora
from multilora_fast.files import atomic_dir, atomic_file, made, remove_unfinished
from multilora_fast.training.config import TrainSettings

STATE = "trainer_state.json"  # the last file of a checkpoint to be written
_TO_RESUME = ("optimizer*", "scheduler*", "scaler*", "rng_state*")  # a checkpoint's files that are not published


def write_record(folder: Path, record: dict) -> None:
    """Write RECORD into ``folder``, which is created if missing. An error leaves the folder unchanged. Removes
    unfinished files of an earlier run."""
    remove_unfinished(folder)
    with made(folder), atomic_file(folder / RECORD) as unfinished:
        unfinished.write_text(json.dumps(record, indent=2) + "\n")


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint in ``folder``, or None. Skips a checkpoint whose write was interrupted.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    steps = {path: path.name.partition("-")[2] for path in folder.glob("checkpoint-*")}
    found = [path for path, step in steps.items() if step.isdecimal() and _is_complete(path)]
    last = max(found, key=lambda path: int(steps[path]), default=None)
    if last is None:
        return None
    try:
        read_multilora(last)
        for path in sorted(last.glob("*.pt*")):
            if not zipfile.is_zipfile(path):
                raise ValueError(f"{path} is damaged.")
    except ValueError as error:
        raise ValueError(f"--resume: {error} Delete {last} to go on from what was before it.") from error
    return last


def finish(checkpoint: Path, settings: TrainSettings) -> bool:
    """If the checkpoint completed the run, publish its adapter and return True. Rank 0 copies the adapter, the
    tokenizer and the state into the output directory, each file atomically.

    Raises:
        ValueError: they were published before; the Trainer would take one step too many.
    """
    state, folder = TrainerState.load_from_json(str(checkpoint / STATE)), settings.output
    done = state.epoch >= settings.epochs if settings.max_steps is None else state.global_step >= settings.max_steps
    if not done or not is_first():
        return done
    published = (folder / CONFIG).exists() and (folder / WEIGHTS).exists()
    if published and filecmp.cmp(checkpoint / WEIGHTS, folder / WEIGHTS, shallow=False):
        raise ValueError(
            f"--resume: the run has taken its {state.global_step} steps, and {checkpoint} holds its adapter: "
            "ask for more with --max-steps or --epochs."
        )
    remove_unfinished(folder)
    with atomic_dir(folder, last=CONFIG) as stage:
        shutil.copytree(checkpoint, stage, ignore=shutil.ignore_patterns(*_TO_RESUME), dirs_exist_ok=True)
    return True


def interruption(state: TrainerState, folder: Path) -> str:
    """The message for a run interrupted in this state."""
    last = last_checkpoint(folder)
    kept = ", before its first checkpoint." if last is None else f": {last.name} is kept, --resume goes on from it."
    return f"Interrupted at step {state.global_step} of {state.max_steps}{kept}"


def is_first() -> bool:
    """Whether this process is rank 0. Works before the process group is initialized."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def failures_named(folder: Path) -> Iterator[None]:
    """Convert safetensors' and torch.save's errors on a full disk to OSError, and a checkpoint that needs to run code
    to ValueError."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(f"--resume: the checkpoint in {folder} holds more than tensors.") from error
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise OSError(f"{folder} cannot be written: {reason}. --resume goes on from the last checkpoint.") from error


def _is_complete(checkpoint: Path) -> bool:
    try:
        TrainerState.load_from_json(str(checkpoint / STATE))
    except (OSError, ValueError, TypeError):
        return False
    return True
