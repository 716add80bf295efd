"""The command line, ``multilora-fast``. Commands import heavy libraries when they run."""

import logging
import sys
from typing import Annotated, Any

import typer

from multilora_fast import __version__
from multilora_fast.cli import adapters, bench, demo, info, init, plan, spectrum, train

try:  # typer from 0.26 brings its own copy of click
    from typer._click.exceptions import ClickException
except ImportError:
    from click.exceptions import ClickException  # type: ignore[assignment]

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


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
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of missing CPU kernels when PEFT imports it


def _command(short: str, *examples: str) -> Any:
    """Register a command with its line in the list of commands and the examples under its help."""
    lines = "\n".join(f"  multilora-fast {example}" for example in examples)
    title = "Examples" if len(examples) > 1 else "Example"
    return app.command(short_help=short, epilog=f"\b\n{title}:\n{lines}")


_command("Fine-tune a small model on four tasks, beside LoRA.", "demo --quick", "demo --steps 320 --output run")(
    demo.demo
)
_command("Show versions, device, backend and kernel settings.", "info", "info --arch sm_90 --json")(info.info)
_command(
    "Estimate the memory of a training step, by method.",
    "plan MODEL --batch 4 --seq-len 2048",
    "plan MODEL --gpu-memory 80GB --quantization 4bit --json",
)(plan.plan)
_command(
    "Fine-tune a model on tasks in JSONL files.",
    "train boolq.jsonl rte.jsonl --model MODEL --output out",
    "train --task math=gsm8k.jsonl --model MODEL --output out --resume",
)(train.train)
_command(
    "Write an untrained adapter, for any trainer.",
    "init MODEL adapter --lora-num 3 --r 8",
    "init MODEL adapter --target-modules q_proj,v_proj --rank-pattern '{\"q_proj\": 16}'",
)(init.init)
_command("Write an adapter as a plain LoRA.", "export out lora", "export out lora --model MODEL --json")(
    adapters.export
)
_command("Make one adapter of several LoRAs.", "merge lora-a lora-b --weights 1,0.5 --output sum")(adapters.merge)
_command(
    "Show the singular values of adapters' updates.",
    "spectrum out lora --modules k_proj,v_proj --plot spectrum.png",
    "spectrum tuned-model --base MODEL",
)(spectrum.spectrum)
_command(
    "Time one layer, beside the naive loop and LoRA.",
    "bench",
    "bench --in-features 4096 --out-features 11008 --lora-num 5 --lora-dropout 0.05 --json",
)(bench.bench)


def main() -> None:
    """Run the app. Invalid input is one line on stderr and exit code 2."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        if code == 130:  # Ctrl-C in newer typer
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
