"""Estimate time and memory of a run of the GPU profile on an H100: ``python -m examples.multitask.estimate PREPARED``.

FLOPs of a step are counted on the meta device. The estimates are written on the study's page.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from examples.multitask.batches import binned, tokens
from examples.multitask.data import Items, drawn
from examples.multitask.methods import adapted
from examples.multitask.plan import FIRST, METHODS, Study
from multilora_fast import plan_memory
from multilora_fast.console import MIB

PEAK, SHARE = 989e12, 0.4  # an H100's bfloat16 FLOP/s, and the share that a small model may reach
HOST = (0.001, 0.002)  # seconds of Python per linear layer, forward and backward, measured in eager steps on an H100


def flops(model: Path, method: str, study: Study, shape: tuple[int, int], kept: int) -> int:
    """FLOPs of forward and backward on one batch (B, T) with logits at ``kept`` positions of each row."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16)
    trained = adapted(base, method, study.rank(method))
    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    labels = torch.zeros(shape[0], kept, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        keep = torch.arange(kept, device="meta")
        trained(input_ids=ids, logits_to_keep=keep, labels=labels, shift_labels=labels).loss.backward()
    return counter.get_total_flops()


def estimate(model: Path, items: Items, study: Study) -> dict:
    """By method: FLOPs per token, seconds of a run for its GEMMs alone and for Python alone, peak bytes."""
    examples = drawn(items, study, None, 0)
    first = examples[: 20 * study.batch_size]
    steps = [first[i : i + study.batch_size] for i in range(0, len(first), study.batch_size)]
    made = [batch for step in steps for batch in binned(step, study.micro_tokens)]
    shapes = [tuple(batch["input_ids"].shape) for batch in made]
    places = sum(rows * length for rows, length in shapes)
    longest = max(shapes, key=lambda shape: shape[0] * shape[1])
    kept = round(sum(batch["labels"].shape[1] for batch in made) / len(made))
    read = tokens(examples)
    micro = len(made) / len(steps) * study.steps
    config = AutoConfig.from_pretrained(model)
    linears = 7 * config.num_hidden_layers
    found = {
        "tokens": read,
        "padding": places / tokens(first),
        "batches": round(micro),
        "shape": longest,
        "methods": {},
    }
    for method in FIRST:
        # The counter does not see in-place products, ours: LoRA of the same rank has as many.
        same = study.rival(method) if METHODS[method].kind == "multilora" else method
        each = flops(model, same, study, longest, kept) / (longest[0] * longest[1])
        host = [seconds * linears * micro for seconds in HOST]
        found["methods"][method] = {
            "flops_a_token": each,
            "products": each * read * found["padding"] / (PEAK * SHARE),
            "host": host,
        }
    options = {"batch": longest[0], "seq_len": longest[1], "target_modules": "all-linear", "dtype": "float32"}
    for n, names in ((3, ("multilora-3", "lora", "full")), (5, ("multilora-5", "lora-160"))):
        rows = {row.method: row for row in plan_memory(config, r=32, lora_num=n, **options).methods}
        for name in names:
            label = {"full": "full fine-tuning", "lora": "PEFT LoRA", "multilora": "ours"}[METHODS[name].kind]
            found["methods"][name]["peak"] = rows[label].peak
    return found


def section(found: dict) -> str:
    from bench.report import table

    rows = [
        [METHODS[name].label, f"{one['flops_a_token'] / 1e9:.2f}", f"{one['products']:.0f}",
         " to ".join(f"{seconds:.0f}" for seconds in one["host"]), f"{one['peak'] / MIB / 1024:.0f}"]
        for name, one in found["methods"].items()
    ]  # fmt: skip
    header = ["method", "GFLOP/token", "GEMMs, s", "Python, s", "peak, GiB"]
    shape = " x ".join(map(str, found["shape"]))
    return (
        f"**Estimates: nothing here was measured on a GPU.** A run of the GPU profile reads {found['tokens']:,} tokens "
        f"in {found['batches']:,} batches. With padding they hold {found['padding']:.2f} times as many.\n\n"
        f"{table(header, rows)}\n\nFLOPs: forward and backward, counted on the meta device. MultiLoRA's are counted as "
        f"those of LoRA of its rank. GEMMs: at {SHARE:.0%} of an H100's {PEAK / 1e12:.0f} TFLOP/s. Python: at "
        f"{HOST[0] * 1e3:g} to {HOST[1] * 1e3:g} ms per linear layer, measured in eager steps of few tokens on an H100 "
        "with LoRA and with earlier kernels; full fine-tuning takes less. Training takes the larger of the two, so "
        "runs side by side gain until their GEMMs fill the GPU. Evaluation is extra: some 19,000 items in batches of "
        f"128. Peak: `plan_memory` for the largest batch, {shape} tokens, in float32 with all logits. A run needs "
        "less: its GEMMs are in bfloat16, and it computes logits of answers only."
    )


def main() -> None:
    from examples.multitask.page import between
    from examples.multitask.prepare import read
    from examples.multitask.profile import gpu

    parser = argparse.ArgumentParser(prog="python -m examples.multitask.estimate", description=__doc__)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the page")
    options = parser.parse_args()
    study = gpu("bfloat16")
    text = section(estimate(options.prepared / "model", read(options.prepared, study), study))
    between(options.output / "README.md", "estimate", text)
    print(text)


if __name__ == "__main__":
    main()
