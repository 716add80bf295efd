"""Bytes saved for backward by one real LLaMA decoder layer: ``python -m bench.memory [--out DIR] [--quick]``. With
``--experts``, the bytes saved and held by the experts of one layer of two MoE models (``experts.py``).

Runs on the CPU. Counts storages beyond what the frozen layer saves, without parameters, in bytes per token. All seven
linear layers have adapters, in the base's bfloat16. PyTorch's CPU dropout keeps its mask in the dtype of x; it is
converted to one byte per element here, as on CUDA.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from bench import experts
from bench.candidates import FP8
from bench.environment import conditions
from bench.experts_tables import memory_text
from multilora_fast.memory import saved_bytes
from multilora_fast.memory.cuda import cuda_operations
from multilora_fast.memory.methods import LORA, OURS, REFERENCE, adapt
from multilora_fast.models import LINEARS

SIZES = {"7B": (4096, 11008, 32), "13B": (5120, 13824, 40), "65B": (8192, 22016, 64), "tiny": (64, 96, 4)}
FROZEN = "frozen layer"


def decoder_layer(size: str) -> tuple[LlamaConfig, LlamaDecoderLayer]:
    hidden, intermediate, heads = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads, attn_implementation="sdpa"
    )
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, 0).to(torch.bfloat16)
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)  # the saved bytes do not depend on values
    return config, layer.requires_grad_(False).train()


def adapted(layer: nn.Module, method: str, n: int, r: int, p: float) -> nn.Module:
    """Adapt the seven linears of ``layer`` in place, at total rank n·r."""
    if method == FROZEN:
        return layer
    way, options = (OURS, {"save_inputs": "fp8"}) if method == FP8 else (method, {})
    return adapt(layer, way, LINEARS, r=r, lora_num=n, lora_dropout=p, **options)


def bytes_per_token(size: str, method: str, n: int = 5, r: int = 32, p: float = 0.0, tokens: int = 128) -> float:
    config, layer = decoder_layer(size)
    layer = adapted(layer, method, n, r, p)
    x = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16).requires_grad_()
    rotary = LlamaRotaryEmbedding(config)(x, torch.arange(tokens)[None])
    with cuda_operations(), saved_bytes([*layer.parameters(), *layer.buffers()]) as saved:
        layer(x, position_embeddings=rotary)
    return saved.total / tokens


def table(sizes: list[str], progress: Callable[[str], None] = print) -> list[dict]:
    """Bytes per token beyond the frozen layer, and ratios, for every size and dropout."""
    rows = []
    for size in sizes:
        progress(f"Counting one decoder layer of LLaMA-{size} ...")
        frozen = bytes_per_token(size, FROZEN)
        for p in (0.0, 0.05):
            beyond = {m: bytes_per_token(size, m, p=p) - frozen for m in (LORA, REFERENCE, OURS, FP8)}
            rows.append({"size": size, "dropout": p, "n": 5, "r": 32, "frozen": frozen, "beyond": beyond})
    return rows


def growth(size: str) -> list[dict]:
    """Bytes per token beyond the frozen layer: total rank 160 in more and more branches, then growing ranks, then
    tokens.
    """
    p, rows = 0.05, []
    cuts = [(n, 160 // n, 128) for n in (1, 2, 4, 5, 8)]
    for n, r, tokens in [*cuts, (5, 8, 128), (5, 64, 128), (5, 32, 32), (5, 32, 512)]:
        counts = {m: bytes_per_token(size, m, n, r, p, tokens) for m in (FROZEN, LORA, REFERENCE, OURS, FP8)}
        beyond = {m: count - counts[FROZEN] for m, count in counts.items() if m != FROZEN}
        rows.append({"size": size, "n": n, "r": r, "tokens": tokens, "dropout": p, "beyond": beyond})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="directory for the JSON")
    parser.add_argument("--quick", action="store_true", help="use a tiny layer")
    parser.add_argument("--experts", action="store_true", help="measure experts, into experts_memory.json")
    arguments = parser.parse_args()
    if arguments.experts:
        found = experts.rows({"tiny": experts.TINY} if arguments.quick else experts.SIZES)
        print(f"\n{memory_text(found)}")
        _write(arguments.out, "experts_memory.json", {"rows": found})
        return
    sizes = ["tiny"] if arguments.quick else ["7B", "13B", "65B"]
    rows, more = table(sizes), growth(sizes[0])
    print("\nbytes per token saved beyond the frozen layer (n·r = 160, bfloat16)")
    print(
        f"{'layer':6}{'dropout':>9}{LORA:>12}{REFERENCE:>16}{OURS:>10}{FP8:>18}"
        f"{'ours / LoRA':>13}{'ours / loop':>13}{'fp8 / LoRA':>12}"
    )
    for row in rows:
        lora, reference, ours, fp8 = (row["beyond"][m] for m in (LORA, REFERENCE, OURS, FP8))
        print(
            f"{row['size']:6}{row['dropout']:9.2f}{lora:12,.0f}{reference:16,.0f}{ours:10,.0f}{fp8:18,.0f}"
            f"{ours / lora:12.3f}x{ours / reference:12.3f}x{fp8 / lora:11.3f}x"
        )
    print(f"\nhow it grows, {sizes[0]}, dropout 0.05")
    for row in more:
        counts = ", ".join(f"{name} {count:,.0f}" for name, count in row["beyond"].items())
        print(f"n = {row['n']}, r = {row['r']}, {row['tokens']} tokens: {counts}")
    _write(arguments.out, "memory.json", {"rows": rows, "growth": more})


def _write(out: Path | None, name: str, found: dict) -> None:
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(json.dumps({"conditions": conditions(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
