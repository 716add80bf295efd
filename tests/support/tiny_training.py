"""Shared by tests of trainers: made-up rows, a tokenizer, a model and its twin with reference layers."""

import json
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from tiny import ATTENTION, llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from multilora_fast import MultiLoRALinear
from multilora_fast.adapters.branches import NAMES
from multilora_fast.peft import MultiLoraConfig, MultiLoraLinear
from multilora_fast.training.config import TrainSettings

ROWS = [{"input_ids": ids, "labels": ids} for ids in (torch.arange(48)[:, None] % 2 * 5 + torch.arange(12) * 7) % 61]
PROMPTS = [{"prompt": f"the sky is w{i} ?", "completion": "blue"} for i in range(20)]
CHATS = [
    {"messages": [{"role": "user", "content": f"the grass is w{i} ?"}, {"role": "assistant", "content": "green"}]}
    for i in range(20)
]


def config(**options) -> MultiLoraConfig:
    """A fresh adapter, whose scales are zero."""
    return MultiLoraConfig(**{"r": 4, "lora_num": 3, "target_modules": ATTENTION, "lora_alpha": 8, **options})


def adapted(base: LlamaForCausalLM | None = None, **options):
    torch.manual_seed(1)
    return get_peft_model(base or llama(), config(**options))


def twin(model, base: LlamaForCausalLM | None = None) -> LlamaForCausalLM:
    """The same base and branches with the reference loop in place of every MultiLoRA layer of ``model``."""
    other = (base or llama(next(model.parameters()).dtype)).requires_grad_(False)
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, MultiLoraLinear):
            branches = layer.multilora_branches["default"]
            n, r, _ = branches.lora_A.shape
            reference = MultiLoRALinear(
                other.get_submodule(name), r=r, lora_num=n, lora_alpha=branches.scaling_factor * r
            )
            for key in NAMES:
                setattr(reference, key, nn.Parameter(getattr(branches, key).detach().clone()))
            other.set_submodule(name, reference)
    return other


def arguments(folder, **options) -> dict:
    """Keywords of TrainingArguments for six steps on a CPU, logging every loss."""
    defaults = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 3e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, "seed": 0,
    }  # fmt: skip
    return {**defaults, **options}


def losses(trainer, **options) -> torch.Tensor:
    trainer.train(**options)
    return logged(trainer)


def logged(trainer) -> torch.Tensor:
    return torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log], dtype=torch.float64)


def trained(model, folder, *, resume=None, **options) -> torch.Tensor:
    """Losses of transformers' Trainer on ROWS."""
    trainer = Trainer(model=model, args=TrainingArguments(**arguments(folder, **options)), train_dataset=ROWS)
    return losses(trainer, resume_from_checkpoint=resume)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 64 words with a chat template."""
    words = ["[UNK]", "[EOS]", "[user]", "[assistant]", "sky", "grass", "the", "is", "red", "green", "blue", "?"]
    words += [f"w{i}" for i in range(64 - len(words))]
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", eos_token="[EOS]")
    made.add_special_tokens({"additional_special_tokens": ["[user]", "[assistant]"]})
    made.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} [EOS] {% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    return made


def write(path: Path, rows: list[dict]) -> Path:
    """Rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(model, data, folder, **options) -> TrainSettings:
    """Settings of a short run of the command in ``folder``."""
    defaults = {
        "dtype": "float32", "r": 4, "learning_rate": 3e-2, "max_steps": 8, "save_steps": 4, "eval_fraction": 0.2,
    }  # fmt: skip
    return TrainSettings(model=model, output=folder, files=data, **{**defaults, **options})


def adapter(folder) -> dict[str, torch.Tensor]:
    loaded = PeftModel.from_pretrained(llama(), folder)
    return {name: p for name, p in loaded.named_parameters() if "multilora" in name}
