"""The demo's tables, plot and output directory."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from multilora_fast.console import MIB, table
from multilora_fast.demo.compare import LORA, Cost
from multilora_fast.files import UNFINISHED, check_folder

METRICS, PLOT, ADAPTER = "metrics.json", "comparison.png", "adapter"
KIND = "multilora-fast demo"


@dataclass(frozen=True)
class TaskResult:
    task: str
    items: int
    majority: float
    before: float
    after: float


def mean_result(results: Sequence[TaskResult]) -> TaskResult:
    def mean(key: str) -> float:
        return sum(getattr(result, key) for result in results) / len(results)

    return TaskResult("mean", sum(r.items for r in results), mean("majority"), mean("before"), mean("after"))


def accuracy_table(results: Sequence[TaskResult]) -> str:
    rows = [
        (r.task, str(r.items), f"{r.majority:.3f}", f"{r.before:.3f}", f"{r.after:.3f}", f"{r.after - r.before:+.3f}")
        for r in (*results, mean_result(results))
    ]
    return table(("accuracy", "items", "majority class", "before", "after", "change"), rows)


def cost_table(costs: Sequence[Cost]) -> str:
    """Figures with their ratios to PEFT LoRA."""
    lora = next(cost for cost in costs if cost.method == LORA)
    rows = [
        (
            cost.method,
            f"{cost.saved / MIB:.0f} MiB ({cost.saved / lora.saved:.2f}x)",
            f"{cost.peak / MIB:.0f} MiB ({cost.peak / lora.peak:.2f}x)",
            f"{cost.seconds:.3f} ({cost.seconds / lora.seconds:.2f}x)",
        )
        for cost in costs
    ]
    return table(("training step", "saved for backward", "peak memory", "s/step"), rows)


def accuracy_notes(results: Sequence[TaskResult], seed: int) -> str:
    error = sum(r.after * (1 - r.after) / r.items for r in results) ** 0.5 / len(results)
    return (
        f"The answer is the option with the highest summed log-probability; same held-out items; seed {seed}.\n"
        f"Majority class: always the most frequent right option. Standard error of the mean after: {error:.3f}."
    )


def cost_notes(settings, device: torch.device, *, tokens: int, adapter_dtype: str, rounds: int) -> str:
    """The conditions of the cost table; ``settings`` are the demo's."""
    n, r = settings.lora_num, settings.r
    lines = [
        f"One batch of {tokens} tokens, {n} branches of rank {r} or LoRA of rank {n * r}, dropout "
        f"{settings.lora_dropout:g}, shared base weights,",
        f"adapters in {adapter_dtype}. Steps: forward, backward and AdamW, median of {rounds} interleaved rounds.",
        "In brackets: relative to PEFT LoRA. Peak: tensors alive at once beyond weights and optimizer state.",
    ]
    if settings.lora_dropout:
        lines.append("LoRA also saves dropped inputs and masks: at --lora-dropout 0 both save the same.")
        if device.type == "cpu":
            lines.append("PyTorch keeps dropout masks in the dtype of x on a CPU, in one byte per element on a GPU.")
    return "\n".join(lines)


def check_output_dir(folder: Path) -> None:
    """Raise ValueError if ``folder`` is a file, or holds something that is not an earlier demo's output."""
    check_folder("--output", folder)
    found = folder.is_dir() and any(not path.name.startswith(UNFINISHED) for path in folder.iterdir())
    if found and not _is_earlier_output(folder):
        raise ValueError(f"--output {folder} is not empty and not an earlier demo's output; give another directory.")


def _is_earlier_output(folder: Path) -> bool:
    try:
        return json.loads((folder / METRICS).read_text())["kind"] == KIND
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_metrics(path: Path, results: Sequence[TaskResult], costs: Sequence[Cost], **others: object) -> None:
    figures = {
        "kind": KIND,
        **others,
        "accuracy": [asdict(result) for result in (*results, mean_result(results))],
        "training_step": [asdict(cost) for cost in costs],
    }
    path.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


def plot(path: Path, results: Sequence[TaskResult], costs: Sequence[Cost], subtitle: str) -> None:
    """Plot accuracy before and after by task, and one chart per column of the cost table."""
    from matplotlib.figure import Figure

    panels = [("saved for backward, MiB", [c.saved / MIB for c in costs])]
    panels += [("peak memory, MiB", [c.peak / MIB for c in costs]), ("seconds per step", [c.seconds for c in costs])]
    figure = Figure(figsize=(15, 4.5) if costs else (7, 4.5), layout="constrained")
    axes = figure.subplots(1, 4 if costs else 1, width_ratios=[2.4, 1, 1, 1] if costs else [1], squeeze=False)[0]

    shown = [*results, mean_result(results)]
    at = range(len(shown))
    grey, pale, strong = "#444444", "#b8c4d6", "#1f5fa8"
    axes[0].bar([x - 0.2 for x in at], [r.before for r in shown], 0.38, color=pale, label="before")
    axes[0].bar([x + 0.2 for x in at], [r.after for r in shown], 0.38, color=strong, label="after")
    axes[0].hlines(
        [r.majority for r in shown],
        [x - 0.42 for x in at],
        [x + 0.42 for x in at],
        colors=grey,
        linestyles="dashed",
        label="majority class",
    )
    axes[0].set(title="accuracy on held-out items", ylim=(0, 1))
    axes[0].set_xticks(list(at), [r.task for r in shown])
    axes[0].legend(ncols=3, loc="upper center", frameon=False)
    for axis, (title, values) in zip(axes[1:], panels, strict=False):
        bars = axis.bar(range(len(values)), values, color=[pale, pale, strong])
        axis.bar_label(bars, fmt="%.3g")
        axis.set_title(title)
        axis.set_xticks(range(len(values)), [c.method.replace(" ", "\n") for c in costs], fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(subtitle, fontsize=9, color=grey)
    figure.savefig(path, dpi=130)
