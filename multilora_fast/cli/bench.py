"""The ``bench`` command. Invalid input raises a ValueError of one sentence."""

import json
from dataclasses import asdict
from typing import Annotated, Any

from typer import Option

from multilora_fast.console import MIB, quiet, table


def bench(
    in_features: Annotated[int | None, Option(help="Input features, K.", show_default="4096, on a CPU 2048")] = None,
    out_features: Annotated[int | None, Option(help="Output features, N.", show_default="in_features")] = None,
    tokens: Annotated[int | None, Option(help="Tokens, M.", show_default="8192, on a CPU 1024")] = None,
    lora_num: Annotated[int, Option(help="Parallel branches, n.")] = 3,
    r: Annotated[int, Option(help="Rank of each branch; LoRA gets n times as much.")] = 32,
    lora_dropout: Annotated[float, Option(help="Dropout before the branches.")] = 0.0,
    dtype: Annotated[str, Option(help="Layer dtype: float32, bfloat16, or auto (by device).")] = "auto",
    device: Annotated[str, Option(help="Device: auto, cpu or cuda.")] = "auto",
    rounds: Annotated[int, Option(help="Timed rounds; methods alternate in each.")] = 15,
    as_json: Annotated[bool, Option("--json", help="Print one JSON document, in seconds and bytes.")] = False,
) -> None:
    """Time one linear layer frozen, with the naive loop, with PEFT LoRA and with this library. Results are checked."""
    from multilora_fast.devices import choose_device, choose_dtype, environment
    from multilora_fast.validation import check_hyperparameters, check_integer

    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    default_features, default_tokens = (2048, 1024) if place.type == "cpu" else (4096, 8192)
    in_features = default_features if in_features is None else in_features
    out_features = in_features if out_features is None else out_features
    tokens = default_tokens if tokens is None else tokens
    layer: dict[str, Any] = {"tokens": tokens, "in_features": in_features, "out_features": out_features}
    for name, value in {**layer, "rounds": rounds}.items():
        check_integer(f"--{name.replace('_', '-')}", value, least=1)
    check_hyperparameters(r=r, lora_num=lora_num, lora_dropout=lora_dropout)

    quiet()
    import torch

    from multilora_fast.benchmark.layer import measure
    from multilora_fast.ops.backends import choose

    layer |= {"lora_num": lora_num, "r": r, "lora_dropout": lora_dropout, "dtype": str(kind).removeprefix("torch.")}
    layer |= {"backend": choose(None, place), "rounds": rounds}
    sizes: dict[str, Any] = {"tokens": tokens, "n": lora_num, "r": r, "p": lora_dropout, "rounds": rounds}
    try:
        found = measure(in_features, out_features, **sizes, dtype=kind, device=str(place))
    except RuntimeError as error:  # a CPU's out of memory has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise ValueError(f"the layer does not fit the memory of {place}: take fewer --tokens.") from error
    if as_json:
        costs = {name: asdict(cost) for name, cost in found.items()}
        print(json.dumps({"layer": layer, "environment": environment(place), "costs": costs}, indent=1))
    else:
        _print_table(layer, environment(place), found)


def _print_table(layer: dict[str, Any], where: dict[str, Any], found: dict) -> None:
    from multilora_fast.benchmark.layer import DIRECTIONS, LORA

    def cell(value: float, lora: float, unit: float) -> str:
        return f"{value / unit:.2f} ({value / lora:.2f}x)"

    lora = found[LORA]
    rows = [
        [name]
        + [cell(cost.seconds[direction], lora.seconds[direction], 1e-3) for direction in DIRECTIONS]
        + [cell(cost.saved, lora.saved, MIB), cell(cost.peak, lora.peak, MIB)]
        for name, cost in found.items()
    ]
    n, r = layer["lora_num"], layer["r"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    print(
        f"nn.Linear({layer['in_features']}, {layer['out_features']}) in {layer['dtype']}, {layer['tokens']} tokens; "
        f"{n} branches of rank {r}, LoRA of rank {n * r}, dropout {layer['lora_dropout']:g}\n"
        f"{where['device']} ({where['hardware']}), {where['threads']} threads, backend {layer['backend']}; {versions}\n"
    )
    print(table(("one layer", "forward, ms", "backward, ms", "both, ms", "saved, MiB", "peak, MiB"), rows))
    print(f"Medians of {layer['rounds']} interleaved rounds; in brackets: relative to PEFT LoRA.")
    print("Saved: bytes kept for backward, x included. Peak: tensors alive at once beyond weights, x and dy.")
