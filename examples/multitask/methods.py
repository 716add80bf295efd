"""The methods of training one model on the mixture, all with float32 weights under autocast."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.multitask.batches import batches, tokens
from examples.multitask.plan import METHODS, Study
from examples.multitask.steps import Steps, side_stream
from multilora_fast import from_loras, fuse, unfuse
from multilora_fast.adapters import load_adapter
from multilora_fast.adapters.branches import collect
from multilora_fast.demo.scoring import Encoded
from multilora_fast.memory import peak_bytes
from multilora_fast.memory.methods import LORA, REFERENCE, adapt
from multilora_fast.models import LINEARS, target_linears


@dataclass
class Training:
    """Loss of every step, tokens read, seconds and steps replayed as a CUDA graph of a training."""

    losses: list[float]
    tokens: int
    seconds: float
    replayed: int

    def __add__(self, other: "Training") -> "Training":
        return Training(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class Float32Head(nn.Module):
    """An output layer outside of autocast: bfloat16 logits are too coarse to rank answers."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.linear(x.float())


def prepared(base: nn.Module) -> nn.Module:
    """Put the output layer of ``base`` outside of autocast, in place."""
    base.set_output_embeddings(Float32Head(base.get_output_embeddings()))
    return base


def fused_norms(base: nn.Module) -> nn.Module:
    """Put PyTorch's RMSNorm, one kernel, in place of those of ``base``, which are six; in place."""
    for name, module in list(base.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            norm.weight = module.weight
            base.set_submodule(name, norm)
    return base


def autocast(study: Study, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=study.dtype == "bfloat16")


def adapted(base: nn.Module, name: str, rank: int) -> nn.Module:
    """A copy of ``base`` in which exactly the parameters that the method ``name`` trains require a gradient."""
    method = METHODS[name]
    model = copy.deepcopy(base).requires_grad_(method.kind == "full")
    if method.kind == "lora":
        return adapt(model, LORA, target_linears(model, LINEARS), r=rank, lora_num=1, task_type="CAUSAL_LM")
    if method.kind == "multilora":
        adapt(model, REFERENCE, target_linears(model, LINEARS), r=rank // method.n, lora_num=method.n)
        for layer in collect(model).values():
            if method.scaling == "scalar":
                layer.lora_scaling = nn.Parameter(layer.lora_scaling.data[:, :1].clone())
            if method.start == "B":
                layer.lora_B.data.zero_()
                layer.lora_scaling.data.fill_(1.0)
        fuse(model)
    return model


def train(
    model: nn.Module, examples: Sequence[Encoded], study: Study, rate: float, *, graphs: bool = False
) -> Training:
    """One pass over ``examples`` in order: warm-up for a tenth of the steps, linear decay. ``graphs``, on CUDA, replays
    captured steps."""
    device = next(model.parameters()).device
    started = time.perf_counter()
    count = max(len(examples) // study.batch_size, 1)
    warmup = max(1, count // 10)
    examples = examples[: count * study.batch_size]
    parts = [examples[i : i + study.batch_size] for i in range(0, len(examples), study.batch_size)]
    with side_stream(device):
        steps = Steps(model, partial(autocast, study, device), graphs=graphs)
        losses = []
        for step, part in enumerate(tqdm(parts, desc="training", unit="step", disable=None, leave=False)):
            now = rate * min((step + 1) / warmup, (count - step) / max(count - warmup, 1))
            losses.append(steps(_on_device(part, study, device), now))
        found, replayed = torch.stack(losses).tolist(), steps.replayed
        del steps
    if graphs:
        torch.cuda.empty_cache()  # the memory of graphs serves nothing else
    return Training(found, tokens(examples), time.perf_counter() - started, replayed)


def _on_device(examples: Sequence[Encoded], study: Study, device: torch.device) -> list[dict[str, Tensor]]:
    """Copied from pinned memory on CUDA, so that the next step's batches are made while this one runs."""
    pinned = device.type == "cuda"
    return [
        {name: (t.pin_memory() if pinned else t).to(device, non_blocking=pinned) for name, t in batch.items()}
        for batch in batches(examples, study.micro_tokens, study.max_length)
    ]


def task_sum(
    base: nn.Module, examples: Sequence[Encoded], study: Study, rate: float, scratch: Path, *, graphs: bool = False
) -> tuple[nn.Module, Training]:
    """Task arithmetic: a LoRA per task, trained on its part of ``examples``, as the branches of one MultiLoRA model of
    the study's total rank. :func:`set_task_weight` sets the weight of the LoRAs."""
    tasks = list(dict.fromkeys(example.task for example in examples))
    done, folders = Training([], 0, 0.0, 0), []
    for task in tasks:
        model = adapted(base, "lora", max(study.total_rank // len(tasks), 1))
        done += train(model, [example for example in examples if example.task == task], study, rate, graphs=graphs)
        folders.append(scratch / task)
        model.save_pretrained(str(folders[-1]))
    model = copy.deepcopy(base).requires_grad_(False)
    load_adapter(model, from_loras(folders, scratch / "sum"))
    return model, done


def set_task_weight(model: nn.Module, weight: float) -> None:
    for layer in collect(model).values():
        layer.lora_scaling.data.fill_(weight)


def memory(model: nn.Module, examples: Sequence[Encoded], study: Study) -> dict[str, int]:
    """Counted bytes: the optimizer's state, and the peak of a step beyond weights and optimizer state; for MultiLoRA
    also the peak of the loop over branches. Takes steps with the model."""
    device = next(model.parameters()).device
    batch = _on_device(examples[: study.batch_size], study, device)
    steps = Steps(model, partial(autocast, study, device))

    def step() -> None:
        steps(batch, 1e-5)

    step()
    counted = {"step": peak_bytes(step, device)}
    tensors = [t for state in steps.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    counted["optimizer"] = sum(t.numel() * t.element_size() for t in tensors)
    if unfuse(model):
        counted["step_as_loop"] = peak_bytes(step, device)
    return counted
