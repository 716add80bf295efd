"""The plan as a table, a dict and a bar chart, and the sizes of GPUs."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from multilora_fast.console import table
from multilora_fast.files import atomic_file, check_plot
from multilora_fast.memory.methods import FULL, LORA, REFERENCE
from multilora_fast.memory.step import PHASES

UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
# GiB that the driver reports, rounded down.
GPUS = {
    "T4": 15, "V100-16GB": 16, "V100-32GB": 32, "RTX 3090": 24, "RTX 4090": 23, "RTX 5090": 31, "L4": 22, "A10": 22,
    "A10G": 22, "L40S": 44, "RTX A6000": 47, "A100-40GB": 39, "A100-80GB": 79, "H100": 79, "H200": 140, "B200": 178,
    "MI300X": 191,
}  # fmt: skip
HOPPER = ("H100", "H200")
KINDS = ("weights", "adapter", "optimizer", "gradients", "activations", "temporaries")
COLORS = ("#5b6770", "#e0a030", "#8d6cab", "#b5483a", "#1f5fa8", "#a9c4e0")


@dataclass(frozen=True)
class MethodPlan:
    """Bytes that one method holds. ``activations`` is all that the decoder layers keep for backward, ``logits`` the
    logits and what the loss keeps of them, ``gradients`` all of them; ``peak`` the most that is alive at once, in
    ``phase``, and ``at_peak`` what that is, by KINDS; ``workspace`` that part of the temporaries which is cuBLAS's own;
    ``largest_batch`` the rows that fit the device, None where none was named."""

    method: str
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    peak: int
    phase: str
    at_peak: dict[str, int]
    workspace: int = 0
    largest_batch: int | None = None

    @classmethod
    def of(cls, method: str, figures: dict[str, int], workspace: int = 0) -> "MethodPlan":
        phase = max(PHASES, key=figures.__getitem__)
        at_peak = {kind: figures[kind] for kind in ("weights", "adapter", "optimizer")}
        at_peak |= {kind: figures[f"{phase}: {kind}"] for kind in ("gradients", "activations")}
        peak = figures[phase] + workspace
        at_peak["temporaries"] = peak - sum(at_peak.values())
        sizes = {kind: figures[kind] for kind in (*KINDS[:-1], "logits")}
        return cls(method, **sizes, peak=peak, phase=phase, at_peak=at_peak, workspace=workspace)


@dataclass(frozen=True)
class MemoryPlan:
    """What :func:`plan_memory` found: ``asked`` holds its arguments, ``methods`` a :class:`MethodPlan` each, and
    ``refused`` why a method has none; ``notes`` is what else there is to say."""

    asked: dict[str, Any]
    methods: Sequence[MethodPlan]
    refused: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __getitem__(self, method: str) -> MethodPlan:
        """The row of ``method``; one that is refused is a ValueError, any other name a KeyError."""
        rows = {plan.method: plan for plan in self.methods}
        if method in self.refused:
            raise ValueError(f"{method} cannot adapt these modules: {self.refused[method]}")
        if method not in rows:
            raise KeyError(f"{method!r} is none of {', '.join(rows)}")
        return rows[method]

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON; all sizes in bytes."""
        methods = {plan.method: asdict(plan) for plan in self.methods}
        return {"asked": self.asked, "methods": methods, "refused": dict(self.refused), "notes": list(self.notes)}

    def __str__(self) -> str:
        return "\n".join([self.title(), "", self._peaks(), "", self._sizes(), "", *self._notes()])

    __repr__ = __str__

    def title(self) -> str:
        a = self.asked
        ranks = f" on each of {a['fsdp']} GPUs under FSDP2" if a["fsdp"] else ""
        times = f", {a['gradient_accumulation']} times a step" if a["gradient_accumulation"] > 1 else ""
        parts = [
            f"{a['model']}, {a['layers']} layers, {a['dtype']}"
            + (f", {a['quantization']}" if a["quantization"] else ""),
            f"batch {a['batch']} of {a['seq_len']} tokens{ranks}{times}"
            + (", checkpointing" if a["checkpointing"] else ""),
            f"{a['lora_num']} branches of rank {a['r']}, adapters in {a['adapter_dtype']}"
            + (f" (the {REFERENCE}'s in {a['dtype']})" if a["adapter_dtype"] != a["dtype"] else ""),
            f"dropout {a['lora_dropout']:g}, {a['optimizer']}, {a['device']}",
        ]
        return "; ".join(parts)

    def _peaks(self) -> str:
        unit, memory = _unit(self.methods), self.asked["device_memory"]
        header = [f"at the peak, {unit}", *KINDS, "peak", "reached in"]
        if memory is not None:
            header.append(f"largest batch in {shown_memory(memory)}")
        rows = []
        for plan in self.methods:
            last = [] if plan.largest_batch is None else [str(plan.largest_batch or "none")]
            rows.append([plan.method, *_cells((*plan.at_peak.values(), plan.peak), unit), plan.phase, *last])
        shown = table(header, rows, left=(0, header.index("reached in")), gap="  ")
        return "\n".join([shown, *(f"{method} cannot be: {reason}" for method, reason in self.refused.items())])

    def _sizes(self) -> str:
        unit = _unit(self.methods)
        header = [f"in full, {unit}", "activations", "logits", "gradients"]
        rows = [[p.method, *_cells((p.activations, p.logits, p.gradients), unit)] for p in self.methods]
        return table(header, rows, gap="  ")

    def _notes(self) -> list[str]:
        dtype, own = self.asked["dtype"], self.asked["adapter_dtype"]
        notes = [
            "A row adds up to its peak, but for rounding.",
            "Temporaries: all else alive then, such as the logits, the loss's copies of them, what operations work on.",
            "In full: what forward keeps for backward, and all gradients. They are not alive at the same time.",
        ]
        if own != dtype:
            notes.append(
                f"{LORA} casts its inputs to its adapters' {own} and keeps them so; with --adapter-dtype {dtype} "
                "nothing is cast. The README's tables are of equal dtypes."
            )
        if self.asked["quantization"]:
            notes.append(f"{FULL.capitalize()} and the {REFERENCE} cannot train a quantized base: theirs is dense.")
        workspace = self.methods[0].workspace
        if workspace:
            notes.append(f"Of the temporaries {shown_memory(workspace)} are cuBLAS's workspaces.")
        if self.asked["fsdp"]:
            notes.append("All sizes are those of the first GPU. Gathered weights are among the temporaries.")
        if self.asked["device_memory"] is not None:
            notes.append(f"Of the device's memory {self.asked['headroom']:.0%} is left free.")
        return [*notes, *self.notes]

    def plot(self, path: str | Path) -> Path:
        """Write a bar chart of the peaks, by kind; the format is the path's suffix: .png, .pdf or .svg.

        Raises:
            ValueError: no path, another suffix, no such directory, or matplotlib is not installed.
        """
        check_plot("path", path)
        path = Path(path)
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ValueError("plot needs matplotlib: run pip install matplotlib.") from error
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        axis: Any = figure.subplots()
        unit = _unit(self.methods)
        names = [plan.method for plan in self.methods]
        left = [0.0] * len(names)
        for kind, color in zip(KINDS, COLORS, strict=True):
            sizes = [plan.at_peak[kind] / _SIZE[unit] for plan in self.methods]
            shows = any(round(size, _DIGITS[unit]) for size in sizes)
            label = kind if shows else f"_{kind}"  # which the legend leaves out
            axis.barh(names, sizes, left=left, label=label, color=color, height=0.62)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        axis.bar_label(axis.containers[-1], [f"{total:,.{_DIGITS[unit]}f}" for total in left], padding=4)
        memory = self.asked["device_memory"]
        if memory is not None:
            axis.axvline(memory / _SIZE[unit], color="black", linestyle="--", linewidth=1)
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set(xlabel=f"{unit} at the peak of a training step")
        axis.set_title("\n".join(_halves(self.title())), fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=len(KINDS), frameon=False, fontsize=8)
        with atomic_file(path) as unfinished:
            figure.savefig(unfinished, dpi=140, format=path.suffix[1:])
        return path


def parse_memory(value: int | str) -> int:
    """Bytes of an int of them, of a size with its unit, such as "24GiB", or of a GPU by its name.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    text = str(value)
    size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    if isinstance(value, str) and size and size[2] in UNITS and float(size[1]) > 0:
        return int(float(size[1]) * UNITS[size[2]])
    known = {_plain(name): gib for name, gib in GPUS.items()}
    if isinstance(value, str) and _plain(text) in known:
        return known[_plain(text)] * 2**30
    raise ValueError(f'device_memory must be a size such as "24GiB", or one of {", ".join(GPUS)}, not {value!r}.')


def cublas_workspaces(device_memory: int | str | None) -> int:
    """Bytes that PyTorch takes for cuBLAS and cuBLASLt on a Hopper GPU, which ``device_memory`` names, or which is in
    this machine where it names none: 32 MiB each. 0 for others, where they were not measured."""
    named = isinstance(device_memory, str) and _plain(device_memory) in map(_plain, GPUS)
    if named:
        hopper = _plain(str(device_memory)) in map(_plain, HOPPER)
    else:
        hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return 2 * 32 * 2**20 if hopper else 0


_SIZE = {"GiB": 2**30, "MiB": 2**20}
_DIGITS = {"GiB": 2, "MiB": 1}


def shown_memory(size: int) -> str:
    """25769803776 as "24 GiB"."""
    unit = next((unit for unit in _SIZE if size >= _SIZE[unit]), None)
    return f"{size:,} bytes" if unit is None else f"{round(size / _SIZE[unit], 2):g} {unit}"


def _unit(methods: Sequence[MethodPlan]) -> str:
    return "GiB" if max(plan.peak for plan in methods) >= 2**30 else "MiB"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("nvidia"))


def _cells(sizes: Iterable[int], unit: str) -> list[str]:
    return [f"{size / _SIZE[unit]:,.{_DIGITS[unit]}f}" for size in sizes]


def _halves(title: str) -> list[str]:
    parts = title.split("; ")
    return ["; ".join(parts[:2]), "; ".join(parts[2:])]
