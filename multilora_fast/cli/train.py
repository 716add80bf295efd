"""The ``train`` command. Invalid input raises a ValueError of one sentence."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from multilora_fast.cli.paths import given_path
from multilora_fast.console import quiet


def train(
    model: Annotated[str, Option(help="Directory or hub id of a causal LM.")],
    output: Annotated[Path, Option(help="New or empty directory for adapter and checkpoints.", parser=given_path)],
    files: Annotated[
        list[str] | None,
        Argument(
            help="JSONL or .parquet files or hf://OWNER/NAME[/CONFIG][:SPLIT]. Each is a task named by the file, or a "
            "mixture whose rows have a task field. A row holds prompt and completion, or messages, or text."
        ),
    ] = None,
    task: Annotated[list[str] | None, Option(help="Task as NAME=FILE. Repeatable.")] = None,
    eval_file: Annotated[
        list[str] | None, Option(help="Evaluation data as NAME=FILE, instead of held-out rows. Repeatable.")
    ] = None,
    chat_template: Annotated[Path | None, Option(help="Jinja chat template that replaces the tokenizer's.")] = None,
    learn: Annotated[str, Option(help="Tokens in the loss: answers, or all (prompts too).")] = "answers",
    dtype: Annotated[str, Option(help="Base model dtype: float32, bfloat16, or auto (by device).")] = "auto",
    quantization: Annotated[str | None, Option(help="Base model quantization: 4bit (bitsandbytes NF4).")] = None,
    gradient_checkpointing: Annotated[
        bool, Option("--gradient-checkpointing", help="Recompute activations in backward to save memory.")
    ] = False,
    resume: Annotated[bool, Option("--resume", help="Resume from the last checkpoint in the output.")] = False,
    lora_num: Annotated[int, Option(help="Parallel branches per layer, n.")] = 3,
    r: Annotated[int, Option("--r", "--rank", help="Rank of each branch. Use --rank with torchrun.")] = 32,
    lora_alpha: Annotated[float | None, Option(help="Branches are scaled by alpha / r.", show_default="r")] = None,
    lora_dropout: Annotated[float, Option(help="Dropout before the branches.")] = 0.0,
    scaling: Annotated[str, Option(help="Learned scale per branch: vector or scalar.")] = "vector",
    target_modules: Annotated[str, Option(help="Comma-separated layer names, or all-linear.")] = "all-linear",
    exclude_modules: Annotated[str | None, Option(help="Comma-separated names of layers not to adapt.")] = None,
    epochs: Annotated[float, Option(help="Training epochs; each ends with a checkpoint.")] = 1.0,
    max_steps: Annotated[int | None, Option(help="Training steps; overrides --epochs.")] = None,
    learning_rate: Annotated[float, Option(help="Peak learning rate of AdamW; use 3 to 10 times LoRA's.")] = 1e-3,
    batch_size: Annotated[int, Option(help="Examples (or packed bins) per process and backward pass.")] = 4,
    gradient_accumulation: Annotated[int, Option(help="Backward passes per optimizer step.")] = 1,
    max_length: Annotated[int, Option(help="Maximum example length in tokens; longer examples are truncated.")] = 1024,
    packing: Annotated[bool, Option("--packing", help="Pack whole examples into bins instead of padding.")] = False,
    liger: Annotated[bool, Option("--liger", help="Run the base model with Liger's kernels.")] = False,
    report_to: Annotated[str | None, Option(help="Comma-separated trackers: tensorboard, wandb, ...")] = None,
    eval_fraction: Annotated[
        float, Option(help="Share of each task's distinct rows held out for evaluation; at least one row unless 0.")
    ] = 0.05,
    save_steps: Annotated[
        int | None,
        Option(help="Steps between evaluations and checkpoints; two checkpoints are kept.", show_default="an epoch"),
    ] = None,
    seed: Annotated[int, Option(help="Random seed.")] = 0,
) -> None:
    """Fine-tune a causal LM on one or more tasks with transformers' Trainer."""
    given = {name: value for name, value in locals().items() if name not in ("task", "eval_file")}
    from multilora_fast.training.config import TrainSettings

    given["files"] = tuple(files or ())
    given["named"], given["eval_files"] = _named("--task", task or []), _named("--eval-file", eval_file or [])
    for name in ("target_modules", "exclude_modules", "report_to"):
        given[name] = given[name] and tuple(part.strip() for part in given[name].split(",") if part.strip())
    settings = TrainSettings(**given)
    settings.check()
    quiet()
    from multilora_fast.training.run import run

    try:
        run(settings)
    except KeyboardInterrupt as stop:  # typer would drop its message
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
