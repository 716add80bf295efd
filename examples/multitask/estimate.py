"""Estimate time and memory of a run of the GPU profile: ``python -m examples.multitask.estimate PREPARED``.

FLOPs of a step are counted on the meta device, its kernels on a model of one and of two small layers. The estimates are
written on the study's page.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from examples.multitask.batches import batches, loss, tokens
from examples.multitask.data import Items, drawn
from examples.multitask.methods import adapted
from examples.multitask.plan import FIRST, METHODS, Study
from multilora_fast import plan_memory
from multilora_fast.console import MIB
from multilora_fast.demo.scoring import Encoded

PEAK, SHARE = 989e12, 0.4  # bfloat16 FLOP/s of an H100 or H200, and the share that a small model may reach
KERNEL = 4e-6  # seconds of a small kernel in a replayed graph, an assumption
HOST = (0.001, 0.002)  # seconds of Python per linear layer, forward and backward, measured in eager steps on an H100


def flops(model: Path, method: str, study: Study, batch: dict[str, torch.Tensor]) -> int:
    """FLOPs of forward and backward on a batch."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16)
    trained = adapted(base, method, study.rank(method))
    with FlopCounterMode(display=False) as counter:
        loss(trained, {name: tensor.to("meta") for name, tensor in batch.items()}).backward()
    return counter.get_total_flops()


def kernels(method: str, layers: int) -> int:
    """Kernels of forward and backward of ``layers`` decoder layers, with PyTorch's own operations in MultiLoRA."""

    class Launches(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            name = op.overloadpacket.__name__
            free = op.is_view or name.startswith("empty") or name in ("_unsafe_view", "detach", "promote_types")
            self.count += not free
            return op(*args, **(kwargs or {}))

    def count(depth: int) -> int:
        config = LlamaConfig(hidden_size=64, num_hidden_layers=depth, vocab_size=64, num_attention_heads=4)
        base = LlamaForCausalLM(config).requires_grad_(False)
        for name, module in list(base.named_modules()):
            if type(module).__name__ == "LlamaRMSNorm":  # one kernel on CUDA, as a LayerNorm is here
                base.set_submodule(name, nn.LayerNorm(64, bias=False).requires_grad_(False))
        model = adapted(base, method, 6)
        batch = next(batches([Encoded("", [1] * 9, [[2, 3]], 0)] * 8, 64, 32))
        with Launches() as seen:
            with torch.autocast("cpu", torch.bfloat16):
                found = loss(model, batch)
            found.backward()
        return seen.count

    one = count(1)
    return one + (layers - 1) * (count(2) - one)


def estimate(model: Path, items: Items, study: Study) -> dict:
    """By method: FLOPs per token, kernels a step, seconds of a run for its GEMMs, its kernels and its Python, each
    alone, and peak bytes."""
    examples = drawn(items, study, None, 0)
    steps = [examples[i : i + study.batch_size] for i in range(0, len(examples), study.batch_size)]
    made = [batch for step in steps for batch in batches(step, study.micro_tokens, study.max_length)]
    sizes = [batch["ids"].numel() for batch in made]
    longest = max(made, key=lambda batch: batch["ids"].numel())
    shape = tuple(longest["ids"].shape)
    config = AutoConfig.from_pretrained(model)
    found = {
        "tokens": tokens(examples),
        "padding": sum(sizes) / tokens(examples),
        "batches": len(made),
        "shapes": len({tuple(tensor.shape for tensor in batch.values()) for batch in made}),
        "shape": shape,
        "methods": {},
    }
    for method in FIRST:
        # The counter does not see in-place products, ours: LoRA of the same rank has as many.
        same = study.rival(method) if METHODS[method].kind == "multilora" else method
        each = flops(model, same, study, longest) / max(sizes)
        launched = kernels(method, config.num_hidden_layers)
        found["methods"][method] = {
            "flops_a_token": each,
            "products": each * sum(sizes) / (PEAK * SHARE),
            "kernels": launched,
            "replayed": launched * KERNEL * len(made),
            "host": [seconds * 7 * config.num_hidden_layers * len(made) for seconds in HOST],
        }
    options = {"batch": shape[0], "seq_len": shape[1], "target_modules": "all-linear", "dtype": "float32"}
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
         f"{round(one['kernels'], -2):,}", f"{one['replayed']:.0f}",
         " to ".join(f"{seconds:.0f}" for seconds in one["host"]), f"{one['peak'] / MIB / 1024:.0f}"]
        for name, one in found["methods"].items()
    ]  # fmt: skip
    header = ["method", "GFLOP/token", "GEMMs, s", "kernels a step", "kernels, s", "Python, s", "peak, GiB"]
    shape = " x ".join(map(str, found["shape"]))
    return (
        f"**Estimates: nothing here was measured on a GPU.** A run of the GPU profile reads {found['tokens']:,} tokens "
        f"in {found['batches']:,} batches of {found['shapes']} shapes. With padding they hold {found['padding']:.2f} "
        f"times as many.\n\n{table(header, rows)}\n\nFLOPs: forward and backward, counted on the meta device. "
        f"MultiLoRA's are counted as those of LoRA of its rank. GEMMs: at {SHARE:.0%} of the {PEAK / 1e12:.0f} TFLOP/s "
        "of an H100 or H200. Kernels: forward and backward, counted as PyTorch's own operations, of which the Triton "
        f"kernels fuse some, at an assumed {KERNEL * 1e6:g} µs each. Python: at {HOST[0] * 1e3:g} to "
        f"{HOST[1] * 1e3:g} ms per linear layer, measured in eager steps of few tokens on an H100 with LoRA and with "
        "earlier kernels. A captured step takes the larger of GEMMs and kernels, an eager one also no less than "
        "Python, so that eager runs gain side by side until the GPU is full. Evaluation is extra: some 16,000 test "
        f"items in 58 batches of at most 32,768 tokens. Peak: `plan_memory` for the largest batch, {shape} tokens, in "
        "float32 with all logits. Training needs less: its GEMMs are in bfloat16, and it computes logits of answers "
        "only. Evaluation needs some 18 GiB by the sizes of its tensors: 6 of logits and 12 of keys and values."
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
