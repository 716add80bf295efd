"""The plan as a table, a dict and a bar chart."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from multilora_fast.console import table
from multilora_fast.files import atomic_file, check_matplotlib, check_plot
from multilora_fast.memory.methods import FULL, LORA, REFERENCE
from multilora_fast.memory.step import PHASES

UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
KINDS = ("weights", "adapter", "optimizer", "gradients", "activations", "temporaries")
COLORS = ("#5b6770", "#e0a030", "#8d6cab", "#b5483a", "#1f5fa8", "#a9c4e0")


@dataclass(frozen=True)
class MethodPlan:
    """Bytes that one method holds.

    ``activations`` is what the decoder layers keep for backward, ``logits`` the logits and what the loss keeps of them,
    ``gradients`` all gradients. ``peak`` is the most alive at once, in ``phase``; ``at_peak`` splits it by KINDS, and
    ``workspace`` is cuBLAS's part of its temporaries. ``largest_batch`` is the rows that fit ``device_memory``, None if
    it was not given.
    """

    method: str
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    peak: int
    phase: str
    at_peak: dict[str, int]
    largest_batch: int | None = None

    @classmethod
    def of(cls, method: str, figures: dict[str, int]) -> "MethodPlan":
        """From the figures of :meth:`~multilora_fast.memory.step.Step.count`."""
        phase = max(PHASES, key=figures.__getitem__)
        at_peak = {kind: figures[kind] for kind in ("weights", "adapter", "optimizer")}
        at_peak |= {kind: figures[f"{phase}: {kind}"] for kind in ("gradients", "activations")}
        at_peak["temporaries"] = figures[phase] - sum(at_peak.values())
        sizes = {kind: figures[kind] for kind in (*KINDS[:-1], "logits", "workspace")}
        return cls(method, **sizes, peak=figures[phase], phase=phase, at_peak=at_peak)


@dataclass(frozen=True)
class MemoryPlan:
    """The result of :func:`plan_memory`: its arguments (``asked``), a :class:`MethodPlan` per method (``methods``), the
    reason why a method has none (``refused``), and warnings (``notes``)."""

    asked: dict[str, Any]
    methods: Sequence[MethodPlan]
    refused: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __getitem__(self, method: str) -> MethodPlan:
        """The row of ``method``. Raises ValueError for a refused one, KeyError for any other name."""
        if method in self.refused:
            raise ValueError(f"{method} cannot adapt these modules: {self.refused[method]}")
        return {plan.method: plan for plan in self.methods}[method]

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON, sizes in bytes."""
        methods = {plan.method: asdict(plan) for plan in self.methods}
        return {"asked": self.asked, "methods": methods, "refused": dict(self.refused), "notes": list(self.notes)}

    def __str__(self) -> str:
        refused = [f"{method} cannot adapt these modules: {reason}" for method, reason in self.refused.items()]
        return "\n".join([self.title(), "", self._peaks(), *refused, "", self._sizes(), "", *self._notes()])

    __repr__ = __str__

    def title(self) -> str:
        a = self.asked
        ranks = f" on each of {a['fsdp']} GPUs under FSDP2" if a["fsdp"] else ""
        times = f", {a['gradient_accumulation']} times a step" if a["gradient_accumulation"] > 1 else ""
        quantized = f", {a['quantization']}" if a["quantization"] else ""
        checkpointing = ", checkpointing" if a["checkpointing"] else ""
        loop = f" (the {REFERENCE}'s in {a['dtype']})" if a["adapter_dtype"] != a["dtype"] else ""
        return (
            f"{a['model']}, {a['layers']} layers, {a['dtype']}{quantized}; "
            f"batch {a['batch']} of {a['seq_len']} tokens{ranks}{times}{checkpointing}; "
            f"{a['lora_num']} branches of rank {a['r']}, adapters in {a['adapter_dtype']}{loop}; "
            f"dropout {a['lora_dropout']:g}, {a['optimizer']}, {a['device']}"
        )

    def _unit(self) -> tuple[str, int, int]:
        """The unit of the sizes, its bytes, and the decimals to show."""
        return ("GiB", 2**30, 2) if max(plan.peak for plan in self.methods) >= 2**30 else ("MiB", 2**20, 1)

    def _cells(self, sizes: Iterable[int]) -> list[str]:
        _, unit, decimals = self._unit()
        return [f"{size / unit:,.{decimals}f}" for size in sizes]

    def _peaks(self) -> str:
        memory = self.asked["device_memory"]
        header = [f"at the peak, {self._unit()[0]}", *KINDS, "peak", "phase"]
        if memory is not None:
            header.append(f"largest batch in {memory / 2**30:.4g} GiB")
        rows = []
        for plan in self.methods:
            batch = [] if plan.largest_batch is None else [str(plan.largest_batch or "none fits")]
            rows.append([plan.method, *self._cells((*plan.at_peak.values(), plan.peak)), plan.phase, *batch])
        return table(header, rows, left=(0, header.index("phase")), gap="  ")

    def _sizes(self) -> str:
        header = [f"in full, {self._unit()[0]}", "activations", "logits", "gradients"]
        rows = [[p.method, *self._cells((p.activations, p.logits, p.gradients))] for p in self.methods]
        return table(header, rows, gap="  ")

    def _notes(self) -> list[str]:
        dtype, own = self.asked["dtype"], self.asked["adapter_dtype"]
        notes = [
            "Temporaries: all else alive at the peak, such as logits, the loss's copies of them and work buffers.",
            "In full: all that forward keeps for backward, and all gradients. They are not alive at the same time.",
        ]
        if own != dtype:
            notes.append(
                f"{LORA} casts its inputs to its adapters' {own} and keeps the copies; --adapter-dtype {dtype} avoids "
                "that. The README's tables are of equal dtypes."
            )
        if self.asked["quantization"]:
            notes.append(f"{FULL.capitalize()} and the {REFERENCE} cannot train a quantized base: theirs is dense.")
        if self.asked["fsdp"]:
            notes.append("All sizes are those of the first GPU. Gathered weights are among the temporaries.")
        if self.asked["device_memory"] is not None:
            notes.append(f"{self.asked['headroom']:.0%} of the device's memory is left free.")
        return [*notes, *self.notes]

    def plot(self, path: str | Path) -> Path:
        """Write a bar chart of the peaks by kind, as .png, .pdf or .svg by the path's suffix.

        Raises:
            ValueError: no path, another suffix, no such directory, or matplotlib is not installed.
        """
        check_plot("path", path)
        path = Path(path)
        check_matplotlib("plot")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.8), layout="constrained")
        axis: Any = figure.subplots()
        name, unit, _ = self._unit()
        methods = [plan.method for plan in self.methods]
        left = [0.0] * len(methods)
        for kind, color in zip(KINDS, COLORS, strict=True):
            sizes = [plan.at_peak[kind] / unit for plan in self.methods]
            axis.barh(methods, sizes, left=left, label=kind, color=color, height=0.62)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        axis.bar_label(axis.containers[-1], self._cells(plan.peak for plan in self.methods), padding=4)
        if self.asked["device_memory"] is not None:
            axis.axvline(self.asked["device_memory"] / unit, color="black", linestyle="--", linewidth=1)
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set(xlabel=f"{name} at the peak of a training step")
        axis.set_title(textwrap.fill(self.title(), 110), fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=len(KINDS), frameon=False, fontsize=8)
        with atomic_file(path) as unfinished:
            figure.savefig(unfinished, dpi=140, format=path.suffix[1:])
        return path


def parse_memory(value: int | str) -> int:
    """Bytes of an int of them, or of a size with its unit, such as "24GiB".

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", value.lower()) if isinstance(value, str) else None
    if size and size[2] in UNITS and float(size[1]) > 0:
        return int(float(size[1]) * UNITS[size[2]])
    raise ValueError(f'device_memory must be a size such as "24GiB", or an int of bytes, not {value!r}.')
