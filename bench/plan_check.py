"""Predicted against measured memory: ``python -m bench.plan_check [--all] [--out DIR] [--quick]``.

A training step (forward, backward, AdamW) of SmolLM2-135M, on a GPU of four LLaMA-7B layers, n = 3, r = 32, adapters
in the base's dtype, by all methods, one after the other: the peak that ``plan_memory`` predicts from the config, and
that of the real step, as bytes of tensors alive beyond the weights, the adapter and the optimizer's state. On a CPU
these are torch's allocations, on a GPU its allocator's peak. ``--all`` does so, on the CPU, with small models of many
types and under FSDP2 (``plan_models.py``), and lists the types that are refused.
"""

import argparse
import copy
import gc
import json
from itertools import chain
from pathlib import Path

import torch

from bench import plan_models
from bench.environment import conditions
from bench.plan_models import beyond, measure
from bench.step_models import builders, decoder
from multilora_fast import plan_memory
from multilora_fast.memory.methods import FULL, METHODS
from multilora_fast.models import LINEARS

SHAPES = [(8, 1024), (1, 1024)] if torch.cuda.is_available() else [(4, 128), (1, 192)]
N, R = 3, 32


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


def everything(out: Path | None) -> None:
    """The rows of many types, and which types are refused; into ``out`` as plan_models.json and plan_models.md."""
    found: list[dict] = []
    for row in chain(plan_models.rows(), plan_models.sharded_rows()):
        found.append(row)
        name = f"{row['model']}{', FSDP2' if 'fsdp' in row else ''}"
        print(f"{name:20}{row['dtype']:>9}{row['adapters']:>9}{row['lora_dropout']:6g} {row['checkpointing']!s:6}"
              f"{row['method']:18}{row.get('refused') or format(row['error'], '+.2%')}", flush=True)  # fmt: skip
        if out:
            _write(out, found, {})
    refused = plan_models.refusals()
    print(json.dumps(refused, indent=1))
    if out:
        _write(out, found, refused)


def _write(out: Path, found: list[dict], refused: dict[str, str]) -> None:
    document = {"conditions": conditions(), "rows": found, "refused": refused}
    (out / "plan_models.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "plan_models.md").write_text(_table(found, refused))


def _table(found: list[dict], refused: dict[str, str]) -> str:
    lines = [
        "# The largest error of plan_memory's peak, by model type", "", str(plan_models.__doc__).strip(), "",
        f"| model type | {' | '.join(METHODS)} |", f"|---{'|---:' * len(METHODS)}|",
    ]  # fmt: skip
    for model, sharded in dict.fromkeys((row["model"], "fsdp" in row) for row in found):
        cells = []
        for method in METHODS:
            rows = [r for r in found if (r["model"], "fsdp" in r, r["method"]) == (model, sharded, method)]
            errors = [row["error"] for row in rows if "error" in row]
            cells.append(f"{max(errors, key=abs):+.2%}" if errors else "cannot adapt these modules")
        lines.append(f"| {model}{', two ranks of FSDP2' if sharded else ''} | {' | '.join(cells)} |")
    lines += ["", *(f"- {kind} is refused: {reason}" for kind, reason in refused.items()), ""]
    lines.append("Written by `python -m bench.plan_check --all --out DIR`; every setting is in plan_models.json.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="directory for plan.json")
    parser.add_argument("--all", action="store_true", help="small models of many types")
    parser.add_argument("--quick", action="store_true", help="a tiny model instead of SmolLM2-135M")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.all:
        everything(arguments.out)
        return
    print(
        f"{'batch':>9}{'dropout':>9}{'checkpointing':>15}  {'method':18}{'predicted':>11}{'measured':>11}{'error':>8}"
    )
    found = []
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
