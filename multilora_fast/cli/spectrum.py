"""The command ``spectrum``: singular values of the updates of adapters and of fully fine-tuned models."""

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from multilora_fast.cli.paths import given_path
from multilora_fast.files import check_file, check_matplotlib


def spectrum(
    adapters: Annotated[
        list[Path],
        Argument(
            help="Directories of MultiLoRA or LoRA adapters; with --base, also of fine-tuned models.", parser=given_path
        ),
    ],
    base: Annotated[str | None, Option(help="Base model of fine-tuned models, a directory or hub id.")] = None,
    modules: Annotated[
        str | None, Option(help="Comma-separated names of modules, or their ends.", show_default="all")
    ] = None,
    top: Annotated[int, Option(help="Number of leading directions to compare between updates.")] = 8,
    plot: Annotated[Path | None, Option(help="Output PNG with histograms of the key and value projections.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print the figures as one JSON document.")] = False,
) -> None:
    """Show the rank and balance of adapters' updates, and the overlap of their leading directions."""
    _check(adapters, top, plot)
    from multilora_fast.spectrum import by_kind, save_histograms, singular_values

    wanted = None if modules is None else [name.strip() for name in modules.split(",") if name.strip()]
    labels = [path.name for path in adapters]
    if len(set(labels)) < len(labels):
        labels = list(map(str, adapters))
    sources = [_source(path, base) for path in adapters]
    if base is not None and not any(options for _, options in sources):
        raise ValueError(f"--base {base} is for fine-tuned models, but every directory holds an adapter.")
    spectra = {
        label: by_kind(singular_values(source, modules=wanted, **options))
        for label, (source, options) in zip(labels, sources, strict=True)
    }
    measured = _measured(spectra)
    overlaps = _overlaps(labels, sources, wanted, top) if len(adapters) > 1 else []
    if as_json:
        print(json.dumps({"updates": measured, "overlaps": overlaps, "top": top}, indent=1))
    else:
        _print_tables(measured, overlaps, top)
    if plot is not None:
        shown = ("k_proj", "v_proj")
        save_histograms(plot, {label: {k: one[k] for k in shown if k in one} or one for label, one in spectra.items()})
        print(f"wrote {plot}", file=sys.stderr if as_json else sys.stdout)


def _print_tables(measured: list[dict], overlaps: list[dict], top: int) -> None:
    from multilora_fast.console import table

    form = {"rank": "{:.0f}", "effective_rank": "{:.1f}", "top_share": "{:.3f}", "largest": "{:.3g}"}
    form |= {"output": "{:.3f}", "input": "{:.3f}"}

    def rows(figures: list[dict]) -> list[list[str]]:
        return [[form.get(name, "{}").format(value) for name, value in row.items()] for row in figures]

    print(table([name.replace("_", " ") for name in measured[0]], rows(measured)))
    print("Means over the modules. With p each singular value's share of their sum, effective rank is exp(-Σ p log p),")
    print("and top share is the largest p.")
    if overlaps:
        print(f"\n{table(list(overlaps[0]), rows(overlaps))}")
        print(f"Share of the smaller of two subspaces of up to {top} leading directions that lies in the other.")
        print("Random subspaces overlap by about their dimension over that of the space.")


def _check(adapters: list[Path], top: int, plot: Path | None) -> None:
    """Raise ValueError for arguments that would fail after the slow part."""
    if top < 1:
        raise ValueError(f"--top must be at least 1, not {top}.")
    repeated = [path for i, path in enumerate(adapters) if path in adapters[:i]]
    if repeated:
        raise ValueError(f"{repeated[0]} is given twice.")
    if plot is None:
        return
    if plot.suffix != ".png":
        raise ValueError(f"--plot must end in .png, but is {plot}.")
    check_file("--plot", plot)
    check_matplotlib("--plot")


def _source(path: Path, base: str | None) -> tuple:
    """The source in a directory, and the keyword arguments that go with it."""
    import torch

    from multilora_fast.adapters.files import CONFIG
    from multilora_fast.models import load_model

    if (path / CONFIG).exists() or not (path / "config.json").exists():
        return path, {}
    if base is None:
        raise ValueError(f"{path} holds a model, not an adapter: name the model it was fine-tuned from with --base.")
    before, after = (load_model(name, torch.float32, torch.device("cpu")) for name in (base, str(path.absolute())))
    return after, {"base": before}


def _measured(spectra: dict[str, dict]) -> list[dict]:
    """A row per update and projection: means over its modules."""
    from multilora_fast.spectrum import effective_rank, numerical_rank, top_share

    measures = {
        "rank": numerical_rank,
        "effective_rank": effective_rank,
        "top_share": top_share,
        "largest": lambda v: v.max().item(),
    }
    return [
        {"update": label, "projection": kind, "modules": len(values)}
        | {name: sum(map(measure, values)) / len(values) for name, measure in measures.items()}
        for label, kinds in spectra.items()
        for kind, values in kinds.items()
    ]


def _overlaps(labels: list[str], sources: list[tuple], modules: list[str] | None, top: int) -> list[dict]:
    """A row per pair and projection: mean overlap on the output and input sides, over the modules that both adapt."""
    from multilora_fast.spectrum import directions, overlap

    found = [directions(source, top=top, modules=modules, **options) for source, options in sources]
    rows = []
    for (one, first), (other, second) in combinations(zip(labels, found, strict=True), 2):
        kinds: dict[str, list[list[float]]] = {}
        for name in filter(second.__contains__, first):
            shapes = [(len(U), len(V)) for U, V in (first[name], second[name])]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{one} and {other} are of different models: {name} is {shapes[0]} and {shapes[1]}.")
            sides = [overlap(a, b) for a, b in zip(first[name], second[name], strict=True)]
            kinds.setdefault(name.rpartition(".")[2], []).append(sides)
        for kind, pairs in kinds.items():
            output, given = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
            rows.append({"overlap": f"{one} / {other}", "projection": kind, "output": output, "input": given})
    return rows
