"""Fine-tuning on tasks in JSON Lines with transformers' Trainer: the data, the adapted model, a log by task."""

import sys
from collections.abc import Collection
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, Literal, cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.pytorch_utils import Conv1D

from multilora_fast.devices import choose_dtype
from multilora_fast.models import pretrained
from multilora_fast.peft import MultiLoraConfig, MultiLoraLinear
from multilora_fast.training.checkpoint import (
    failures_named,
    finish,
    interruption,
    is_first,
    last_checkpoint,
    save,
    write_record,
)
from multilora_fast.training.config import TrainSettings, check_same_run
from multilora_fast.training.data import IGNORED, Row, collate, encode, read_tasks, split

Rows = list[dict[str, list[int]]]


def run(settings: TrainSettings) -> Trainer | None:
    """Train an adapter and save it in ``settings.output``, beside the Trainer's checkpoints and its state.

    Returns: the Trainer; None where a run is resumed of which only the adapter was still to be put in its place.

    Raises:
        ValueError: settings, data or a model that do not allow it; nothing is written then.
        OSError: the output cannot be written, on a full disk say.
        KeyboardInterrupt: as Python's own; during training it says what is kept.
    """
    settings.check()
    tasks = read_tasks(settings.files, settings.named)
    record = settings.record((row.task, row.fields) for rows in tasks.values() for row in rows)
    checkpoint = None
    if settings.resume:
        check_same_run(settings.output, record)
        checkpoint = last_checkpoint(settings.output)
        if checkpoint is not None and finish(checkpoint, settings):
            _say(f"All steps were taken: the adapter is in {settings.output}.")
            return None
        if checkpoint is None:
            _say(f"{settings.output} holds no checkpoint: the run starts at step 0.")
    tokenizer = pretrained(AutoTokenizer, settings.model)
    train_rows, held_out = tokens(tasks, tokenizer, settings)
    arguments = training_arguments(settings if held_out else replace(settings, eval_fraction=0.0))
    set_seed(settings.seed)
    model = adapted_model(settings, arguments.device)

    if arguments.process_index == 0:  # the others checked the directory before they all joined as a group
        write_record(settings.output, record)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    log = TaskLog(held_out, heading(settings, model, arguments))
    trainer = CountingTrainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=held_out or None,
        data_collator=partial(collate, pad=pad),
        processing_class=tokenizer,
        preprocess_logits_for_metrics=_likeliest,
        compute_metrics=_accuracy,
        callbacks=[log, *([Bars()] if sys.stderr.isatty() else [])],
    )
    trainer.remove_callback(PrinterCallback)
    with failures_named(settings.output):
        try:
            done = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            seconds = done.metrics["train_runtime"]
            cost = summary(seconds, trainer.all_tokens() / (seconds - log.evaluating), arguments.device)
            if held_out and not _is_evaluated(trainer):
                trainer.evaluate()
            trainer.save_state()
            save(trainer, settings)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(interruption(trainer.state, settings.output)) from stop
    _say(cost)
    _say(f"The adapter is in {settings.output}. Import multilora_fast.peft, then load it as any PEFT adapter.")
    return trainer


def training_arguments(settings: TrainSettings) -> TrainingArguments:
    when = "epoch" if settings.save_steps is None else "steps"
    arguments = TrainingArguments(
        output_dir=str(settings.output),
        num_train_epochs=settings.epochs,
        max_steps=-1 if settings.max_steps is None else settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=0.03,
        lr_scheduler_type="linear",
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        eval_strategy=when if settings.eval_fraction else "no",
        eval_on_start=bool(settings.eval_fraction),
        eval_steps=settings.save_steps,
        save_strategy=when,
        save_steps=settings.save_steps or 500,
        save_total_limit=2,
        logging_steps=10,
        logging_first_step=True,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        use_cpu=not torch.accelerator.is_available(),  # else processes without a GPU train alone, on top of each other
        dataloader_pin_memory=torch.accelerator.is_available(),
        seed=settings.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for processes of their own, not for DataParallel
    return arguments


def tokens(tasks: dict[str, list[Row]], tokenizer, settings: TrainSettings) -> tuple[Rows, dict[str, Rows]]:
    """The rows to train on, of all tasks, and those held out, by task. Says how many there are, and how many have no
    label within max_length.

    Raises:
        ValueError: no row of a task is left to train on.
    """
    train_rows: Rows = []
    held_out: dict[str, Rows] = {}
    for task, rows in tasks.items():
        sides = split(rows, settings.eval_fraction, settings.seed)
        encoded = [[encode(row, tokenizer, settings.max_length) for row in side] for side in sides]
        kept = [[row for row in side if row is not None] for side in encoded]
        if not kept[0]:
            raise ValueError(f"task {task} has no row whose answer begins within --max-length {settings.max_length}.")
        lost = len(rows) - sum(map(len, kept))
        _say(
            f"{task}: {len(kept[0])} rows to train on, {len(kept[1])} held out"
            + (f", {lost} left out, whose answer begins after {settings.max_length} tokens" if lost else "")
        )
        train_rows += kept[0]
        if kept[1]:
            held_out[task] = kept[1]
    return train_rows, held_out


def adapted_model(settings: TrainSettings, device: torch.device) -> PeftModel:
    """The causal LM, frozen, with a fresh float32 adapter.

    Raises:
        ValueError: a model that cannot be loaded, or that has none of the target modules.
    """
    options: dict[str, Any] = {"dtype": choose_dtype(settings.dtype, device)}
    if settings.quantization:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
    base = pretrained(AutoModelForCausalLM, settings.model, **options)
    base.config.use_cache = False
    targets = settings.target_modules
    names = [f".{name}" for name, _ in base.named_modules()]
    if targets != ("all-linear",) and not any(name.endswith(f".{target}") for name in names for target in targets):
        linear = (name for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
        kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
        raise ValueError(f"--target-modules {','.join(targets)} match nothing: the linear layers end in {kinds}.")
    config = MultiLoraConfig(
        r=settings.r,
        lora_num=settings.lora_num,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        scaling=cast(Literal["vector", "scalar"], settings.scaling),
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def heading(settings: TrainSettings, model: PeftModel, arguments: TrainingArguments) -> str:
    """What is trained, on what."""
    dtype = str(choose_dtype(settings.dtype, arguments.device)).removeprefix("torch.")
    where = arguments.device.type + (f" in {arguments.world_size} processes" if arguments.world_size > 1 else "")
    layers = sum(isinstance(module, MultiLoraLinear) for module in model.modules())
    return (
        f"{settings.model} on {where}, base in {f'4 bits and {dtype}' if settings.quantization else dtype}; "
        f"{settings.lora_num} branches of rank {settings.r} on {layers} layers, "
        f"{model.get_nb_trainable_parameters()[0]:,} trainable parameters"
    )


def summary(seconds: float, rate: float, device: torch.device) -> str:
    """What a run took."""
    said = f"Took {timedelta(seconds=round(seconds))}, {rate:,.0f} tokens/s without padding and evaluations"
    if device.type == "cuda":
        said += f", at most {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}"
    return f"{said}."


class CountingTrainer(Trainer):
    """Counts the tokens that it trains on, without padding; on the device, so that no step waits for the sum."""

    tokens: Tensor | int = 0

    def training_step(self, model, inputs, *args, **kwargs):
        self.tokens = self.tokens + inputs["attention_mask"].sum().to(self.args.device)
        return super().training_step(model, inputs, *args, **kwargs)

    def all_tokens(self) -> int:
        """Of all processes, which must all ask."""
        return int(self.accelerator.gather(self.tokens).sum())


class Bars(ProgressCallback):
    """The Trainer's progress bars, without its lines."""

    def on_log(self, *args, **kwargs):
        pass


class TaskLog(TrainerCallback):
    """Prints what is trained, then what the Trainer logs, a line for every loss and for every task at an evaluation.
    Adds up the seconds of the evaluations."""

    def __init__(self, tasks: Collection[str], heading: str):
        self.width = max(map(len, tasks), default=0)
        self.tasks = list(tasks)
        self.heading = heading
        self.evaluating = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            _print(f"{self.heading}; {state.max_steps} steps of {rows} rows.")

    def on_log(self, args, state, control, logs, **kwargs):
        if not state.is_world_process_zero:
            return
        step = f"step {state.global_step:>{len(str(state.max_steps))}} of {state.max_steps}"
        if "loss" in logs:
            _print(f"{step}  loss {float(logs['loss']):.4f}")
        for task in self.tasks:
            if f"eval_{task}_loss" in logs:
                self.evaluating += logs[f"eval_{task}_runtime"]
                loss, accuracy = logs[f"eval_{task}_loss"], logs[f"eval_{task}_accuracy"]
                _print(f"{step}  {task:<{self.width}}  held-out loss {loss:.4f}  accuracy {accuracy:.4f}")


def _likeliest(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, T, vocabulary) as (B, T): all that accuracy needs is kept of the logits."""
    return logits.argmax(-1)


def _accuracy(prediction) -> dict[str, float]:
    """The share of the answers' tokens that are the likeliest after those before them."""
    labels = prediction.label_ids[:, 1:]
    asked = labels != IGNORED
    return {"accuracy": float((prediction.predictions[:, :-1] == labels)[asked].mean())}


def _is_evaluated(trainer: Trainer) -> bool:
    last = [log["step"] for log in trainer.state.log_history if any(key.startswith("eval_") for key in log)]
    return bool(last) and last[-1] == trainer.state.global_step


def _say(line: str) -> None:
    if is_first():
        _print(line)


def _print(line: str) -> None:
    tqdm.write(line)  # above the bars
    sys.stdout.flush()
