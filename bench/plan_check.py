"""Predicted against measured memory: ``python -m bench.plan_check [--out DIR] [--quick]``.

A training step (forward, backward, AdamW) of SmolLM2-135M, on a GPU of four LLaMA-7B layers, n = 3, r = 32, adapters
in the base's dtype, by all methods, one after the other: the peak that ``plan_memory`` predicts from the config, and
that of the real step, as bytes of tensors alive beyond the weights, the adapter and the optimizer's state. On a CPU
these are torch's allocations, on a GPU its allocator's peak.
"""

import argparse
import copy
import gc
import json
from functools import partial
from pathlib import Path

import torch
from torch import nn

from bench.environment import conditions
from bench.step_models import builders, decoder
from multilora_fast import plan_memory
from multilora_fast.memory import peak_bytes
from multilora_fast.memory.methods import FULL, METHODS
from multilora_fast.memory.report import MethodPlan
from multilora_fast.models import LINEARS

SHAPES = [(8, 1024), (1, 1024)] if torch.cuda.is_available() else [(4, 128), (1, 192)]
N, R = 3, 32


def beyond(plan: MethodPlan) -> int:
    """The predicted peak without what stays between steps."""
    return plan.peak - plan.weights - plan.adapter - plan.optimizer


def measure(model: nn.Module, batch: int, length: int, device: str) -> int:
    ids = torch.randint(model.config.vocab_size, (batch, length), device=device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=device == "cuda")

    def step(ids):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(ids[:1, :8])  # makes the optimizer's state
    return peak_bytes(partial(step, ids), torch.device(device))


def rows(quick: bool, device: str):
    """One row per shape, dropout, checkpointing and method."""
    name, base = decoder(quick, device)
    for checkpointing in (False, True):
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        for p in (0.0, 0.05):
            build = builders(copy.deepcopy(base), N, R, p)
            for batch, length in SHAPES:
                settings = {"batch": batch, "seq_len": length, "lora_dropout": p, "checkpointing": checkpointing}
                plan = plan_memory(
                    base.config, r=R, lora_num=N, dtype=base.dtype, adapter_dtype=base.dtype, device=device,
                    target_modules=list(LINEARS), **settings,
                )  # fmt: skip
                for method in METHODS:
                    if method == FULL and p:
                        continue  # it has no adapter, and no dropout before one
                    predicted = beyond(plan[method])
                    try:
                        measured = measure(build[method]().train(), batch, length, device)
                    except torch.OutOfMemoryError:
                        print(f"{method} at {batch} x {length} does not fit on this GPU")
                        continue
                    finally:
                        gc.collect()
                    yield {
                        "model": name, **settings, "method": method, "phase": plan[method].phase,
                        "predicted": predicted, "measured": measured, "error": predicted / measured - 1,
                    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="directory for plan.json")
    parser.add_argument("--quick", action="store_true", help="a tiny model instead of SmolLM2-135M")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    print(
        f"{'batch':>9}{'dropout':>9}{'checkpointing':>15}  {'method':18}{'predicted':>11}{'measured':>11}{'error':>8}"
    )
    found = []
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    for row in rows(arguments.quick, device):
        found.append(row)
        print(
            f"{row['batch']:>4}x{row['seq_len']:<4}{row['lora_dropout']:9g}{row['checkpointing']!s:>15}  "
            f"{row['method']:18}{row['predicted'] / 2**20:7.1f} MiB{row['measured'] / 2**20:7.1f} MiB"
            f"{row['error']:+8.1%}",
            flush=True,
        )
        if arguments.out:
            document = {"conditions": conditions(), "n": N, "r": R, "rows": found}
            (arguments.out / "plan.json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"largest error {max(abs(row['error']) for row in found):.1%}")


if __name__ == "__main__":
    main()
