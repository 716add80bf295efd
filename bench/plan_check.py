"""Predicted and measured memory: ``python -m bench.plan_check [--all] [--out DIR] [--quick]``.

Runs a training step (forward, backward, AdamW) by all methods, one after the other: SmolLM2-135M, or on a GPU four
LLaMA-7B layers, n = 3, r = 32, adapters in the base's dtype. Compares the peak that ``plan_memory`` predicts from the
config with the peak of the real step, as bytes beyond weights, adapter and optimizer state: torch's allocations on a
CPU, the allocator's peak on a GPU.

``--all`` does so on the CPU for small models of many types and under FSDP2 (``plan_models.py``), and lists the types
that are refused. A second run with the same DIR and commit resumes.
"""

import argparse
import copy
import gc
import json
from itertools import chain
from pathlib import Path

import torch

from bench import plan_models
from bench.causal_lms import LEFT_OUT, TYPES
from bench.environment import conditions
from bench.plan_models import beyond, measure
from bench.step_models import builders, decoder
from bench.tables import conditions_line, table
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
                        continue  # full fine-tuning has no adapter and thus no adapter dropout
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
    """Measure many types into ``out`` as plan_models.json and plan_models.md, with the types that are refused."""
    document = {"conditions": conditions(), "rows": [], "refused": {}}
    path = out and out / "plan_models.json"
    if path and path.exists():
        before = json.loads(path.read_text())
        if before["conditions"] == document["conditions"]:
            document = before
    rows = document["rows"]
    done = {_asked(row) for row in rows}
    known = lambda row: _asked(row) in done  # noqa: E731
    for row in chain(plan_models.rows(known), plan_models.sharded_rows(known)):
        rows.append(row)
        name = f"{row['model']}{', FSDP2' if 'fsdp' in row else ''}"
        print(f"{name:20}{row['dtype']:>9}{row['adapters']:>9}{row['lora_dropout']:6g} {row['checkpointing']!s:6}"
              f"{row['method']:18}{row.get('refused') or format(row['error'], '+.3%')}", flush=True)  # fmt: skip
        if path:
            path.write_text(json.dumps(document, indent=1) + "\n")
    document["refused"] = plan_models.refusals()
    print(json.dumps(document["refused"], indent=1))
    print(f"largest error {max(abs(row['error']) for row in rows if 'error' in row):.2%} of {len(rows)} rows")
    if path:
        path.write_text(json.dumps(document, indent=1) + "\n")
        path.with_suffix(".md").write_text(_table(document))


def _asked(row: dict) -> tuple:
    return tuple(row.get(name) for name in (*plan_models.NAMES, "fsdp", "gradient_accumulation"))


def _table(document: dict) -> str:
    rows = document["rows"]
    cells = []
    for model, sharded in dict.fromkeys((row["model"], "fsdp" in row) for row in rows):
        line = [f"{model}{', one of two FSDP2 ranks' if sharded else ''}"]
        for method in METHODS:
            errors = [
                row["error"] for row in rows
                if "error" in row and (row["model"], "fsdp" in row, row["method"]) == (model, sharded, method)
            ]  # fmt: skip
            line.append(f"{max(errors, key=abs):+.2%}" if errors else "cannot adapt these modules")
        cells.append(line)
    left_out = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in LEFT_OUT.items())
    refused = [
        f"- {kind}{'' if method == 'all' else f', {method}'}: {reason}"
        for kind, reasons in document["refused"].items()
        for method, reason in reasons.items()
    ]
    return "\n".join([
        "# The largest error of plan_memory by model type", "", str(plan_models.__doc__).strip(), "",
        f"{len(rows)} rows. {conditions_line(document['conditions'])}", "", table(["model type", *METHODS], cells), "",
        f"## Refused, of {len(TYPES)} types", "", *refused, "",
        f"All linear layers are adapted, except those that cannot hold an adapter ({left_out}).", "",
        "Written by `python -m bench.plan_check --all --out DIR`; every setting is in plan_models.json.", "",
    ])  # fmt: skip


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
