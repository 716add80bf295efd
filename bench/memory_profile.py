"""Bytes alive over one training step: ``python -m bench.memory_profile [--out DIR]``.

Forward and backward of one LLaMA decoder layer: frozen, and with all seven linears adapted by the reference loop, PEFT
LoRA and ours at one total rank. Writes the peaks as memory_profile.json, with matplotlib also memory_profile.png, and
on a GPU memory_snapshot.pickle for torch's memory viewer.
"""

import argparse
import importlib.util
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from bench.environment import conditions
from bench.memory import FROZEN, SIZES, adapted, decoder_layer
from multilora_fast.memory.cuda import cuda_operations
from multilora_fast.memory.measure import timeline
from multilora_fast.memory.methods import LORA, OURS, REFERENCE


def step(layer: nn.Module, x: torch.Tensor, rotary: tuple) -> None:
    out = layer(x, position_embeddings=rotary)
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    layer.zero_grad()
    x.grad = None


def profiles(size: str, tokens: int, p: float, device: str) -> dict[str, list[tuple[float, int]]]:
    """The timeline of every method, after one warmup."""
    found = {}
    for method in (FROZEN, REFERENCE, LORA, OURS):
        config, layer = decoder_layer(size)
        layer = adapted(layer, method, n=5, r=32, p=p).to(device)
        x = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16, device=device).requires_grad_()
        rotary = LlamaRotaryEmbedding(config).to(device)(x, torch.arange(tokens, device=device)[None])
        run = partial(step, layer, x, rotary)
        with nullcontext() if device == "cuda" else cuda_operations():
            run()
            found[method] = timeline(run)
        print(f"{method:16} peak {max(live for _, live in found[method]) / 2**20:8.1f} MiB")
    return found


def plot(found: dict[str, list[tuple[float, int]]], title: str, path: Path) -> None:
    """Plot one line per method over the fraction of its own step, so that slow and fast methods can be compared."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    for method, points in found.items():
        end = points[-1][0] or 1.0
        style = {"linewidth": 2.5, "color": "#1f5fa8"} if method == OURS else {"linewidth": 1.2}
        x, y = [at / end for at, _ in points], [live / 2**20 for _, live in points]
        axis.step(x, y, where="post", label=method, **style)
    axis.set(xlabel="share of the step (forward, then backward)", ylabel="MiB alive", title=title, xlim=(0, 1))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench-output"))
    parser.add_argument("--size", default="7B", choices=list(SIZES))
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.05)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.out.mkdir(parents=True, exist_ok=True)
    if device == "cuda":
        torch.cuda.memory._record_memory_history()
    found = profiles(arguments.size, arguments.tokens, arguments.dropout, device)
    if device == "cuda":
        torch.cuda.memory._dump_snapshot(str(arguments.out / "memory_snapshot.pickle"))
    title = (
        f"One LLaMA-{arguments.size} decoder layer, {arguments.tokens} tokens, bfloat16, n = 5, r = 32, "
        f"dropout {arguments.dropout:g}\n{conditions()['device']}"
    )
    peaks = {method: max(live for _, live in points) for method, points in found.items()}
    settings = {"size": arguments.size, "tokens": arguments.tokens, "dropout": arguments.dropout, "n": 5, "r": 32}
    document = {"conditions": conditions(), **settings, "peak": peaks}
    (arguments.out / "memory_profile.json").write_text(json.dumps(document, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib"):
        plot(found, title, arguments.out / "memory_profile.png")
    print(f"wrote {arguments.out / 'memory_profile.json'}")


if __name__ == "__main__":
    main()
