"""A Trainer that counts tokens, evaluates per token, stops on divergence and logs per task."""

import math
import sys
import time
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback

from multilora_fast.training.checkpoint import is_first, last_checkpoint
from multilora_fast.training.data import IGNORED


class CountingTrainer(Trainer, TrainerCallback):
    """Counts training tokens without padding, on the device: the Trainer's own count synchronizes every batch. Stops at
    the first non-finite loss or weight, before that step is logged or saved: it is a callback of its own."""

    tokens: Tensor | int = 0
    losses: Tensor | float = 0.0  # since the last step

    def training_step(self, model, inputs, *args, **kwargs):
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))  # bins have no padding
        self.tokens = self.tokens + real.sum().to(self.args.device)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses = self.losses + loss
        return loss

    def all_tokens(self) -> int:
        """The count over all processes. A collective: every process must call it."""
        return int(self.accelerator.gather(self.tokens).sum())

    def on_step_end(self, *args, **kwargs) -> None:
        self.check_step()

    def check_step(self) -> None:
        """Raise ValueError in every process if any of them has a non-finite loss or weight."""
        weights = [p.detach() for p in self.model.parameters() if p.requires_grad]
        local = [p.to_local() if hasattr(p, "to_local") else p for p in weights]  # FSDP's shards
        total = nn.utils.get_total_norm(local, norm_type=1.0).to(self.args.device) + self.losses
        self.losses = 0.0
        if not self.accelerator.gather(total).isfinite().all():
            self._diverged("its loss or the adapter is")

    def log(self, logs, *args, **kwargs):
        for name in (name for name, value in logs.items() if not math.isfinite(value)):
            self._diverged(f"{name} is")
        super().log(logs, *args, **kwargs)

    def _diverged(self, what: str) -> None:
        last = last_checkpoint(Path(self.args.output_dir))
        kept = f"{last.name} is kept" if last else "there was no checkpoint yet"
        raise ValueError(
            f"The run has diverged: at step {self.state.global_step} of {self.state.max_steps} {what} not finite; "
            f"{kept}. Start it anew with a lower --learning-rate."
        )


class Bars(ProgressCallback):
    """The Trainer's progress bars, without its printed logs."""

    def on_log(self, *args, **kwargs):
        pass


class TaskLog(TrainerCallback):
    """Prints the heading, the logged losses and, at an evaluation, a line per task. Sums the evaluation time."""

    def __init__(self, tasks: Collection[str], heading: str, items: str = "rows"):
        self.tasks, self.heading, self.items = tasks, heading, items
        self.evaluating = 0.0  # seconds
        self.evaluated_at: int | None = None  # step
        self.said = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.said = time.monotonic()
        size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        say(f"{self.heading}; {state.max_steps} steps of {size} {self.items}.")

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() - self.said > 60:  # steps take long
            self.said = time.monotonic()
            say(_step(state))

    def on_log(self, args, state, control, logs, **kwargs):
        self.said, step = time.monotonic(), _step(state)
        if "loss" in logs:
            say(f"{step}  loss {float(logs['loss']):.4f}")
        for task in self.tasks:
            if f"eval_{task}_loss" in logs:
                self.evaluated_at = state.global_step
                self.evaluating += logs[f"eval_{task}_runtime"]
                loss, accuracy = logs[f"eval_{task}_loss"], logs[f"eval_{task}_accuracy"]
                name = f"{task:<{max(map(len, self.tasks))}}"
                say(f"{step}  {name}  held-out loss {loss:.4f}  accuracy {accuracy:.4f}")


def _step(state) -> str:
    return f"step {state.global_step:>{len(str(state.max_steps))}} of {state.max_steps}"


def by_row(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, T, vocabulary) logits as (B, 3): each row's summed token loss, correctly predicted tokens and labelled
    tokens."""
    rows = []
    for scores, wanted in zip(logits[:, :-1], labels[:, 1:], strict=True):
        scores, wanted = scores[wanted != IGNORED].double(), wanted[wanted != IGNORED]
        losses = nn.functional.cross_entropy(scores, wanted, reduction="sum")
        rows.append(torch.stack([losses, (scores.argmax(-1) == wanted).sum(), losses.new_tensor(len(wanted))]))
    return torch.stack(rows)


def by_token(prediction) -> dict[str, float]:
    """Means over all labelled tokens, independent of batches and processes. The loss replaces the Trainer's."""
    loss, hits, tokens = prediction.predictions.sum(0)
    return {"loss": float(loss / tokens), "accuracy": float(hits / tokens)}


def say(line: str) -> None:
    """Print on rank 0, above the progress bars."""
    if is_first():
        tqdm.write(line)
        sys.stdout.flush()
