"""``multilora-fast demo``: train, evaluate, reload, compare and report."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import set_seed

from multilora_fast.adapters import load_adapter, save_adapter
from multilora_fast.demo import report
from multilora_fast.demo.compare import Cost, build_methods, compare
from multilora_fast.demo.scoring import Encoded, accuracy, sample
from multilora_fast.demo.settings import DemoSettings
from multilora_fast.demo.tasks import SPLITS, Task, load_tasks, majority_rate
from multilora_fast.demo.training import check_packing, pack, train
from multilora_fast.devices import choose_device, choose_dtype, environment
from multilora_fast.files import atomic_dir
from multilora_fast.layers.fuse import fuse
from multilora_fast.memory.methods import REFERENCE, adapt
from multilora_fast.models import PACKAGED, load_model, load_tokenizer, model_source, target_linears


def run(settings: DemoSettings, tasks: Sequence[Task] | None = None) -> list[report.TaskResult]:
    """Run the demo. ``tasks`` replaces the four real ones."""
    started = time.perf_counter()
    settings.check()
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    machine = environment(device)
    print(_heading(settings, machine, dtype))

    _say("Loading the model and the tasks")
    if settings.model is not None:
        model_source("--model", settings.model)
    tasks = load_tasks() if tasks is None else tasks  # first: it fails fast where packages are missing
    tokenizer, model = load_tokenizer(settings.model), load_model(settings.model, dtype, device)
    training, held_out = _mixture(settings, tokenizer, tasks)
    set_seed(settings.seed)
    names = target_linears(model, settings.target_modules)
    adapt(model, REFERENCE, names, **settings.branches)
    fuse(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.eval()
    check_packing(model, training)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{len(names)} linear layers get {settings.lora_num} branches each: {trainable:,} trainable parameters.")
    print(_data_notes(training, held_out, settings.max_length))

    with atomic_dir(settings.output) as stage:
        results, losses = _fine_tune(model, training, held_out, settings, device, stage)
        print(f"\n{report.accuracy_table(results)}\n{report.accuracy_notes(results, settings.seed)}\n")

        _say("Saving the adapter and loading it on a fresh base")
        save_adapter(model, stage / report.ADAPTER)
        batch = {name: tensor.to(device) for name, tensor in pack(training[: settings.batch_size]).items()}
        trained = _logits(model, batch)
        del model
        fresh = load_model(settings.model, dtype, device)
        methods = build_methods(fresh, settings.target_modules, **settings.branches) if settings.rounds else {}
        load_adapter(fresh, stage / report.ADAPTER)
        difference = (_logits(fresh, batch) - trained).abs().max().item()
        print(f"Largest difference between the trained model's logits and the reloaded one's: {difference:g}\n")
        if difference > 0.01 * trained.abs().max().item():
            raise RuntimeError("the saved adapter does not give the trained model's logits back")

        tokens = batch["input_ids"].numel()
        conditions: dict[str, Any] = {"tokens": tokens, "adapter_dtype": _short(dtype), "rounds": settings.rounds}
        costs = _compare(methods, batch, settings.rounds) if methods else []
        if costs:
            print(f"\n{report.cost_table(costs)}\n{report.cost_notes(settings, device, **conditions)}\n")
        _say("Writing the results")
        report.write_metrics(
            stage / report.METRICS,
            results,
            costs,
            environment=machine,
            settings=asdict(settings) | {"output": str(settings.output), "dtype": _short(dtype)},
            comparison=conditions,
            trainable_parameters=trainable,
            reload_max_difference=difference,
            losses=losses,
            seconds=round(time.perf_counter() - started, 1),
        )
        where = f"{machine['hardware']}, {machine['threads']} threads, base {_short(dtype)}"
        report.plot(stage / report.PLOT, results, costs, f"{settings.model or PACKAGED} on {where}")
    print(f"Wrote {report.ADAPTER}/, {report.METRICS} and {report.PLOT} to {settings.output}.")
    print(f"Done in {_duration(time.perf_counter() - started)}.")
    return results


def _fine_tune(
    model: nn.Module,
    training: Sequence[Encoded],
    held_out: dict[str, list[Encoded]],
    settings: DemoSettings,
    device: torch.device,
    scratch: Path,
) -> tuple[list[report.TaskResult], list[dict[str, float]]]:
    """Train ``model``. Returns accuracies before and after on the same items, and the logged losses."""
    before = _evaluate(model, held_out, "Accuracy before")
    losses = train(
        model,
        training,
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        device=device,
        scratch=scratch,
    )
    after = _evaluate(model, held_out, "Accuracy after")
    results = [
        report.TaskResult(task, len(items), majority_rate(items), before[task], after[task])
        for task, items in held_out.items()
    ]
    return results, losses


def _mixture(
    settings: DemoSettings, tokenizer, tasks: Sequence[Task]
) -> tuple[list[Encoded], dict[str, list[Encoded]]]:
    """Training examples, drawn evenly from the tasks, and held-out items by task."""
    per_task = -(-settings.steps * settings.batch_size // len(tasks))
    options = {"max_length": settings.max_length, "seed": settings.seed}
    drawn = [sample(task.train, per_task, tokenizer, **options) for task in tasks]
    training = [example for one_of_each in zip(*drawn, strict=False) for example in one_of_each]
    held_out = {task.name: sample(task.held_out, settings.eval_items, tokenizer, **options) for task in tasks}
    return training, held_out


def _evaluate(model: nn.Module, held_out: dict[str, list[Encoded]], title: str) -> dict[str, float]:
    with tqdm(total=sum(map(len, held_out.values())), desc=title, unit="item") as bar:
        return {task: accuracy(model, items, progress=bar) for task, items in held_out.items()}


def _compare(methods: dict[str, nn.Module], batch: dict[str, Tensor], rounds: int) -> list[Cost]:
    with tqdm(total=len(methods) * (2 + rounds), desc="Comparing three ways", unit="step") as bar:
        return compare(methods, batch, rounds=rounds, progress=bar)


@torch.inference_mode()
def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**{name: tensor for name, tensor in batch.items() if "labels" not in name}).logits.float()


def _heading(settings: DemoSettings, machine: dict, dtype: torch.dtype) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return (
        f"MultiLoRA on {settings.model or PACKAGED}: {settings.lora_num} branches of rank {settings.r}, "
        f"{settings.steps} steps of {settings.batch_size} examples\n"
        f"{machine['device']} ({machine['hardware']}), {machine['threads']} threads, "
        f"base {_short(dtype)}, adapters float32, seed {settings.seed}\n{versions}\n"
    )


def _data_notes(training: Sequence[Encoded], held_out: dict[str, list[Encoded]], max_length: int) -> str:
    counts = Counter(example.task for example in training)
    lines = [
        f"  {task:<9} {counts[task]} to train on, {len(items)} held out"
        + (f": {SPLITS[task]}" if task in SPLITS else "")
        for task, items in held_out.items()
    ]
    return "\n".join([*lines, f"  Examples of more than {max_length} tokens are left out."])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _duration(seconds: float) -> str:
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _say(what: str) -> None:
    print(f"{what} ...", flush=True)
