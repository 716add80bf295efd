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
        list[Path] | None,
        typer.Argument(
            help="JSONL files, each a task of the file's name, or a mixture whose rows have a task field. A row holds "
            "prompt and completion, or messages, or text.",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE, a task and its name. Repeatable.", show_default=False)
    ] = None,
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
    r: Annotated[int, typer.Option(help="Rank of each branch.")] = 32,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Branches are scaled by alpha / r.", show_default="r")
    ] = None,
    lora_dropout: Annotated[float, typer.Option(help="Dropout before the branches.")] = 0.0,
    scaling: Annotated[str, typer.Option(help="A branch's learned scale: vector or scalar.")] = "vector",
    target_modules: Annotated[
        str, typer.Option(help="Names of the linear layers to adapt, with commas, or all-linear.")
    ] = "all-linear",
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
    batch_size: Annotated[int, typer.Option(help="Rows per process and backward.")] = 4,
    gradient_accumulation: Annotated[int, typer.Option(help="Backwards per step.")] = 1,
    max_length: Annotated[int, typer.Option(help="Longest row in tokens; longer ones are cut at the end.")] = 1024,
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
    from multilora_fast.training.config import TrainSettings

    settings = TrainSettings(
        model=model,
        output=output,
        files=tuple(files or ()),
        named=_named(task or []),
        dtype=dtype,
        quantization=quantization,
        gradient_checkpointing=gradient_checkpointing,
        resume=resume,
        lora_num=lora_num,
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        scaling=scaling,
        target_modules=tuple(name.strip() for name in target_modules.split(",") if name.strip()),
        epochs=epochs,
        max_steps=max_steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        max_length=max_length,
        eval_fraction=eval_fraction,
        save_steps=save_steps,
        seed=seed,
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


def _named(tasks: list[str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for text in tasks:
        name, _, path = text.partition("=")
        if not name or not path:
            raise ValueError(f"--task must be NAME=FILE, not {text!r}.")
        if name in named:
            raise ValueError(f"--task {name} is given twice.")
        named[name] = Path(path)
    return named
