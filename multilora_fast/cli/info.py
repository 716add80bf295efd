"""The command ``info``."""

import json
from dataclasses import asdict
from typing import Annotated, Any

from typer import Option


def info(
    arch: Annotated[
        str | None,
        Option(help="GPU architecture whose kernel settings are shown, e.g. sm_90.", show_default="this GPU's"),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show versions, device, backend and, for a GPU, the tile (tokens by features), warps and pipeline stages of each
    Triton kernel."""
    import torch

    from multilora_fast.devices import choose_device, choose_dtype, environment
    from multilora_fast.models import cache_dir
    from multilora_fast.ops.backends import choose

    device = choose_device("auto")
    found = environment(device) | {
        "backend": choose(None, device),
        "cuda_build": torch.version.cuda,
        "demo_dtype": str(choose_dtype("auto", device)).removeprefix("torch."),
        "demo_cache": str(cache_dir()),
    }
    kernels = _kernel_rows(arch, device) if arch is not None or device.type == "cuda" else {}
    if kernels:
        from multilora_fast.kernels.plan import why_not

        found["no_launch_plans"] = why_not()
    if as_json:
        print(json.dumps(found | {"kernels": {row: asdict(config) for row, config in kernels.items()}}, indent=1))
        return
    why = found.pop("no_launch_plans", None)
    for name, value in (found.pop("versions") | found).items():
        print(f"{name.replace('_', ' '):<15} {value or 'none'}")
    if not kernels:
        print("kernels         not used on this device: torch matmuls run")
        return
    print(f"launch plans    {'replay the launches of a layer' if why is None else f'not used: {why}'}")
    print(f"\nkernels on {arch or torch.cuda.get_device_name(device)}, bfloat16, n·r = 96:")
    for row, config in kernels.items():
        print(f"  {row:<36} {config}")


def _kernel_rows(arch: str | None, device) -> dict[str, Any]:
    """The rows of the kernels' table, by tokens and use, with their configurations."""
    from itertools import product

    import torch

    from multilora_fast.kernels.configs import DEFAULT, TUNED_CONFIGS, device_of, find_row

    known = dict.fromkeys(key[3] for key in TUNED_CONFIGS if key[3] != DEFAULT)
    if arch not in (None, *known, DEFAULT):
        raise ValueError(f"--arch must be {', '.join(known)}, or {DEFAULT} for any other GPU, not {arch!r}.")
    arch = arch or device_of(torch.empty(0, device=device))[0]
    uses = product(("shrink", "expand", "reduce"), (8192, 2048, 512, 1), (False, True), (False, True))
    keys = dict.fromkeys(find_row(kernel, M, 96, torch.bfloat16, arch, add, drop) for kernel, M, add, drop in uses)
    return {"/".join(map(str, key)): TUNED_CONFIGS[key] for key in keys}
