"""The table of ``make architectures``, as Markdown."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from building import Architecture

Cell = str
PATH = Path(__file__).parents[2] / "docs/architectures.md"
HEAD = """# Architectures

Written by `make architectures`: tiny models built from their configs, each against PEFT's LoRA or the plain loop on the
same model. {count} architectures; {versions}; CPU.

- **modules**: with the same `target_modules`, "all-linear" {most}, those that LoRA adapts are adapted; their number
- **start**: a fresh adapter leaves the bits of the output
- **gradients**: in float64, over two steps, each is the loop's to 1e-8
- **checkpointing**: both modes give the gradients of a step without it, to 1e-8, also with dropout
- **dropout**: one seed gives one mask; none in evaluation
- **autocast**: in bfloat16, gradients no farther from float64 than twice the loop's distance, and a rounding
- **generate**: a model in train mode generates what the loop does
- **files**, **merge**, **export**: saved and loaded, merged, or exported into plain PEFT, it answers the same to 1e-9

"n/a": the model has no such thing. "LoRA fails": so does the check with LoRA; why is below.
"""


def write(architectures: Sequence[Architecture], checks: Sequence[str], cells: Mapping[tuple[str, str], Cell]) -> None:
    names = ("torch", "transformers", "peft", "diffusers")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    linear = sum(of.targets == "all-linear" for of in architectures)
    lines = [HEAD.format(count=len(architectures), versions=versions, most=f"for {linear}")]
    lines += [f"| architecture | family | {' | '.join(checks)} |", f"| --- | --- |{' --- |' * len(checks)}"]
    for of in architectures:
        row = " | ".join(cells[of.name, check] for check in checks)
        lines.append(f"| {of.name} | {of.family} | {row} |")
    lines += ["", "## Where we and LoRA differ", ""]
    for of in architectures:
        reasons = [f"`{key}` is left out, with a warning: {why}" for key, why in of.left_out.items()]
        reasons += [f"more modules than LoRA's: {of.more}"] if of.more else []
        reasons += [f"no {check}, nor with LoRA: {why}" for check, why in of.unlike.items()]
        reasons += [f"{', '.join(of.exclude)} excluded from both"] if of.exclude else []
        lines += [f"- {of.name}: {'; '.join(reasons)}."] if reasons else []
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text("\n".join(lines) + "\n")
