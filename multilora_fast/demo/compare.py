"""A training step of naive MultiLoRA, PEFT LoRA of rank n·r and ours, on the same weights and batch."""

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from multilora_fast.benchmark.timing import Timed, interleaved
from multilora_fast.layers.fuse import fuse
from multilora_fast.memory import peak_bytes, saved_bytes
from multilora_fast.memory.methods import LORA, REFERENCE, adapt, draw_scales
from multilora_fast.models import shallow_copy, target_linears

NAIVE, OURS = "naive MultiLoRA", "multilora-fast"  # names of the reference loop and of its fused form


@dataclass(frozen=True)
class Cost:
    """Cost of one method's training step: bytes saved for backward, peak bytes, median seconds."""

    method: str
    trainable: int
    saved: int
    peak: int
    seconds: float


def build_methods(
    base: nn.Module, target_modules: Sequence[str], *, r: int, lora_num: int, lora_alpha: float, lora_dropout: float
) -> dict[str, nn.Module]:
    """The three models on the weights of ``base``, which is unchanged. Adapters have the base's dtype.

    The two MultiLoRA models hold equal branches with non-zero scales. PEFT's LoRA is scaled by the branches' c.
    """
    targets = target_linears(base, target_modules)
    branches: dict[str, Any] = {"r": r, "lora_num": lora_num, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
    naive = adapt(shallow_copy(base), REFERENCE, targets, **branches)
    draw_scales(naive)
    ours = copy.deepcopy(naive, memo={id(p): p for p in naive.parameters() if not p.requires_grad})
    fuse(ours)
    peft = adapt(shallow_copy(base), LORA, targets, **branches, task_type="CAUSAL_LM")
    return {NAIVE: naive, LORA: peft, OURS: ours}


def compare(methods: dict[str, nn.Module], batch: dict[str, Tensor], *, rounds: int, progress: tqdm) -> list[Cost]:
    """Measure a step (forward, backward, AdamW) of every method on ``batch``: one to warm up, one for each kind of
    memory, and ``rounds`` interleaved.

    Raises:
        RuntimeError: naive and ours, which hold equal parameters, differ in the loss.
    """
    device = batch["input_ids"].device
    naive, ours = (_loss(methods[name].eval(), batch) for name in (NAIVE, OURS))
    if abs(naive - ours) > 0.02 * abs(naive):
        raise RuntimeError(f"the fused model's loss is {ours:.4f} where the reference's is {naive:.4f}")

    steps = {name: _stepper(model.train(), batch) for name, model in methods.items()}
    saved, peak = {}, {}
    for name, model in methods.items():
        steps[name]()
        progress.update()
        with saved_bytes(exclude=(*model.parameters(), *model.buffers(), *batch.values())) as kept:
            model(**batch)
        saved[name] = kept.total
        del kept
        peak[name] = peak_bytes(steps[name], device)
        progress.update()
    timed = {name: Timed(progress.update, step) for name, step in steps.items()}
    seconds = interleaved(timed, range(rounds))
    trainable = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in methods.items()}
    return [Cost(name, trainable[name], saved[name], peak[name], statistics.median(seconds[name])) for name in methods]


@torch.no_grad()
def _loss(model: nn.Module, batch: dict[str, Tensor]) -> float:
    return model(**batch).loss.item()


def _stepper(model: nn.Module, batch: dict[str, Tensor]) -> Callable[..., None]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    def step(_: object = None) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
