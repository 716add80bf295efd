"""Fine-tuning on JSONL tasks with transformers' Trainer."""

import sys
from datetime import timedelta
from functools import partial

import torch
from peft import PeftModel
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks

from multilora_fast.adapters.files import CONFIG
from multilora_fast.devices import choose_dtype
from multilora_fast.files import atomic_dir
from multilora_fast.peft import MultiLoraLinear
from multilora_fast.training.checkpoint import failures_named, finish, interruption, last_checkpoint, write_record
from multilora_fast.training.config import TrainSettings, check_same_run
from multilora_fast.training.data import Example, Row, collate, read_tasks, split
from multilora_fast.training.model import Encoder, adapted_model
from multilora_fast.training.packing import check_bins, flatten, pack
from multilora_fast.training.trainer import Bars, CountingTrainer, TaskLog, by_row, by_token, say


def run(settings: TrainSettings) -> Trainer | None:
    """Train an adapter and save it in ``settings.output``, beside the Trainer's checkpoints and state.

    Returns: the Trainer; None if a resumed run was complete and only its adapter had to be published.

    Raises:
        ValueError: invalid settings, data or model, before anything is written; or a run that diverged.
        OSError: the output cannot be written, for example on a full disk.
        KeyboardInterrupt: interrupted; during training the message says what is kept.
    """
    settings.check()
    tasks, evaluated = read_tasks(settings.files, settings.named), read_tasks((), settings.eval_files)
    read = (row for rows in (*tasks.values(), *evaluated.values()) for row in rows)
    record = settings.record((row.task, row.fields) for row in read)
    checkpoint = None
    if settings.resume:
        check_same_run(settings.output, record)
        checkpoint = last_checkpoint(settings.output)
        if checkpoint is None:
            say(f"{settings.output} holds no checkpoint: the run starts at step 0.")
        elif finish(checkpoint, settings):
            say(f"All steps were taken: the adapter is in {settings.output}.")
            return None
    encoder = Encoder(settings)
    train_rows, held_out = tokens(tasks, evaluated, encoder)
    arguments = training_arguments(settings, evaluates=bool(held_out))
    set_seed(settings.seed)
    model = adapted_model(settings, arguments.device)
    bins = pack(train_rows, settings.max_length) if settings.packing else []
    if arguments.process_index == 0:  # with FSDP the others may not have the weights yet, and share the directory
        if bins:
            check_bins(model, bins)
            full = sum(len(row["input_ids"]) for row in train_rows) / len(bins) / settings.max_length
            say(f"{len(train_rows)} examples in {len(bins)} bins of {settings.max_length} tokens, {full:.0%} full")
        write_record(settings.output, record)

    log = TaskLog(held_out, heading(settings, model, arguments), "bins" if bins else "rows")
    trainer = CountingTrainer(
        model=model,
        args=arguments,
        train_dataset=bins or train_rows,
        eval_dataset=held_out or None,
        data_collator=partial(flatten if bins else collate, pad=0),  # the tokenizer may lack a padding token
        processing_class=encoder.tokenizer,
        preprocess_logits_for_metrics=by_row,
        compute_metrics=by_token,
        callbacks=[log, *([Bars()] if sys.stderr.isatty() else [])],
    )
    trainer.add_callback(trainer)
    trainer.remove_callback(PrinterCallback)
    with failures_named(settings.output):
        try:
            done = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            seconds = done.metrics["train_runtime"]
            cost = summary(seconds, trainer.all_tokens() / (seconds - log.evaluating), arguments.device)
            if held_out and log.evaluated_at != trainer.state.global_step:
                trainer.evaluate()
            trainer.save_state()
            with atomic_dir(settings.output, last=CONFIG) as stage:  # one per process; rank 0 writes
                trainer.save_model(str(stage))
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(interruption(trainer.state, settings.output)) from stop
    say(cost)
    say(f"The adapter is in {settings.output}. Import multilora_fast.peft, then load it as any PEFT adapter.")
    return trainer


def training_arguments(settings: TrainSettings, *, evaluates: bool = True) -> TrainingArguments:
    """The Trainer's arguments. Raises ValueError for a tracker that is unknown or not installed."""
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
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        eval_strategy=when if evaluates else "no",
        eval_on_start=evaluates,
        eval_steps=settings.save_steps,
        save_strategy=when,
        save_steps=settings.save_steps or 500,
        save_total_limit=2,
        logging_steps=10,
        logging_first_step=True,
        disable_tqdm=True,
        logging_nan_inf_filter=False,  # which logs NaN as 0
        report_to=list(settings.report_to or ()),
        use_liger_kernel=settings.liger,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        use_cpu=not torch.accelerator.is_available(),  # else processes without a GPU form no group
        dataloader_pin_memory=torch.accelerator.is_available(),
        seed=settings.seed,
    )
    try:
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()
    except (RuntimeError, ImportError, ValueError) as error:  # unknown, or its package is missing
        raise ValueError(f"--report-to: {error}") from error
    arguments._n_gpu = min(arguments.n_gpu, 1)  # no DataParallel over several GPUs: each takes its own process
    return arguments


def tokens(
    tasks: dict[str, list[Row]], evaluated: dict[str, list[Row]], encoder: Encoder
) -> tuple[list[Example], dict[str, list[Example]]]:
    """The training examples of all tasks, and the held-out examples by task: those of its evaluation file or, without
    one, a share of its own rows. Prints the counts, also of rows without a label within max_length.

    Raises:
        ValueError: no row of a task is left.
    """
    settings = encoder.settings
    train_rows: list[Example] = []
    held_out: dict[str, list[Example]] = {}
    for task in dict.fromkeys((*tasks, *evaluated)):
        rows = tasks.get(task, [])
        sides = (rows, evaluated[task]) if task in evaluated else split(rows, settings.eval_fraction, settings.seed)
        encoded = [[examples for examples in map(encoder, side) if examples] for side in sides]
        if (rows and not encoded[0]) or (task in evaluated and not encoded[1]):
            raise ValueError(f"task {task} has no row whose answer begins within --max-length {settings.max_length}.")
        learn, hold = ([example for examples in side for example in examples] for side in encoded)
        said = f"{task}: {len(encoded[0])} rows to train on, {len(encoded[1])} held out"
        kept = sum(map(len, encoded))
        if lost := sum(map(len, sides)) - kept:
            said += f", {lost} left out, whose answer begins after {settings.max_length} tokens"
        if len(learn) + len(hold) > kept:
            why = "one for each answer, since the chat template rewrites what is past"
            said += f"; as {len(learn)} and {len(hold)} examples, {why}"
        say(said)
        train_rows += learn
        if hold:
            held_out[task] = hold
    return train_rows, held_out


def heading(settings: TrainSettings, model: PeftModel, arguments: TrainingArguments) -> str:
    """The model and data in one line."""
    dtype = str(choose_dtype(settings.dtype, arguments.device)).removeprefix("torch.")
    where = arguments.device.type + (f" in {arguments.world_size} processes" if arguments.world_size > 1 else "")
    layers = sum(isinstance(module, MultiLoraLinear) for module in model.modules())
    return (
        f"{settings.model} on {where}, base in {f'4 bits and {dtype}' if settings.quantization else dtype}; "
        f"{settings.lora_num} branches of rank {settings.r} on {layers} layers, "
        f"{model.get_nb_trainable_parameters()[0]:,} trainable parameters"
    )


def summary(seconds: float, rate: float, device: torch.device) -> str:
    """The duration of a run, and its throughput."""
    tokens = f"{rate:,.{0 if rate >= 10 else 1}f} tokens/s"
    said = f"Took {timedelta(seconds=round(seconds))}, {tokens} without padding and evaluations"
    if device.type == "cuda":
        said += f", at most {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}"
    return f"{said}."
