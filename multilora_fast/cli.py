"""The command line: ``multilora-fast`` and the names under it. Heavy imports wait for a command."""

import json
import logging
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from multilora_fast import __version__
from multilora_fast.cli_adapters import export, merge
from multilora_fast.cli_bench import bench
from multilora_fast.cli_plan import plan
from multilora_fast.cli_spectrum import spectrum
from multilora_fast.cli_train import train

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
ClickException: Any = typer.BadParameter.__mro__[2]  # click's, or that of the copy of click inside newer typer


def _version(wanted: bool) -> None:
    if wanted:
        print(f"multilora-fast {__version__}")
        raise typer.Exit


@app.callback()
def multilora_fast(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """MultiLoRA: parallel LoRA branches with learned scales inside one adapter, at the cost of LoRA."""


def _command(short: str, *examples: str) -> Any:
    """A command with its line in the list of all, and with examples under its help."""
    lines = "\n".join(f"  multilora-fast {example}" for example in examples)
    title = "Examples" if len(examples) > 1 else "Example"
    return app.command(short_help=short, epilog=f"\b\n{title}:\n{lines}")


@_command("Fine-tune a small model on four tasks, against LoRA.", "demo --quick", "demo --steps 320 --output run")
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
    quick: Annotated[bool, typer.Option("--quick", help="A run of a minute or two that claims no accuracy.")] = False,
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


@_command("Show versions, device, backend and kernel settings.", "info", "info --arch sm_90 --json")
def info(
    arch: Annotated[
        str | None,
        typer.Option(help="GPU architecture to show the kernels' settings for, e.g. sm_90.", show_default="this GPU's"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show versions, device, the backend that would run on it, and what each Triton kernel runs with on a GPU: its
    tile of tokens by features, warps and pipeline stages."""
    import torch

    from multilora_fast.backends import choose
    from multilora_fast.demo.model import cache_dir
    from multilora_fast.demo.report import environment
    from multilora_fast.devices import choose_device, choose_dtype

    device = choose_device("auto")
    found = environment(device)
    found |= {"backend": choose(None, device), "cuda_build": torch.version.cuda}
    found |= {"demo_dtype": str(choose_dtype("auto", device)).removeprefix("torch."), "demo_cache": str(cache_dir())}
    kernels = _kernel_rows(arch, device) if arch is not None or device.type == "cuda" else {}
    if as_json:
        print(json.dumps(found | {"kernels": {row: asdict(config) for row, config in kernels.items()}}, indent=1))
        return
    rows = {name: version or "not installed" for name, version in found["versions"].items()}
    rows |= {"python": found["python"], "device": f"{found['device']} ({found['hardware']})"}
    rows |= {"threads": found["threads"], "backend": found["backend"]}
    rows |= {"demo dtype": found["demo_dtype"], "demo cache": found["demo_cache"]}
    rows |= {"CUDA build": found["cuda_build"] or "no"}
    for name, value in rows.items():
        print(f"{name:<15} {value}")
    if not kernels:
        print("kernels         not used on this device: torch matmuls run")
        return
    print(f"\nkernels on {arch or torch.cuda.get_device_name(device)}, bfloat16, n·r = 96:")
    for row, config in kernels.items():
        print(f"  {row:<36} {config}")


def _kernel_rows(arch: str | None, device) -> dict[str, Any]:
    """The table row that each kernel takes for many tokens and for few, and its configuration."""
    import torch

    from multilora_fast.kernels.configs import ARCHITECTURES, DEFAULT, LARGE, TUNED_CONFIGS, device_of, find_row

    known = dict.fromkeys(
        name for name in (*ARCHITECTURES, *(key[3] for key in TUNED_CONFIGS)) if name not in (DEFAULT, LARGE)
    )
    if arch not in (None, *known, DEFAULT):
        raise ValueError(f"--arch must be {', '.join(known)}, or {DEFAULT} for any other GPU, not {arch!r}.")
    arch = arch or device_of(torch.empty(0, device=device))[0]
    uses = ((kernel, M) for kernel in ("shrink", "expand", "reduce") for M in (8192, 1))
    keys = dict.fromkeys(find_row(kernel, M, 96, torch.bfloat16, arch) for kernel, M in uses)
    return {"/".join(map(str, key)): TUNED_CONFIGS[key] for key in keys}


_command(
    "Say what a training step will hold, by method.",
    "plan MODEL --batch 4 --seq-len 2048",
    "plan MODEL --gpu H100 --quantization 4bit --json",
)(plan)
_command(
    "Fine-tune a model on tasks in JSONL files.",
    "train boolq.jsonl rte.jsonl --model MODEL --output out",
    "train --task math=gsm8k.jsonl --model MODEL --output out --resume",
)(train)
_command("Write an adapter as a plain LoRA.", "export out lora", "export out lora --model MODEL --json")(export)
_command("Make one adapter of several LoRAs.", "merge lora-a lora-b --weights 1,0.5 --output sum")(merge)
_command(
    "Show singular values of what training changed.",
    "spectrum out lora --modules k_proj,v_proj --plot spectrum.png",
    "spectrum tuned-model --base MODEL",
)(spectrum)
_command(
    "Time one layer here, against the loop and LoRA.",
    "bench",
    "bench --in-features 4096 --out-features 11008 --lora-num 5 --lora-dropout 0.05 --json",
)(bench)


def main() -> None:
    """Run the app; a mistake in what was asked is one line on stderr and exit code 2."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        if code == 130:  # what newer typer makes of Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code)
    except ClickException as error:
        _fail(error.format_message())
    except ValueError as error:
        _fail(str(error))
    except OSError as error:  # a full disk, a file without permission
        _fail(f"{error.filename}: {error.strerror}." if error.filename and error.strerror else str(error))
    except (typer.Abort, KeyboardInterrupt) as stop:
        after = "\n" if sys.stderr.isatty() else ""  # the terminal's own ^C
        print(f"{after}{str(stop) or 'Interrupted.'}", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"multilora-fast: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
