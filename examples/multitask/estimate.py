"""What a run of the GPU profile asks of an H100, before there is one.

``python -m examples.multitask.estimate PREPARED`` counts the FLOPs of a step on the meta device, and writes time and
memory on the study's page as estimates.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from examples.multitask.batches import groups, padded, tokens
from examples.multitask.data import Items, drawn
from examples.multitask.methods import adapted
from examples.multitask.plan import FIRST, METHODS, Study
from multilora_fast import plan_memory
from multilora_fast.console import MIB

PEAK, SHARE = 989e12, 0.4  # an H100's bfloat16 products, and the share of it that a small model may reach
HOST = (0.001, 0.002)  # seconds of Python a linear layer, forward and backward: what eager steps on an H100 took


def flops(model: Path, method: str, study: Study, shape: tuple[int, int], kept: int) -> int:
    """Of forward and backward of one batch (B, T) with logits at ``kept`` positions a row."""
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
    """By method a step's FLOPs a token, seconds of a run by its products alone and by the host alone, and bytes."""
    examples = drawn(items, study, None, 0)
    first = examples[: 20 * study.batch_size]
    steps = [first[i : i + study.batch_size] for i in range(0, len(first), study.batch_size)]
    made = [padded(group) for step in steps for group in groups(step, study.micro_tokens)]
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
        same = study.rival(method) if METHODS[method].kind == "multilora" else method  # in place, ours are not counted
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
    header = ["method", "GFLOP a token", "products, s", "Python, s", "peak, GiB"]
    shape = " x ".join(map(str, found["shape"]))
    return (
        f"**Estimates: nothing here was measured on a GPU.** A run of the GPU profile reads {found['tokens']:,} tokens "
        f"in {found['batches']:,} batches, of which padding makes {found['padding']:.2f} times as many places.\n\n"
        f"{table(header, rows)}\n\nFLOPs of forward and backward, counted on the meta device. "
        f"Products: at {SHARE:.0%} of an H100's {PEAK / 1e12:.0f} TFLOP/s. Python: at {HOST[0] * 1e3:g} to "
        f"{HOST[1] * 1e3:g} ms a linear layer, what eager steps of few tokens took on an H100 "
        "with LoRA and with earlier kernels of ours; full fine-tuning takes less. The larger of the two is a run's "
        "training, so that runs side by side gain until their products fill the card. Evaluation comes on top: of some "
        "19,000 items, in batches of 128. MultiLoRA's products are counted as those of LoRA of its rank. Peak: what "
        f"`plan_memory` says of the largest batch, {shape} tokens, in float32 with logits everywhere, "
        "which is more than bfloat16 products and logits of answers alone will hold."
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
