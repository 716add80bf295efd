"""Host overhead of one layer: ``python -m bench.host [--out DIR] [--check] [--rounds N]``.

Forward and backward of 8 tokens, 64 → 64, n = 3, r = 32, float32, one thread, candidates interleaved, on a CPU that
simulates a GPU. Our layer skips only device queries, compilation, descriptor encoding and `CompiledKernel.run`; cache
keys, checks, allocations, addresses and the base product all run. Own cost is (ours − frozen) / (LoRA − frozen) on
minimum times.
"""

import argparse
import json
import logging
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bench.candidates import ADDMM, AddmmLoRA
from bench.environment import conditions
from bench.simulated import Compiled, simulated_gpu
from multilora_fast import FusedMultiLoRALinear, MultiLoraConfig, MultiLoRALinear
from multilora_fast.benchmark.layer import FROZEN, LORA, OURS, REFERENCE

M, D, N, R = 8, 64, 3, 32
NAMES = ("q_proj", "k_proj", "v_proj")
PEFT_OURS = "ours through PEFT"
GROUP = {name: f"three of {name}" for name in (FROZEN, LORA, OURS)}
LIMITS = {OURS: 0.9, PEFT_OURS: 1.0, GROUP[OURS]: 0.9}


class Projections(nn.Module):
    """Projections that read the same x."""

    def __init__(self, count: int):
        super().__init__()
        for name in NAMES[:count]:
            setattr(self, name, nn.Linear(D, D, bias=False).requires_grad_(False))

    def forward(self, x):
        outputs = [layer(x) for layer in self.children()]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def adapted(count: int, config) -> nn.Module:
    return get_peft_model(Projections(count), config).base_model.model


def candidates(p: float) -> dict[str, nn.Module]:
    lora = LoraConfig(r=N * R, lora_alpha=N * R, lora_dropout=p, target_modules=list(NAMES), init_lora_weights=False)
    ours = MultiLoraConfig(r=R, lora_num=N, lora_dropout=p, target_modules=list(NAMES))
    found = {
        FROZEN: Projections(1),
        LORA: adapted(1, lora),
        REFERENCE: MultiLoRALinear(Projections(1).q_proj, r=R, lora_num=N, lora_dropout=p),
        OURS: FusedMultiLoRALinear(Projections(1).q_proj, r=R, lora_num=N, lora_dropout=p),
        PEFT_OURS: adapted(1, ours),
        GROUP[FROZEN]: Projections(3),
        GROUP[LORA]: adapted(3, lora),
        GROUP[OURS]: adapted(3, ours),
    }
    if p == 0:
        found[ADDMM] = AddmmLoRA(Projections(1).q_proj, N * R)
    return {name: model.train() for name, model in found.items()}


def times(models: dict[str, nn.Module], rounds: int) -> dict[str, list[float]]:
    """Microseconds of forward and backward of every model, interleaved."""
    x = torch.randn(M, D, requires_grad=True)
    gradients = {name: torch.randn_like(model(x)) for name, model in models.items()}
    found: dict[str, list[float]] = {name: [] for name in models}
    order = list(models.items())
    for done in range(rounds + 20):
        random.shuffle(order)  # start with caches in the state a real run leaves them in
        for name, model in order:
            x.grad = None
            for parameter in model.parameters():
                parameter.grad = None
            dy = gradients[name]
            start = time.perf_counter()
            model(x).backward(dy)
            taken = time.perf_counter() - start
            if done >= 20:
                found[name].append(1e6 * taken)
    return found


def own_costs(least: dict[str, float]) -> dict[str, float]:
    one, three = (FROZEN, LORA), (GROUP[FROZEN], GROUP[LORA])
    pairs = {name: three if name == GROUP[OURS] else one for name in (ADDMM, OURS, PEFT_OURS, GROUP[OURS])}
    return {
        name: (least[name] - least[frozen]) / (least[lora] - least[frozen])
        for name, (frozen, lora) in pairs.items()
        if name in least
    }


def measure(p: float, rounds: int) -> dict:
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # no kernel writes the allocated outputs, and the base product reads them
    with simulated_gpu(lambda *_: Compiled(lambda *_: None)):
        found = times(candidates(p), rounds)
    least = {name: min(taken) for name, taken in found.items()}
    median = {name: statistics.median(taken) for name, taken in found.items()}
    return {"dropout": p, "least": least, "median": median, "own cost": own_costs(least)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="directory for host.json")
    parser.add_argument("--check", action="store_true", help="exit with 1 if an own cost exceeds its limit")
    parser.add_argument("--rounds", type=int, default=3000)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # silences messages about CPU kernels it did not find
    rows = [measure(p, arguments.rounds) for p in (0.0, 0.05)]
    past = []
    for row in rows:
        print(f"\ndropout {row['dropout']:g}{'least, us':>28}{'median, us':>12}{'own cost':>10}{'limit':>8}")
        for name, least in row["least"].items():
            own, limit = row["own cost"].get(name), LIMITS.get(name)
            print(
                f"{name:26}{least:12.1f}{row['median'][name]:12.1f}"
                + (f"{own:10.2f}" if own is not None else "")
                + (f"{limit:8.2f}" if limit is not None else "")
            )
            if limit is not None and own > limit:
                past.append(f"{name} at dropout {row['dropout']:g}: {own:.2f} > {limit}")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        shape = {"tokens": M, "in_features": D, "out_features": D, "n": N, "r": R, "dtype": "float32"}
        document = {"conditions": conditions(), **shape, "rounds": arguments.rounds, "limits": LIMITS, "rows": rows}
        (arguments.out / "host.json").write_text(json.dumps(document, indent=1) + "\n")
    for line in past:
        print(f"past its limit: {line}")
    return 1 if past and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
