"""The command ``train``. Mistakes are ValueErrors of one sentence."""

import logging
import warnings
from pathlib import Path
from typing import Annotated

import typer

from multilora_fast.cli.paths import given_path


def train(
    model: Annotated[str, typer.Option(help="Directory or hub id of a causal LM.")],
    output: Annotated[
        Path, typer.Option(help="Directory for the adapter and the checkpoints, new or empty.", parser=given_path)
    ],
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help="JSONL or .parquet files or hf://OWNER/NAME[/CONFIG][:SPLIT], each a task of the file's name, or a "
            "mixture whose rows have a task field. A row holds prompt and completion, or messages, or text.",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE, a task and its name. Repeatable.", show_default=False)
    ] = None,
    eval_file: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE, rows to evaluate, in place of a share of the task NAME or as a task of its own. "
            "Repeatable.",
            show_default=False,
        ),
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja file in place of the tokenizer's template.", show_default="the model's")
    ] = None,
    learn: Annotated[str, typer.Option(help="answers, or all for prompts and other messages too.")] = "answers",
    dtype: Annotated[
        str, typer.Option(help="Of the base: float32, bfloat16, or auto for bfloat16 where it is native.")
    ] = "auto",
    quantization: Annotated[
        str | None, typer.Option(help="4bit for a base in bitsandbytes' NF4.", show_default="none")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations instead of keeping them.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output.")] = False,
    lora_num: Annotated[int, typer.Option(help="Parallel branches per layer, n.")] = 3,
    r: Annotated[
        int, typer.Option("--r", "--rank", help="Rank of each branch; launchers of processes let only --rank pass.")
    ] = 32,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Branches are scaled by alpha / r.", show_default="r")
    ] = None,
    lora_dropout: Annotated[float, typer.Option(help="Dropout before the branches.")] = 0.0,
    scaling: Annotated[str, typer.Option(help="A branch's learned scale: vector or scalar.")] = "vector",
    target_modules: Annotated[
        str, typer.Option(help="Names of the linear layers to adapt, with commas, or all-linear.")
    ] = "all-linear",
    exclude_modules: Annotated[
        str | None, typer.Option(help="Names of layers to leave alone, with commas.", show_default="none")
    ] = None,
    epochs: Annotated[
        float, typer.Option(help="Times through the data, each with an evaluation and a checkpoint at its end.")
    ] = 1.0,
    max_steps: Annotated[
        int | None, typer.Option(help="Steps to take, in place of epochs.", show_default="by epochs")
    ] = None,
    learning_rate: Annotated[
        float,
        typer.Option(help="Peak learning rate of AdamW; the scales start at zero, so take 3 to 10 times LoRA's."),
    ] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Rows, or bins, per process and backward.")] = 4,
    gradient_accumulation: Annotated[int, typer.Option(help="Backwards per step.")] = 1,
    max_length: Annotated[int, typer.Option(help="Longest row in tokens; longer ones are cut at the end.")] = 1024,
    packing: Annotated[
        bool, typer.Option("--packing", help="Put whole rows into bins of --max-length tokens instead of padding them.")
    ] = False,
    liger: Annotated[bool, typer.Option("--liger", help="Run the base with Liger's kernels.")] = False,
    report_to: Annotated[
        str | None, typer.Option(help="Trackers such as tensorboard or wandb, with commas.", show_default="none")
    ] = None,
    eval_fraction: Annotated[
        float,
        typer.Option(
            help="Share of each task's different rows held out for evaluation, at least one. Equal rows go to one "
            "side together, so that more may be held out. Accuracy is the share of the answers' tokens that come out "
            "likeliest."
        ),
    ] = 0.05,
    save_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps between evaluations and checkpoints, in place of epochs. The last two checkpoints are kept.",
            show_default="an epoch",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the rows held out, their order and the branches.")] = 0,
) -> None:
    """Fine-tune a causal LM on one or more tasks with transformers' Trainer."""
    given = {name: value for name, value in locals().items() if name not in ("task", "eval_file")}
    if not output:
        raise ValueError("--output must name a directory, not ''.")
    from multilora_fast.training.config import TrainSettings

    settings = TrainSettings(
        **given
        | {
            "output": Path(output),
            "files": tuple(files or ()),
            "named": _named("--task", task or []),
            "eval_files": _named("--eval-file", eval_file or []),
            "target_modules": _listed(target_modules),
            "exclude_modules": exclude_modules and _listed(exclude_modules),
            "report_to": report_to and _listed(report_to),
        }
    )
    settings.check()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries about each other
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels for CPUs that it did not find
    from transformers.utils import logging as transformers_logging

    from multilora_fast.training.run import run

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        run(settings)
    except KeyboardInterrupt as stop:  # typer would drop its words
        raise typer.Abort(str(stop)) from stop


def _named(option: str, values: list[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for text in values:
        name, _, path = text.partition("=")
        if not name or not path:
            raise ValueError(f"{option} must be NAME=FILE, not {text!r}.")
        if name in named:
            raise ValueError(f"{option} {name} is given twice.")
        named[name] = path
    return named


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
