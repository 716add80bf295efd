"""``multilora-fast spectrum``: singular values of the updates in adapters, or of models that were fine-tuned whole."""

from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Annotated

import typer


def spectrum(
    adapters: Annotated[
        list[Path],
        typer.Argument(help="Directories of MultiLoRA or LoRA adapters; with --base, also of fine-tuned models."),
    ],
    base: Annotated[
        str | None, typer.Option(help="The model that fine-tuned models came from, as a directory or hub id.")
    ] = None,
    modules: Annotated[
        str | None, typer.Option(help="Modules, by the end of their names, with commas.", show_default="all")
    ] = None,
    top: Annotated[int, typer.Option(help="Directions that are compared between two updates.")] = 8,
    plot: Annotated[Path | None, typer.Option(help="PNG of the key and value projections' histograms.")] = None,
) -> None:
    """Say how many directions the updates of adapters use, how balanced they are, and how far two updates agree."""
    _check(adapters, top, plot)
    from multilora_fast.demo.report import table
    from multilora_fast.spectrum import by_kind, save_histograms, singular_values

    wanted = None if modules is None else [name.strip() for name in modules.split(",") if name.strip()]
    labels = [path.name for path in adapters]
    if len(set(labels)) < len(labels):
        labels = list(map(str, adapters))
    sources = [_source(path, base) for path in adapters]
    spectra = {
        label: by_kind(singular_values(source, modules=wanted, **options))
        for label, (source, options) in zip(labels, sources, strict=True)
    }
    print(table(("update", "projection", "modules", *MEASURES), _rows(spectra)))
    print("Means over the modules. With p each singular value's share of their sum, effective rank is exp(-Σ p log p).")
    if len(adapters) > 1:
        print(f"\n{table(('overlap', 'projection', 'output', 'input'), _overlaps(labels, sources, wanted, top))}")
        print(f"Share of the smaller of two subspaces of up to {top} leading directions that lies in the other.")
        print("By chance: their dimension over that of the space, about.")
    if plot is not None:
        shown = {label: {kind: one[kind] for kind in _shown(spectra) if kind in one} for label, one in spectra.items()}
        save_histograms(plot, shown)
        print(f"\nWrote {plot}.")


MEASURES = ("rank", "effective rank", "top share", "largest")


def _check(adapters: list[Path], top: int, plot: Path | None) -> None:
    """Raise ValueError for what would fail after the slow part."""
    if top < 1:
        raise ValueError(f"--top must be at least 1, not {top}.")
    repeated = [path for i, path in enumerate(adapters) if path in adapters[:i]]
    if repeated:
        raise ValueError(f"{repeated[0]} is given twice.")
    if plot is None:
        return
    if plot.suffix != ".png":
        raise ValueError(f"--plot must end in .png, but is {plot}.")
    if not plot.absolute().parent.is_dir():
        raise ValueError(f"--plot {plot}: no such directory.")
    if find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: run pip install matplotlib.")


def _source(path: Path, base: str | None) -> tuple:
    """The source and the keyword arguments that spectrum's functions take for a directory."""
    import torch

    from multilora_fast.adapters import CONFIG
    from multilora_fast.demo.model import load_model

    if (path / CONFIG).exists() or not (path / "config.json").exists():
        return path, {}
    if base is None:
        raise ValueError(f"{path} holds a model, not an adapter: name the model it was fine-tuned from with --base.")
    before, after = (load_model(name, torch.float32, torch.device("cpu")) for name in (base, str(path.absolute())))
    return after, {"base": before}


def _rows(spectra: dict[str, dict]) -> list[tuple[str, ...]]:
    from multilora_fast.spectrum import effective_rank, numerical_rank, top_share

    rows = []
    for label, kinds in spectra.items():
        for kind, values in kinds.items():
            rank, effective, share, largest = (
                sum(map(measure, values)) / len(values)
                for measure in (numerical_rank, effective_rank, top_share, lambda v: v.max().item())
            )
            figures = (f"{rank:.0f}", f"{effective:.1f}", f"{share:.3f}", f"{largest:.3g}")
            rows.append((label, kind, str(len(values)), *figures))
    return rows


def _overlaps(labels: list[str], sources: list[tuple], modules: list[str] | None, top: int) -> list[tuple[str, ...]]:
    """Of every pair, by projection, the mean over the modules that both adapt, on the output side and the input's."""
    from multilora_fast.spectrum import directions, overlap

    found = [directions(source, top=top, modules=modules, **options) for source, options in sources]
    rows = []
    for (one, first), (other, second) in combinations(zip(labels, found, strict=True), 2):
        kinds: dict[str, list[tuple[float, float]]] = {}
        for name in first:
            if name in second:
                pair = tuple(overlap(a, b) for a, b in zip(first[name], second[name], strict=True))
                kinds.setdefault(name.rpartition(".")[2], []).append(pair)
        for kind, pairs in kinds.items():
            output, given = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
            rows.append((f"{one} / {other}", kind, f"{output:.3f}", f"{given:.3f}"))
    return rows


def _shown(spectra: dict[str, dict]) -> list[str]:
    """The key and value projections, or every projection where there are none."""
    kinds = list(dict.fromkeys(kind for one in spectra.values() for kind in one))
    return [kind for kind in kinds if kind in ("k_proj", "v_proj")] or kinds
