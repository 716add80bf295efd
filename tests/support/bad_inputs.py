"""Mistakes of users and full disks, as a table for test_bad_inputs.py.

A row is a name, a command line or a call, what the error names, and a change to the prepared directory of bad_files.py,
in which everything runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import starmap

import pytest
import torch
from bad_files import (
    cut,
    directory,
    each,
    edit_config,
    edit_tensors,
    no_permission,
    no_tokenizer,
    pickled,
    pipe,
    remote_code,
    text,
    with_first,
    without,
)
from tiny import llama
from torch import nn

from multilora_fast import (
    MultiLoraConfig,
    MultiLoRALinear,
    dropout_mask,
    export_lora,
    from_loras,
    fuse,
    plan_memory,
    singular_values,
    unfuse,
)
from multilora_fast.adapters import load_adapter, save_adapter
from multilora_fast.adapters.files import CONFIG, WEIGHTS
from multilora_fast.memory.report import MemoryPlan
from multilora_fast.peft import init_adapter
from multilora_fast.training.config import RECORD

NEEDS_DATASETS = partial(pytest.importorskip, "datasets")
SMALL = 512  # bytes that a file may have, on a disk that is full


@dataclass(frozen=True)
class Row:
    name: str
    call: str | Callable[[], object]
    says: str
    before: Callable[[], object] | None = None
    disk: int | None = None  # the bytes that any file may have


TRAIN = "train sky.jsonl --model ./base --output out"
RESUME = "train sky.jsonl --model {root}/base --output run --resume --r 4 --target-modules q_proj --dtype float32"
RESUME += " --eval-fraction 0 --save-steps 1 --max-steps 4"


def config(**fields):
    return edit_config("adapter", **fields)


def lora(**fields):
    return edit_config("lora-a", **fields)


def weights(change):
    return edit_tensors("adapter", change)


READ = [  # an adapter's files, as every command reads them
    ("nothing there", without(f"adapter/{WEIGHTS}"), "adapter"),
    ("no config", without(f"adapter/{CONFIG}"), "adapter"),
    ("a config that is no JSON", text(f"adapter/{CONFIG}", "{"), "adapter"),
    ("a config that is a list", text(f"adapter/{CONFIG}", "[]"), CONFIG),
    ("another method", config(peft_type="IA3"), CONFIG),
    ("no r", config(r=None), "lacks r"),
    ("a rank that is a text", config(r="4"), "r must"),
    ("a pattern's rank of 0", config(rank_pattern={"q_proj": 0}), "r must"),
    ("a pattern that is a list", config(alpha_pattern=[1]), "alpha_pattern"),
    ("a bad expression", config(lora_num_pattern={"(": 2}), "lora_num_pattern"),
    ("an infinite alpha", config(lora_alpha=float("inf")), "lora_alpha"),
    ("a huge alpha", config(lora_alpha=10**400), "lora_alpha"),
    ("a text for a switch", config(fan_in_fan_out="false"), "fan_in_fan_out"),
    ("a text of modules", config(modules_to_save="lm_head"), "modules_to_save"),
    ("modules that are numbers", config(modules_to_save=[5]), "modules_to_save"),
    ("a list for a name", config(base_model_name_or_path=["a"]), "base_model_name_or_path"),
    ("a number for a type", config(base_model_type=1), "base_model_type"),
    ("targets in lists", config(target_modules=[["q"]]), "target_modules"),
    ("a config that is a directory", directory(f"adapter/{CONFIG}"), CONFIG),
    ("a config that is a pipe", pipe(f"adapter/{CONFIG}"), CONFIG),
    ("a config that has no end", text(f"adapter/{CONFIG}", "[" * 100_000), "adapter"),
    ("weights that are a pipe", pipe(f"adapter/{WEIGHTS}"), WEIGHTS),
    ("8 bits", weights(each(lambda t: t.to(torch.float8_e4m3fn))), "float8_e4m3fn"),
    ("weights cut short", cut(f"adapter/{WEIGHTS}"), "adapter"),
    ("pickled weights", pickled("adapter"), "adapter_model.bin is pickled"),
    ("NaN", weights(with_first(float("nan"))), "not finite, in base_model"),
    ("integers", weights(each(torch.Tensor.int)), "torch.int32"),
    ("single numbers", weights(each(lambda t: t.sum())), "lora_A of shape ()"),
    ("other shapes", weights(each(lambda t: t[:1])), "lora_A of shape (1, 4, 32)"),
    ("half of it", weights(lambda t: t.pop(next(iter(t)))), "lacks lora_"),
    ("no tensor", weights(dict.clear), WEIGHTS),
]  # fmt: skip

COMMANDS = starmap(Row, [
    ("init: no model", "init ./nowhere out", "model ./nowhere"),
    ("init: a file for a model", "init sky.jsonl out", "model sky.jsonl"),
    ("init: no model in it", "init ./adapter out", "model ./adapter"),
    ("init: a model with code", "init ./base out", "model ./base", remote_code),
    ("init: no model of this task", "init ./base out --task-type SEQ_2_SEQ_LM", "SEQ_2_SEQ_LM"),
    ("init: a task with a head", "init ./base out --task-type SEQ_CLS", "task_type"),
    ("init: onto an adapter", "init ./base adapter", "out adapter is not empty"),
    ("init: onto a file", "init ./base sky.jsonl", "out sky.jsonl"),
    ("init: nowhere", "init ./base ''", "'out'"),
    ("init: full disk", "init ./base out", "File too large", None, SMALL),
    ("init: unknown target", "init ./base out --target-modules q_proj,wq", "target_modules wq"),
    ("init: none left", "init ./base out --target-modules q_proj --exclude-modules q_proj", "q_proj"),
    ("init: a pattern", "init ./base out --rank-pattern q_proj=2", "--rank-pattern"),
    ("init: layers", "init ./base out --layers-to-transform one", "--layers-to-transform"),
    ("init: rank", "init ./base out --r 0", "r must"),
    ("init: a seed", "init ./base out --seed -1", "seed"),
    ("init: a dtype", "init ./base out --dtype fp16", "dtype"),

    *((f"export: {name}", "export adapter out", says, before) for name, before, says in READ),
    ("export: no directory", "export nowhere out", "nowhere"),
    ("export: a file", "export sky.jsonl out", "sky.jsonl"),
    ("export: wrong base", "export adapter out --model ./other", "./other"),
    ("export: no base", "export adapter out --model ./nowhere", "--model ./nowhere"),
    ("export: a base cut short", "export adapter out --model ./base", "--model ./base", cut("base/model.safetensors")),
    ("export: a base with code", "export adapter out --model ./base", "--model ./base", remote_code),
    ("export: nowhere", "export adapter ''", "'out'"),
    ("export: of nothing", "export '' out", "'adapter'"),
    ("export: onto a directory", "export adapter exported --overwrite", CONFIG, directory(f"exported/{CONFIG}")),
    ("export: onto a file", "export adapter sky.jsonl", "the output sky.jsonl"),
    ("export: under a file", "export adapter sky.jsonl/out", "the output sky.jsonl/out"),
    ("export: onto itself", "export adapter adapter", "the output adapter is not empty"),
    ("export: onto an export", "export adapter exported", "--overwrite"),
    ("export: onto a model", "export adapter base", "the output base is not empty"),
    ("export: onto a training run", "export adapter run", "the output run is not empty"),
    ("export: no permission", "export adapter out", "the output out", no_permission),
    ("export: in a place of the system's", "export adapter /sys/out", "/sys/out"),
    ("export: full disk", "export adapter out", "File too large", None, SMALL),
    ("export: full disk over another", "export adapter exported --overwrite", "File too large", None, SMALL),
    ("export: over a sound one, cut", "export adapter exported --overwrite", "adapter", cut(f"adapter/{WEIGHTS}")),

    ("merge: no directory", "merge lora-a nowhere --output out", "nowhere"),
    ("merge: a MultiLoRA adapter", "merge adapter --output out", "MULTILORA"),
    ("merge: no weight for one", "merge lora-a lora-b --output out --weights 1", "--weights"),
    ("merge: weights with spaces", "merge lora-a lora-b --output out --weights 1 0.5", "--weights"),
    ("merge: words for weights", "merge lora-a --output out --weights one", "weights"),
    ("merge: NaN for a weight", "merge lora-a --output out --weights nan", "weights"),
    ("merge: cut short", "merge lora-a --output out", "lora-a", cut(f"lora-a/{WEIGHTS}")),
    ("merge: NaN", "merge lora-a --output out", "not finite", edit_tensors("lora-a", with_first(float("nan")))),
    ("merge: no alpha", "merge lora-a --output out", "lora_alpha", lora(lora_alpha=None)),
    ("merge: alpha a text", "merge lora-a --output out", "lora_alpha", lora(lora_alpha="8")),
    ("merge: no DoRA", "merge lora-a --output out", "use_dora", lora(use_dora="false")),
    ("merge: no alpha for a module", "merge lora-a --output out", "lora_alpha", lora(alpha_pattern={"q_proj": None})),
    ("merge: nowhere", "merge lora-a --output ''", "'--output'"),
    ("merge: of two bases", "merge lora-a lora-other --output out", "lora-other"),
    ("merge: onto an adapter", "merge lora-a --output adapter", "--overwrite"),
    ("merge: onto what it cannot read", "merge nowhere --output base", "the output base is not empty"),
    ("merge: onto a source", "merge lora-a lora-b --output lora-b", "the output lora-b"),
    ("merge: onto a source, by force", "merge lora-a lora-b --output lora-b --overwrite", "the output lora-b"),
    ("merge: full disk", "merge lora-a --output out", "File too large", None, SMALL),
    ("merge: full disk over another", "merge lora-a --output adapter --overwrite", "File too large", None, SMALL),
    ("merge: no output", "merge lora-a", "'--output'"),

    ("train: no file at all", "train --model ./base --output out", "no data"),
    ("train: a dtype, before the data", f"{TRAIN.replace('sky', 'night')} --dtype fp16", "--dtype"),
    ("train: no data", TRAIN.replace("sky", "night"), "night.jsonl"),
    ("train: a directory", TRAIN.replace("sky.jsonl", "base"), "base"),
    ("train: foreign data", TRAIN.replace("sky.jsonl", f"adapter/{WEIGHTS}"), WEIGHTS),
    ("train: broken data", TRAIN, "sky.jsonl, line 20", cut("sky.jsonl", -3)),
    ("train: lora_alpha", f"{TRAIN} --lora-alpha nan", "lora_alpha"),
    ("train: lora_dropout", f"{TRAIN} --lora-dropout 1", "lora_dropout"),
    ("train: half a step", f"{TRAIN} --max-steps 1.5", "'--max-steps'"),
    ("train: seed", f"{TRAIN} --seed -1 --dtype float32", "--seed"),
    ("train: no model in it", TRAIN.replace("./base", "./tmp"), "--model ./tmp"),
    ("train: no tokenizer", TRAIN, "--model ./base", no_tokenizer),
    ("train: an adapter for a model", TRAIN.replace("./base", "./adapter"), "--model ./adapter"),
    ("train: a model cut short", TRAIN, "--model ./base", cut("base/model.safetensors")),
    ("train: a model with code", TRAIN, "--model ./base", remote_code),
    ("train: onto a file", TRAIN.replace("put out", "put sky.jsonl"), "--output sky.jsonl"),
    ("train: onto another's record", TRAIN.replace("put out", "put tmp"), "--output tmp is not empty",
     text(f"tmp/{RECORD}", '{"data": []}')),
    ("train: full disk", f"{TRAIN} --dtype float32", "File too large", None, 8),
    ("train: resumed from cut weights", RESUME, "--resume", cut(f"run/checkpoint-2/{WEIGHTS}")),
    ("train: resumed from pickled weights", RESUME, "adapter_model.bin is pickled", pickled("run/checkpoint-2")),
    ("train: resumed from NaN", RESUME, "not finite", edit_tensors("run/checkpoint-2", with_first(float("nan")))),
    ("train: resumed from a cut optimizer", RESUME, "optimizer.pt", cut("run/checkpoint-2/optimizer.pt")),
    ("train: resumed from a cut record", RESUME, RECORD, cut(f"run/{RECORD}")),
    ("train: resumed when done", RESUME.replace("steps 4", "steps 2"), "--max-steps"),

    ("spectrum: nothing", "spectrum ''", "'adapters"),
    ("spectrum: no directory", "spectrum nowhere", "nowhere"),
    ("spectrum: cut short", "spectrum adapter", "adapter", cut(f"adapter/{WEIGHTS}")),
    ("spectrum: a model with code", "spectrum base --base ./other", "could not be loaded", remote_code),
    ("spectrum: no direction", "spectrum adapter --top 0", "--top"),
    ("spectrum: no module", "spectrum adapter --modules keys", "modules ['keys']"),
    ("spectrum: twice", "spectrum adapter adapter", "adapter is given twice"),
    ("spectrum: a model alone", "spectrum base", "--base"),
    ("spectrum: wrong base", "spectrum base --base ./other", "base and source"),
    ("spectrum: a plot of another kind", "spectrum adapter --plot a.pdf", "--plot"),
    ("spectrum: a plot nowhere", "spectrum adapter --plot nowhere/a.png", "--plot nowhere/a.png"),
    ("spectrum: a base for no model", "spectrum adapter --base ./base", "--base ./base"),
    ("spectrum: of two models", "spectrum lora-a lora-other", "lora-a and lora-other"),
    ("spectrum: full disk", "spectrum adapter --plot a.png", "File too large", None, SMALL),

    ("plan: no model", "plan ./nowhere", "./nowhere"),
    ("plan: an adapter for a model", "plan ./adapter", "./adapter"),
    ("plan: a broken config", "plan ./base", "./base", text("base/config.json", "{")),
    ("plan: a model with code", "plan ./base", "./base", remote_code),
    ("plan: no rows", "plan ./base --batch 0", "batch"),
    ("plan: unknown dtype", "plan ./base --dtype int8", "dtype"),
    ("plan: unknown optimizer", "plan ./base --optimizer adam", "optimizer"),
    ("plan: unknown device", "plan ./base --device tpu", "device"),
    ("plan: a size without its unit", "plan ./base --gpu-memory 24", "24"),
    ("plan: a name for a size", "plan ./base --gpu-memory H100", "H100"),
    ("plan: a plot of no kind", "plan ./base --plot plan", "--plot"),
    ("plan: an empty plot", "plan ./base --plot ''", "--plot"),
    ("plan: empty JSON", "plan ./base --output ''", "--output"),
    ("plan: JSON onto a directory", "plan ./base --output base", "--output base"),
    ("plan: full disk", "plan ./base --output a.json --plot a.png", "File too large", None, SMALL),

    ("demo: unknown device", "demo --output out --device tpu", "--device", NEEDS_DATASETS),
    ("demo: no items", "demo --output out --eval-items 0", "--eval-items"),
    ("demo: no model", "demo --output out --model ./nowhere", "--model ./nowhere", NEEDS_DATASETS),
    ("demo: onto a file", "demo --output sky.jsonl", "--output sky.jsonl", NEEDS_DATASETS),
    ("demo: onto others' files", "demo --output base", "--output base is not empty", NEEDS_DATASETS),
    ("demo: no steps", "demo --steps 0", "--steps"),
    ("demo: a rate below zero", "demo --learning-rate -1", "--learning-rate"),
    ("demo: no branches", "demo --lora-num 0", "lora_num"),
    ("demo: all dropped", "demo --lora-dropout 1", "lora_dropout"),
    ("demo: no module", "demo --target-modules ,", "--target-modules"),
    ("demo: no such option", "demo --stepz 3", "--stepz"),

    ("bench: no tokens", "bench --tokens 0", "--tokens"),
    ("bench: unknown dtype", "bench --dtype int8", "--dtype"),

    ("info: no such GPU", "info --arch sm_99", "--arch"),
    ("info: a class of GPUs", "info --arch large", "--arch"),
    ("info: a device too many", "info cpu", "cpu"),
    ("no such command", "distil adapter", "distil"),
])  # fmt: skip


# Calls


def layer() -> nn.Module:
    return nn.ModuleDict({"q": MultiLoRALinear(nn.Linear(4, 4), r=2, lora_num=2)})


def broken_layer() -> nn.Module:
    model = layer()
    nn.init.constant_(model["q"].lora_B, float("nan"))
    return model


def plan(**options):
    return plan_memory("base", batch=1, seq_len=8, **options)


CALLS = starmap(Row, [
    ("load_adapter: other widths", lambda: load_adapter(llama(hidden_size=48), "adapter"), "lora_A"),
    ("load_adapter: other modules", lambda: load_adapter(nn.Sequential(), "adapter"), "q_proj"),
    ("load_adapter: nowhere", lambda: load_adapter(llama(), ""), "directory"),
    ("save_adapter: nothing to save", lambda: save_adapter(llama(), "out"), "model"),
    ("save_adapter: NaN", lambda: save_adapter(broken_layer(), "adapter"), "not finite, in base_model.model.q"),
    ("save_adapter: nowhere", lambda: save_adapter(layer(), ""), "the output"),
    ("save_adapter: onto a file", lambda: save_adapter(layer(), "sky.jsonl"), "the output sky.jsonl"),
    ("save_adapter: full disk", lambda: save_adapter(layer(), "adapter"), "File too large", None, 99),
    ("export_lora: nothing there", lambda: export_lora(llama(), "out"), "model"),
    ("export_lora: nowhere", lambda: export_lora("adapter", ""), "the output"),
    ("export_lora: NaN", lambda: export_lora(broken_layer(), "out"), "not finite, in base_model.model.q"),
    ("export_lora: onto another", lambda: export_lora("adapter", "exported"), "overwrite=True"),
    ("from_loras: none", lambda: from_loras([], "out"), "directories"),
    ("from_loras: nowhere", lambda: from_loras(["lora-a"], ""), "the output"),
    ("from_loras: of nothing", lambda: from_loras([""], "out"), "directory"),
    ("from_loras: onto an adapter", lambda: from_loras(["lora-a"], "adapter"), "overwrite=True"),
    ("from_loras: a text", lambda: from_loras("lora-a", "out"), "directories"),
    ("from_loras: one weight", lambda: from_loras(["lora-a"], "out", weights=1), "weights"),
    ("from_loras: scaling", lambda: from_loras(["lora-a"], "out", scaling="matrix"), "scaling"),
    ("from_loras: dropout", lambda: from_loras(["lora-a"], "out", lora_dropout=1.5), "lora_dropout"),
    ("from_loras: a file", lambda: from_loras(["sky.jsonl"], "out"), "sky.jsonl"),
    ("init_adapter: onto an adapter", lambda: init_adapter("base", "adapter", MultiLoraConfig()), "overwrite=True"),
    ("init_adapter: modules whole", lambda: init_adapter("base", "out", MultiLoraConfig(modules_to_save=["lm_head"])),
     "modules_to_save"),
    ("init_adapter: biases", lambda: init_adapter("base", "out", MultiLoraConfig(bias="all")), "bias"),
    ("singular_values: no directory", lambda: singular_values("nowhere"), "nowhere"),
    ("singular_values: no adapter", lambda: singular_values(llama()), "model"),
    ("singular_values: no module", lambda: singular_values("adapter", modules=["keys"]), "modules ['keys']"),
    ("fuse: no model", lambda: fuse("base"), "model"),
    ("unfuse: no model", lambda: unfuse(None), "model"),
    ("dropout_mask: p", lambda: dropout_mask(0, 2, 2, -0.5), "p must"),
    ("dropout_mask: M", lambda: dropout_mask(0, -1, 2, 0.5), "M must"),
    ("dropout_mask: K", lambda: dropout_mask(0, 2, 2.0, 0.5), "K must"),
    ("dropout_mask: seed", lambda: dropout_mask(2**63, 2, 2, 0.5), "seed"),
    ("MultiLoraConfig: r", lambda: MultiLoraConfig(r=-1), "r must"),
    ("MultiLoraConfig: lora_num", lambda: MultiLoraConfig(lora_num=True), "lora_num"),
    ("MultiLoraConfig: alpha", lambda: MultiLoraConfig(lora_alpha="8"), "lora_alpha"),
    ("MultiLoraConfig: scaling", lambda: MultiLoraConfig(scaling="matrix"), "scaling"),
    ("MultiLoraConfig: bias", lambda: MultiLoraConfig(bias="lora"), "bias"),
    ("MultiLoraConfig: a switch", lambda: MultiLoraConfig(fan_in_fan_out="no"), "fan_in_fan_out"),
    ("MultiLoraConfig: a number", lambda: MultiLoraConfig(modules_to_save=5), "modules_to_save"),
    ("MultiLoraConfig: init", lambda: MultiLoraConfig(init_weights="gaussian"), "init_weights"),
    ("MultiLoraConfig: whole module", lambda: MultiLoraConfig(modules_to_save="lm_head"), "modules_to_save"),
    ("MultiLoraConfig: targets", lambda: MultiLoraConfig(target_modules="["), "target_modules"),
    ("MultiLoraConfig: pattern", lambda: MultiLoraConfig(rank_pattern={"q": 0}), "r must"),
    ("plan_memory: headroom", lambda: plan(headroom="5%"), "headroom"),
    ("plan_memory: no training", lambda: plan(inference_mode=True), "inference_mode"),
    ("MemoryPlan.plot: nowhere", lambda: MemoryPlan.plot(None, "nowhere/a.png"), "path nowhere/a.png"),
])  # fmt: skip
