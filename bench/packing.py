"""Training throughput with padding and with packing: ``python -m bench.packing [--out DIR] [--quick]``.

SmolLM2-135M with a MultiLoRA adapter on rows of random tokens with a skewed length distribution. Batches of padded rows
and batches of bins alternate, so that drift affects both; a step is forward, backward and AdamW. Writes packing.json.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor, nn

from bench.environment import conditions
from multilora_fast import MultiLoraConfig
from multilora_fast.devices import choose_device, choose_dtype
from multilora_fast.models import LINEARS, load_model
from multilora_fast.training.data import Example, collate
from multilora_fast.training.packing import check_bins, flatten, pack

LENGTH = 512  # tokens, of the longest row and of a bin
ROWS = 4  # rows of a padded batch; a batch of bins is one bin


def skewed(count: int, vocabulary: int) -> list[Example]:
    """Rows with log-normal lengths of median 64."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        ids = [draw.randrange(vocabulary) for _ in range(min(LENGTH, max(8, round(draw.lognormvariate(4.16, 1.0)))))]
        rows.append({"input_ids": ids, "labels": ids})
    return rows


def seconds(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], device: torch.device
) -> float:
    began = time.perf_counter()
    model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="directory for packing.json")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--quick", action="store_true", help="two rounds, as a smoke test")
    arguments = parser.parse_args()
    device = choose_device("auto")
    base = load_model(None, choose_dtype("auto", device), device).requires_grad_(False)
    torch.manual_seed(0)
    model = get_peft_model(base, MultiLoraConfig(r=32, lora_num=3, target_modules=list(LINEARS)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rounds = 2 if arguments.quick else arguments.rounds
    rows = skewed(ROWS * rounds, base.config.vocab_size)
    bins = pack(rows, LENGTH)
    check_bins(model, bins)
    model.train()
    random.Random(1).shuffle(bins)
    batches = {
        "padded": [collate(rows[i : i + ROWS], 0) for i in range(0, len(rows), ROWS)],
        "packed": [flatten([one], 0) for one in bins],
    }
    seconds(model, optimizer, batches["padded"][0], device)  # the first step allocates the optimizer state
    took: dict[str, list[float]] = {name: [] for name in batches}
    for i in range(max(map(len, batches.values()))):
        for name, all_of in batches.items():
            if i < len(all_of):
                took[name].append(seconds(model, optimizer, all_of[i], device))
    tokens = sum(len(row["input_ids"]) for row in rows)
    document = {
        "conditions": conditions(), "model": "SmolLM2-135M", "dtype": str(base.dtype).removeprefix("torch."),
        "n": 3, "r": 32, "rows": len(rows), "tokens": tokens, "longest": LENGTH,
        "median length": statistics.median(len(row["input_ids"]) for row in rows),
        "batches": {name: len(all_of) for name, all_of in batches.items()},
        "positions": {name: sum(b["input_ids"].numel() for b in all_of) for name, all_of in batches.items()},
        "tokens per second": {name: tokens / sum(all_of) for name, all_of in took.items()}, "seconds": took,
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "packing.json").write_text(json.dumps(document, indent=1) + "\n")
    for name, rate in document["tokens per second"].items():
        print(f"{name:10}{len(batches[name]):4} batches {rate:8.1f} tokens/s")


if __name__ == "__main__":
    main()
