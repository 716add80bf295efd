"""The command line: ``multilora-fast demo | train | export | merge | info``; heavy imports wait for the command."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from multilora_fast.cli_adapters import export, merge
from multilora_fast.cli_train import train

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
ClickException = typer.BadParameter.__mro__[2]  # click's, or that of the copy of click inside newer typer


@app.callback()
def multilora_fast() -> None:
    """MultiLoRA: parallel LoRA branches with learned scales, at the cost of LoRA."""


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id of a causal LM.", show_default="the packaged SmolLM2-135M")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.", show_default="160, quick: 6")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 8,
    max_length: Annotated[int, typer.Option(help="Longest example in tokens; longer ones are left out.")] = 160,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 2e-3,
    lora_num: Annotated[int, typer.Option(help="Parallel branches per layer, n.")] = 3,
    r: Annotated[int, typer.Option(help="Rank of each branch.")] = 8,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Branches are scaled by alpha / r.", show_default="r")
    ] = None,
    lora_dropout: Annotated[float, typer.Option(help="Dropout before the branches.")] = 0.05,
    target_modules: Annotated[
        str, typer.Option(help="Names of the linear layers to adapt, with commas.")
    ] = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
    dtype: Annotated[
        str, typer.Option(help="Of the base: float32, bfloat16, or auto for bfloat16 where it is native.")
    ] = "auto",
    eval_items: Annotated[
        int | None, typer.Option(help="Held-out items per task.", show_default="100, quick: 8")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the items drawn, their order and the branches.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output: Annotated[Path, typer.Option(help="Directory for the adapter, metrics.json and comparison.png.")] = Path(
        "demo-output"
    ),
    compare: Annotated[bool, typer.Option(help="Compare with naive MultiLoRA and PEFT LoRA.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="A run of about a minute that claims no accuracy.")] = False,
) -> None:
    """Fine-tune a small model on four real tasks and compare the cost of a step with LoRA's."""
    from multilora_fast.demo.settings import Settings

    settings = Settings(
        model=model,
        steps=steps if steps is not None else 6 if quick else 160,
        batch_size=batch_size,
        max_length=max_length,
        learning_rate=learning_rate,
        lora_num=lora_num,
        r=r,
        lora_alpha=r if lora_alpha is None else lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=tuple(name.strip() for name in target_modules.split(",") if name.strip()),
        dtype=dtype,
        eval_items=eval_items if eval_items is not None else 8 if quick else 100,
        seed=seed,
        device=device,
        output=output,
        rounds=0 if not compare else 2 if quick else 5,
    )
    settings.check()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries about each other
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # where installed, it is loaded but not used
    print("Loading torch and transformers ...", flush=True)
    from multilora_fast.demo.run import run

    run(settings)
    if quick:
        print("This was a quick run: too short for its accuracies and times to mean anything.")


@app.command()
def info(
    arch: Annotated[
        str | None, typer.Option(help="Show the kernels' rows for it, e.g. sm_90.", show_default="this device's")
    ] = None,
) -> None:
    """Versions, device, the backend that would run on it, and the kernels' configurations."""
    import torch

    from multilora_fast.backends import choose
    from multilora_fast.demo.model import cache_dir
    from multilora_fast.demo.report import environment
    from multilora_fast.devices import choose_device, choose_dtype

    device = choose_device("auto")
    found = environment(device)
    rows = {name: version or "not installed" for name, version in found["versions"].items()}
    rows |= {"python": found["python"], "device": f"{found['device']} ({found['hardware']})"}
    rows |= {"threads": found["threads"], "backend": choose(None, device)}
    rows |= {"demo dtype": str(choose_dtype("auto", device)).removeprefix("torch."), "demo cache": cache_dir()}
    rows |= {"CUDA build": torch.version.cuda or "no"}
    for name, value in rows.items():
        print(f"{name:<15} {value}")
    if arch is None and device.type != "cuda":
        print("kernels         not used on this device: torch matmuls run")
        return
    print(f"\nkernels on {arch or torch.cuda.get_device_name(device)}, bfloat16, n·r = 96:")
    for line in _kernel_rows(arch, device):
        print(line)


def _kernel_rows(arch: str | None, device) -> list[str]:
    """The table row that each kernel takes for many tokens and for few."""
    import torch

    from multilora_fast.kernels.configs import ROWS, device_of, find_row

    arch = arch or device_of(torch.empty(0, device=device))[0]
    uses = ((kernel, M) for kernel in ("shrink", "expand", "reduce") for M in (8192, 1))
    keys = dict.fromkeys(find_row(kernel, M, 96, torch.bfloat16, arch) for kernel, M in uses)
    return [f"  {'/'.join(map(str, key)):<36} {ROWS[key]}" for key in keys]


app.command()(train)
app.command()(export)
app.command()(merge)


def main() -> None:
    """Run the app; a mistake in what was asked is one line on stderr and exit code 2."""
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except ClickException as error:
        _fail(error.format_message())
    except ValueError as error:
        _fail(str(error))
    except (typer.Abort, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"multilora-fast: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
