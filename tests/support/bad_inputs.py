"""What users and disks get wrong, as a table for test_bad_inputs.py.

A row is a name, the words of a command or a call, what the error says, and what is done before to the prepared
directory of bad_files.py, in which everything runs.
"""

from collections.abc import Callable
from dataclasses import dataclass

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
from multilora_fast.training.config import RECORD

SMALL = 512  # bytes that a file may have, on a disk that is full


@dataclass(frozen=True)
class Row:
    name: str
    call: str | Callable[[], object]
    says: str
    before: Callable[[], object] = lambda: None
    disk: int | None = None  # the bytes that any file may have


TRAIN = "train sky.jsonl --model ./base --output out"
RESUME = "train sky.jsonl --model {root}/base --output run --resume --r 4 --target-modules q_proj --dtype float32"
RESUME += " --eval-fraction 0 --save-steps 1 --max-steps 4"

READ = [  # of an adapter's files, by every command that reads a MultiLoRA adapter
    ("nothing there", without(f"adapter/{WEIGHTS}"), "adapter is no readable"),
    ("no config", without(f"adapter/{CONFIG}"), "adapter is no readable"),
    ("a config that is no JSON", text(f"adapter/{CONFIG}", "{"), "adapter is no readable"),
    ("a config that is a list", text(f"adapter/{CONFIG}", "[]"), "does not describe a"),
    ("another method", edit_config("adapter", peft_type="IA3"), "does not describe a MultiLoRA adapter."),
    ("no r", edit_config("adapter", r=None), "lacks r."),
    ("a rank that is a text", edit_config("adapter", r="4"), "r must be an integer of at least 1, not '4'."),
    ("a pattern's rank of 0", edit_config("adapter", rank_pattern={"q_proj": 0}), "r must be an integer of at least 1"),
    ("a pattern that is a list", edit_config("adapter", alpha_pattern=[1]), "alpha_pattern must be an object, not [1]"),
    ("a bad expression", edit_config("adapter", lora_num_pattern={"(": 2}), "'(', which is no regular expression"),
    ("an infinite alpha", edit_config("adapter", lora_alpha=float("inf")), "lora_alpha must be a number"),
    ("a text for a switch", edit_config("adapter", fan_in_fan_out="false"), "must be True or False, not 'false'."),
    ("a number of modules", edit_config("adapter", modules_to_save=5), "modules_to_save must be a list of names or"),
    ("a text of modules", edit_config("adapter", modules_to_save="lm_head"), "modules_to_save must be a list of names"),
    ("modules that are numbers", edit_config("adapter", modules_to_save=[5]), "modules_to_save must be a list of"),
    ("a list for a name", edit_config("adapter", base_model_name_or_path=["a"]), "must be a text or None, not ['a']."),
    ("a list for a task", edit_config("adapter", task_type=["a"]), "task_type must be a text or None, not ['a']."),
    ("a number for a revision", edit_config("adapter", revision=1), "revision must be a text or None, not 1."),
    ("a number for a type", edit_config("adapter", base_model_type=1), "base_model_type must be a text or None"),
    ("targets in lists", edit_config("adapter", target_modules=[["q"]]), "target_modules must be a list of names or"),
    ("a huge alpha", edit_config("adapter", lora_alpha=10**400), "lora_alpha must be a number"),
    ("a config that is a directory", directory(f"adapter/{CONFIG}"), f"its {CONFIG} is no file."),
    ("a config that is a pipe", pipe(f"adapter/{CONFIG}"), f"its {CONFIG} is no file."),
    ("a config that has no end", text(f"adapter/{CONFIG}", "[" * 100_000), "adapter is no readable"),
    ("weights that are a directory", directory(f"adapter/{WEIGHTS}"), f"its {WEIGHTS} is no file."),
    ("weights that are a pipe", pipe(f"adapter/{WEIGHTS}"), f"its {WEIGHTS} is no file."),
    ("8 bits", edit_tensors("adapter", each(lambda t: t.to(torch.float8_e4m3fn))), "of torch.float8_e4m3fn, not of"),
    ("weights cut short", cut(f"adapter/{WEIGHTS}"), "adapter is no readable"),
    ("empty weights", cut(f"adapter/{WEIGHTS}", 0), "adapter is no readable"),
    ("foreign weights", text(f"adapter/{WEIGHTS}", "weights " * 99), "adapter is no readable"),
    ("pickled weights", pickled("adapter"), "adapter_model.bin is pickled, which could run code"),
    ("weights pickled as safetensors", pickled("adapter", WEIGHTS), "adapter is no readable"),
    ("NaN", edit_tensors("adapter", with_first(float("nan"))), "holds values that are not finite, in base_model"),
    ("inf", edit_tensors("adapter", with_first(float("inf"))), "holds values that are not finite, in base_model"),
    ("integers", edit_tensors("adapter", each(torch.Tensor.int)), "of torch.int32, not of a floating-point dtype."),
    ("single numbers", edit_tensors("adapter", each(lambda t: t.sum())), "holds lora_A of shape () for"),
    ("other shapes", edit_tensors("adapter", each(lambda t: t[:1])), "holds lora_A of shape (1, 4, 32) for"),
    ("half of it", edit_tensors("adapter", lambda t: t.pop(next(iter(t)))), "lacks lora_"),
    ("no tensor", edit_tensors("adapter", dict.clear), "holds no MultiLoRA tensor."),
]  # fmt: skip

COMMANDS = [
    *(Row(f"export: {name}", "export adapter out", says, before) for name, before, says in READ),
    Row("export: no directory", "export nowhere out", "nowhere is no readable MultiLoRA adapter: no such directory."),
    Row("export: a file", "export sky.jsonl out", "sky.jsonl is no readable MultiLoRA adapter: it is a file."),
    Row("export: wrong base", "export adapter out --model ./other", "adapter does not fit ./other: "),
    Row("export: no base", "export adapter out --model ./nowhere", "--model ./nowhere: no such directory."),
    Row("export: a file for a base", "export adapter out --model sky.jsonl",
        "--model sky.jsonl is a file; give a directory or a hub id."),
    Row("export: a base cut short", "export adapter out --model ./base", "--model ./base could not be loaded: ",
        cut("base/model.safetensors")),
    Row("export: a base with code", "export adapter out --model ./base", "--model ./base could not be loaded: ",
        remote_code),
    Row("export: nowhere", "export adapter ''", "Invalid value for 'out': an empty text; give a path."),
    Row("export: of nothing", "export '' out", "Invalid value for 'adapter': an empty text; give a path."),
    Row("export: a config of the output's that is a directory", "export adapter exported", f"exported/{CONFIG}: Is a ",
        directory(f"exported/{CONFIG}")),
    Row("export: onto a pipe", "export adapter lora-a", "no earlier export: ", pipe(f"lora-a/{WEIGHTS}")),
    Row("export: onto a file", "export adapter sky.jsonl", "sky.jsonl is a file; give a directory."),
    Row("export: under a file", "export adapter sky.jsonl/out", "sky.jsonl/out cannot be written: "),
    Row("export: onto itself", "export adapter adapter", "adapter holds an adapter that is no earlier export: give"),
    Row("export: onto a LoRA", "export adapter lora-a", "lora-a holds an adapter that is no earlier export: give"),
    Row("export: onto a LoRA of another file", "export adapter lora-a", "no earlier export: ", pickled("lora-a")),
    Row("export: onto a model", "export adapter base", "the output base holds a model (config.json): give another"),
    Row("export: onto a training run", "export adapter run", "run holds a training run (train.json): give another"),
    Row("export: no permission", "export adapter out", "out cannot be written: no permission for ", no_permission),
    Row("export: in a place of the system's", "export adapter /sys/out", "/sys/out"),
    Row("export: full disk", "export adapter out", "File too large", disk=SMALL),
    Row("export: full disk over an earlier one", "export adapter exported", "File too large", disk=SMALL),

    Row("merge: no directory", "merge lora-a nowhere --output out", "nowhere is no readable LoRA adapter: "),
    Row("merge: a MultiLoRA adapter", "merge adapter --output out", "holds a MULTILORA adapter, not a LoRA adapter."),
    Row("merge: no weight for one", "merge lora-a lora-b --output out --weights 1", "one number per adapter, 2, with"),
    Row("merge: weights with spaces", "merge lora-a lora-b --output out --weights 1 0.5",
        "--weights must hold one number per adapter, 3, with commas between them, not '1'."),
    Row("merge: words for weights", "merge lora-a --output out --weights one", "weights must be numbers with commas"),
    Row("merge: NaN for a weight", "merge lora-a --output out --weights nan", "weights must be finite, not [nan]."),
    Row("merge: cut short", "merge lora-a --output out", "lora-a is no readable LoRA", cut(f"lora-a/{WEIGHTS}")),
    Row("merge: pickled", "merge lora-a --output out", "adapter_model.bin is pickled", pickled("lora-a")),
    Row("merge: NaN", "merge lora-a --output out", "values that are not finite",
        edit_tensors("lora-a", with_first(float("nan")))),
    Row("merge: no alpha", "merge lora-a --output out", "lacks lora_alpha.", edit_config("lora-a", lora_alpha=None)),
    Row("merge: alpha a text", "merge lora-a --output out", "lora_alpha must be a number or None, not '8'.",
        edit_config("lora-a", lora_alpha="8")),
    Row("merge: a text for a switch", "merge lora-a --output out", "use_rslora must be True or False, not 'no'.",
        edit_config("lora-a", use_rslora="no")),
    Row("merge: no DoRA", "merge lora-a --output out", "use_dora must be True or False, not 'false'.",
        edit_config("lora-a", use_dora="false")),
    Row("merge: a list for a name", "merge lora-a lora-b --output out", "must be a text or None, not ['a'].",
        edit_config("lora-a", base_model_name_or_path=["a"])),
    Row("merge: no alpha for a module", "merge lora-a --output out", "without lora_alpha for ",
        edit_config("lora-a", alpha_pattern={"q_proj": None})),
    Row("merge: 8 bits", "merge lora-a --output out", "of torch.float8_e5m2, not of one of float64, float32, bfloat16",
        edit_tensors("lora-a", each(lambda t: t.to(torch.float8_e5m2)))),
    Row("merge: a pipe", "merge lora-a --output out", "is no file.", pipe(f"lora-a/{CONFIG}")),
    Row("merge: nowhere", "merge lora-a --output ''", "Invalid value for '--output': an empty text; give a"),
    Row("merge: of two bases", "merge lora-a lora-other --output out", "maps 32 to 32 features in lora-a, but 48"),
    Row("merge: onto a file", "merge lora-a --output sky.jsonl", "sky.jsonl is a file; give a directory."),
    Row("merge: onto an adapter", "merge lora-a --output adapter", "adapter holds an adapter that is no earlier merge"),
    Row("merge: onto an export", "merge lora-a --output exported", "exported holds an adapter that is no earlier"),
    Row("merge: onto another LoRA", "merge lora-a --output lora-b", "lora-b holds an adapter that is no earlier merge"),
    Row("merge: onto a model", "merge lora-a --output base", "the output base holds a model (config.json): give"),
    Row("merge: onto a training run", "merge lora-a --output run", "run holds a training run (train.json): give"),
    Row("merge: onto checkpoints", "merge lora-a --output run", "run holds a training run (checkpoint-*): give",
        without(f"run/{RECORD}")),
    Row("merge: onto what it cannot read", "merge nowhere --output base", "the output base holds a model"),
    Row("merge: onto a source", "merge lora-a lora-b --output lora-b", "lora-b holds one of the LoRA adapters"),
    Row("merge: no permission", "merge lora-a --output out", "out cannot be written: no permission", no_permission),
    Row("merge: full disk", "merge lora-a --output out", "File too large", disk=SMALL),
    Row("merge: no output", "merge lora-a", "Missing option '--output'"),

    Row("train: no file at all", "train --model ./base --output out", "no data was given: name JSONL files, or use"),
    Row("train: a dtype, before the data", f"{TRAIN.replace('sky', 'night')} --dtype fp16", "--dtype must be auto, "),
    Row("train: no data", TRAIN.replace("sky", "night"), "night.jsonl cannot be read: No such file or directory."),
    Row("train: a directory", TRAIN.replace("sky.jsonl", "base"), "base cannot be read: Is a directory."),
    Row("train: foreign data", TRAIN.replace("sky.jsonl", f"adapter/{WEIGHTS}"), f"{WEIGHTS}"),
    Row("train: broken data", TRAIN, "sky.jsonl, line 20 is not JSON: ", cut("sky.jsonl", -3)),
    Row("train: lora_alpha", f"{TRAIN} --lora-alpha nan", "lora_alpha must be a number or None, not nan."),
    Row("train: lora_dropout", f"{TRAIN} --lora-dropout 1", "lora_dropout must be a probability in [0, 1), not 1.0."),
    Row("train: half a step", f"{TRAIN} --max-steps 1.5", "Invalid value for '--max-steps'"),
    Row("train: seed", f"{TRAIN} --seed -1 --dtype float32", "--seed must be from 0 to 4294967295, not -1."),
    Row("train: no model", TRAIN.replace("./base", "./nowhere"), "--model ./nowhere: no such directory."),
    Row("train: a file for a model", TRAIN.replace("./base", "sky.jsonl"), "--model sky.jsonl is a file; give a dir"),
    Row("train: no model in it", TRAIN.replace("./base", "./tmp"), "could not be loaded: it holds no config.json, so"),
    Row("train: no tokenizer", TRAIN, "--model ./base could not be loaded: it holds no tokenizer", no_tokenizer),
    Row("train: no such module", f"{TRAIN} --target-modules qproj", "qproj match nothing: the linear layers end in q_"),
    Row("train: an adapter for a model", TRAIN.replace("./base", "./adapter"), "--model ./adapter could not be loaded"),
    Row("train: a model cut short", TRAIN, "--model ./base could not be loaded: ", cut("base/model.safetensors")),
    Row("train: a model with code", TRAIN, "--model ./base could not be loaded: ", remote_code),
    Row("train: onto a file", TRAIN.replace("put out", "put sky.jsonl"), "sky.jsonl is a file; give a directory."),
    Row("train: under a file", TRAIN.replace("put out", "put sky.jsonl/a/b"), "sky.jsonl/a/b cannot be written: "),
    Row("train: onto others' files", TRAIN.replace("put out", "put base"), "--output base is not empty: give another"),
    Row("train: onto another's record", TRAIN.replace("put out", "put tmp"), "--output tmp is not empty: give another",
        text(f"tmp/{RECORD}", '{"data": []}')),
    Row("train: no permission", TRAIN, "--output out cannot be written: no permission for ", no_permission),
    Row("train: full disk", f"{TRAIN} --dtype float32", "File too large", disk=8),
    Row("train: nowhere", "train sky.jsonl --model ./base --output ''", "'--output': an empty text; give a path."),
    Row("train: resumed from cut weights", RESUME, "is no readable MultiLoRA adapter: ",
        cut(f"run/checkpoint-2/{WEIGHTS}")),
    Row("train: resumed from pickled weights", RESUME, "adapter_model.bin is pickled", pickled("run/checkpoint-2")),
    Row("train: resumed from NaN", RESUME, "holds values that are not finite",
        edit_tensors("run/checkpoint-2", with_first(float("nan")))),
    Row("train: resumed from a cut optimizer", RESUME, "optimizer.pt is damaged.",
        cut("run/checkpoint-2/optimizer.pt")),
    Row("train: resumed from a cut record", RESUME, f"{RECORD} is damaged: ", cut(f"run/{RECORD}")),
    Row("train: resumed when done", RESUME.replace("steps 4", "steps 2"), "the run has taken its 2 steps"),

    Row("spectrum: nothing", "spectrum ''", "an empty text; give a path."),
    Row("spectrum: a pipe", "spectrum adapter", "is no file.", pipe(f"adapter/{CONFIG}")),
    Row("spectrum: no directory", "spectrum nowhere", "nowhere is no readable MultiLoRA or LoRA adapter: "),
    Row("spectrum: cut short", "spectrum adapter", "adapter is no readable", cut(f"adapter/{WEIGHTS}")),
    Row("spectrum: pickled", "spectrum lora-a", "adapter_model.bin is pickled", pickled("lora-a")),
    Row("spectrum: NaN", "spectrum adapter", "not finite", edit_tensors("adapter", with_first(float("nan")))),
    Row("spectrum: no direction", "spectrum adapter --top 0", "--top must be at least 1, not 0."),
    Row("spectrum: no module", "spectrum adapter --modules keys", "modules ['keys'] match nothing: "),
    Row("spectrum: twice", "spectrum adapter adapter", "adapter is given twice."),
    Row("spectrum: a model alone", "spectrum base", "base holds a model, not an adapter: "),
    Row("spectrum: wrong base", "spectrum base --base ./other", "base and source must have equal shapes, but "),
    Row("spectrum: no base", "spectrum base --base ./nowhere", "./nowhere: no such directory."),
    Row("spectrum: a plot of another kind", "spectrum adapter --plot a.pdf", "--plot must end in .png, but is a.pdf."),
    Row("spectrum: a plot nowhere", "spectrum adapter --plot nowhere/a.png", "--plot nowhere/a.png: its directory"),
    Row("spectrum: a base for no model", "spectrum adapter --base ./base", "every directory holds an adapter."),
    Row("spectrum: of two models", "spectrum lora-a lora-other", "lora-a and lora-other are of different models: "),
    Row("spectrum: full disk", "spectrum adapter --plot a.png", "File too large", disk=SMALL),

    Row("plan: no model", "plan ./nowhere", "./nowhere"),
    Row("plan: an adapter for a model", "plan ./adapter", "./adapter"),
    Row("plan: a broken config", "plan ./base", "./base", text("base/config.json", "{")),
    Row("plan: a model with code", "plan ./base", "./base", remote_code),
    Row("plan: no rows", "plan ./base --batch 0", "batch must be an integer of at least 1, not 0."),
    Row("plan: no tokens", "plan ./base --seq-len -1", "seq_len must be an integer of at least 1, not -1."),
    Row("plan: no rank", "plan ./base --r 0", "r must be an integer of at least 1, not 0."),
    Row("plan: unknown dtype", "plan ./base --dtype int8", "int8"),
    Row("plan: unknown optimizer", "plan ./base --optimizer adam", "optimizer must be"),
    Row("plan: unknown quantization", "plan ./base --quantization 2bit", "quantization must be"),
    Row("plan: unknown device", "plan ./base --device tpu", "device must be"),
    Row("plan: unknown module", "plan ./base --target-modules keys", "keys"),
    Row("plan: unknown GPU", "plan ./base --gpu H1", "H1"),
    Row("plan: a directory that is not there", "plan nowhere/", "model nowhere/: no such directory."),
    Row("plan: a file for a model", "plan sky.jsonl", "model sky.jsonl is a file; give a directory or a hub id."),
    Row("plan: a size without its unit", "plan ./base --gpu-memory 24", 'must be a size such as "24GiB", or one of'),
    Row("plan: no size", "plan ./base --gpu-memory lots", "lots"),
    Row("plan: two sizes", "plan ./base --gpu H100 --gpu-memory 1GiB", "--gpu and --gpu-memory both say how much"),
    Row("plan: a plot nowhere", "plan ./base --plot nowhere/a.png", "--plot nowhere/a.png: its directory does not"),
    Row("plan: a plot of no kind", "plan ./base --plot plan", "--plot must end in .png, .pdf or .svg, but is plan."),
    Row("plan: JSON onto a directory", "plan ./base --output base", "--output base is a directory; give a file."),
    Row("plan: JSON nowhere", "plan ./base --output nowhere/a.json", "--output nowhere/a.json: its directory does not"),
    Row("plan: full disk", "plan ./base --output a.json", "File too large", disk=SMALL),
    Row("plan: full disk for a plot", "plan ./base --plot a.png", "File too large", disk=SMALL),

    Row("demo: unknown device", "demo --output out --device tpu", "--device must be auto, cpu or cuda, not 'tpu'."),
    Row("demo: unknown dtype", "demo --output out --dtype int8", "--dtype must be auto, float32 or bfloat16, not"),
    Row("demo: no items", "demo --output out --eval-items 0", "--eval-items must be at least 1, not 0."),
    Row("demo: no model", "demo --output out --model ./nowhere", "--model ./nowhere: no such directory."),
    Row("demo: onto a file", "demo --output sky.jsonl", "--output sky.jsonl is a file; give a directory."),
    Row("demo: under a file", "demo --output sky.jsonl/a", "--output sky.jsonl/a cannot be written: "),
    Row("demo: onto others' files", "demo --output base", "--output base is not empty and not an earlier demo's"),
    Row("demo: no permission", "demo --output out", "out cannot be written: no permission for ", no_permission),

    Row("info: no such GPU", "info --arch sm_99", "--arch must be sm_90, gfx942, or default"),
    Row("info: a class of GPUs", "info --arch large", "or default for any other GPU, not 'large'."),
    Row("info: a device too many", "info cpu", "unexpected extra argument"),
    Row("no such command", "distil adapter", "No such command 'distil'."),
]  # fmt: skip


# Calls


def layer() -> nn.Module:
    return nn.ModuleDict({"q": MultiLoRALinear(nn.Linear(4, 4), r=2, lora_num=2)})


def broken_layer() -> nn.Module:
    model = layer()
    nn.init.constant_(model["q"].lora_B, float("nan"))
    return model


CALLS = [
    *(Row(f"load_adapter: {name}", lambda: load_adapter(llama(), "adapter"), says, before)
      for name, before, says in READ),
    Row("load_adapter: other widths", lambda: load_adapter(llama(hidden_size=48), "adapter"), "needs (3, 4, 48)."),
    Row("load_adapter: other modules", lambda: load_adapter(nn.Sequential(), "adapter"), "the model does not have."),
    Row("save_adapter: nothing to save", lambda: save_adapter(llama(), "out"), "holds no MultiLoRA layer to save."),
    Row("save_adapter: NaN", lambda: save_adapter(broken_layer(), "adapter"), "not finite, in base_model.model.q."),
    Row("save_adapter: nowhere", lambda: save_adapter(layer(), ""), "the output is an empty text; give a path."),
    Row("load_adapter: nowhere", lambda: load_adapter(llama(), ""), "directory is an empty text; give a path."),
    Row("save_adapter: onto a file", lambda: save_adapter(layer(), "sky.jsonl"), "sky.jsonl is a file"),
    Row("save_adapter: full disk", lambda: save_adapter(layer(), "adapter"), "File too large", disk=99),
    Row("export_lora: nothing there", lambda: export_lora(llama(), "out"), "holds no MultiLoRA adapter to export."),
    Row("export_lora: nowhere", lambda: export_lora("adapter", ""), "the output is an empty text; give a path."),
    Row("export_lora: NaN", lambda: export_lora(broken_layer(), "out"), "not finite, in base_model.model.q."),
    Row("from_loras: none", lambda: from_loras([], "out"), "directories must name at least one LoRA adapter."),
    Row("from_loras: nowhere", lambda: from_loras(["lora-a"], ""), "the output is an empty text; give a path."),
    Row("from_loras: of nothing", lambda: from_loras([""], "out"), "directory is an empty text; give a path."),
    Row("from_loras: onto an adapter", lambda: from_loras(["lora-a"], "adapter"), "adapter that is no earlier merge"),
    Row("from_loras: onto a training run", lambda: from_loras(["lora-a"], "run"), "run holds a training run"),
    Row("from_loras: a text", lambda: from_loras("lora-a", "out"), "directories must be a list of LoRA adapters'"),
    Row("from_loras: one weight", lambda: from_loras(["lora-a"], "out", weights=1), "weights must be a list of"),
    Row("from_loras: a file", lambda: from_loras(["sky.jsonl"], "out"), "sky.jsonl is no readable LoRA adapter: "),
    Row("singular_values: no directory", lambda: singular_values("nowhere"), "nowhere is no readable "),
    Row("singular_values: no adapter", lambda: singular_values(llama()), "holds no MultiLoRA or LoRA adapter."),
    Row("singular_values: no module", lambda: singular_values("adapter", modules=["keys"]), "['keys'] match nothing: "),
    Row("fuse: no model", lambda: fuse("base"), "model must be an nn.Module, not str."),
    Row("unfuse: no model", lambda: unfuse(None), "model must be an nn.Module, not NoneType."),
    Row("dropout_mask: p", lambda: dropout_mask(0, 2, 2, -0.5), "p must be a probability in [0, 1), not -0.5."),
    Row("dropout_mask: M", lambda: dropout_mask(0, -1, 2, 0.5), "M must be an integer of at least 0, not -1."),
    Row("dropout_mask: K", lambda: dropout_mask(0, 2, 2.0, 0.5), "K must be an integer of at least 0, not 2.0."),
    Row("dropout_mask: seed", lambda: dropout_mask(2**63, 2, 2, 0.5), "seed must be an int of 64 bits"),
    Row("MultiLoraConfig: r", lambda: MultiLoraConfig(r=-1), "r must be an integer of at least 1, not -1."),
    Row("MultiLoraConfig: lora_num", lambda: MultiLoraConfig(lora_num=True), "lora_num must be an integer of at least"),
    Row("MultiLoraConfig: alpha", lambda: MultiLoraConfig(lora_alpha="8"), "lora_alpha must be a number or None, not"),
    Row("MultiLoraConfig: scaling", lambda: MultiLoraConfig(scaling="matrix"), "scaling must be"),
    Row("MultiLoraConfig: bias", lambda: MultiLoraConfig(bias="lora"), 'bias must be "none", "all" or "lora_only"'),
    Row("MultiLoraConfig: a switch", lambda: MultiLoraConfig(fan_in_fan_out="no"), "fan_in_fan_out must be True or"),
    Row("MultiLoraConfig: a number", lambda: MultiLoraConfig(modules_to_save=5), "modules_to_save must be a list of"),
    Row("MultiLoraConfig: init", lambda: MultiLoraConfig(init_weights="gaussian"), "init_weights must be True or"),
    Row("MultiLoraConfig: whole module", lambda: MultiLoraConfig(modules_to_save="lm_head"), "modules_to_save must be"),
    Row("MultiLoraConfig: targets", lambda: MultiLoraConfig(target_modules="["), "'[', which is no regular expression"),
    Row("plan_memory: headroom", lambda: plan_memory("base", batch=1, seq_len=8, headroom="5%"), "headroom must be a"),
    Row("plan_memory: no training", lambda: plan_memory("base", batch=1, seq_len=8, inference_mode=True),
        "inference_mode is no field of MultiLoraConfig that training has."),
    Row("plan_memory: a plot nowhere", lambda: plan_memory("base", batch=1, seq_len=8).plot("nowhere/a.png"),
        "path nowhere/a.png: its directory does not exist."),
    Row("MultiLoraConfig: pattern", lambda: MultiLoraConfig(rank_pattern={"q": 0}), "r must be an integer of at least"),
]  # fmt: skip
