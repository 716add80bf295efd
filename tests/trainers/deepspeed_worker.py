"""One of the processes of test_deepspeed.py: trains every case, and writes what it saw to FOLDER/seen-RANK.json.

torchrun --nproc-per-node N deepspeed_worker.py FOLDER
"""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import distributed as dist
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, training_args
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from tiny import llama
from tiny_training import ROWS, adapted, arguments

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for inference, and minutes to compile
training_args.is_torch_bf16_gpu_available = lambda: True  # without use_cpu, which would keep DeepSpeed out
# accelerate takes a machine without an accelerator for one process where DeepSpeed is used.
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)

DTYPES = ("float32", "bfloat16")
STAGES = (1, 2, 3)
CHECKPOINTING = (None, "plain", "reentrant")
EVAL_ON_START = (False, True)
CASES = {
    f"ZeRO-{stage} {dtype} {checkpointing or 'no'} checkpointing{' eval_on_start' * early}": (
        stage, dtype, checkpointing, early,
    ) for stage, dtype, checkpointing, early in product(STAGES, DTYPES, CHECKPOINTING, EVAL_ON_START)
    if (stage, dtype) != (3, "bfloat16")  # which rounds elsewhere, under LoRA too
}  # fmt: skip

WITHOUT = {"float32": "float32", "bfloat16": "bfloat16"}


class Masters(torch.optim.Optimizer):
    """AdamW on float32 masters of parameters in bfloat16, which DeepSpeed's bf16 is: also the gradients are cast before
    they are clipped."""

    def __init__(self, parameters, lr: float):
        super().__init__(parameters, {"lr": lr})
        self.half = self.param_groups[0]["params"]
        self.masters = [p.detach().float().requires_grad_() for p in self.half]
        self.inner = torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.0)
        self.norms: list[float] = []

    @torch.no_grad()
    def step(self, closure=None):
        for master, p in zip(self.masters, self.half, strict=True):
            master.grad = p.grad.float()
        self.norms.append(torch.nn.utils.clip_grad_norm_(self.masters, 1.0).item())
        self.inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.inner.step()
        for master, p in zip(self.masters, self.half, strict=True):
            p.copy_(master)


class Recorder(Trainer):
    """Notes the loss of each step, the mean over the processes, which the log rounds."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        mean = loss.detach().double()
        dist.all_reduce(mean)
        self.__dict__.setdefault("seen", []).append(mean.item() / dist.get_world_size())
        return loss


def configured(stage: int) -> dict:
    """DeepSpeed's configuration. ZeRO-3 shards every parameter, however small, and gathers it for its layer alone."""
    small: dict[str, Any] = {
        "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }  # fmt: skip
    return {
        "zero_optimization": {"stage": stage, **(small if stage == 3 else {})},
        "bf16": {"enabled": "auto"},
        "gradient_clipping": 1.0,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }


def train(
    folder: Path, stage: int, dtype: str, checkpointing=None, early=True, resume: Path | None = None, branches=None
) -> dict:
    """Four steps, or the last two of them. Stage 0 is without DeepSpeed, the branches in dtype ``branches``."""
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    options = arguments(
        folder, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, eval_strategy="steps", eval_steps=2,
        eval_on_start=early, save_strategy="steps" if stage else "no", save_steps=2, use_cpu=stage == 0,
        bf16=stage > 0 and dtype == "bfloat16", deepspeed=configured(stage) if stage else None,
    )  # fmt: skip
    if checkpointing:
        reentrant = {"use_reentrant": checkpointing == "reentrant"}
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": reentrant}
    masters = stage == 0 and branches == "bfloat16"
    made = TrainingArguments(**options, max_grad_norm=0.0 if masters else 1.0)
    base = LlamaForCausalLM.from_pretrained(folder.parent / "model", dtype=getattr(torch, dtype))  # sharded by ZeRO-3
    model = adapted(base, target_modules="all-linear", init_weights=False)
    optimizer = None
    if masters:
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.data = p.data.bfloat16()
        optimizer = Masters(trained, lr=made.learning_rate)
    trainer = Recorder(model, made, train_dataset=ROWS, eval_dataset=ROWS[:4], optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume and str(resume))
    log = trainer.state.log_history
    evaluated = [row["eval_loss"] for row in log if "eval_loss" in row]
    seen: dict[str, Any] = {"losses": trainer.seen, "evaluated": evaluated}
    seen["norms"] = optimizer.norms if optimizer else [float(row["grad_norm"]) for row in log if "grad_norm" in row]
    trainer.save_model(str(folder / "end"))
    dist.barrier()
    return seen


def with_resumption(folder: Path, *case) -> dict:
    whole = train(folder, *case)
    again = train(folder.with_name(f"{folder.name} again"), *case, resume=folder / "checkpoint-2")
    return {"whole": whole, "again": again}


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        llama().save_pretrained(out / "model")
    dist.barrier()
    seen = {name: train(out / name, 0, dtype, branches=dtype) for name, dtype in WITHOUT.items()}
    seen |= {name: with_resumption(out / name, *case) for name, case in CASES.items()}
    (out / f"seen-{dist.get_rank()}.json").write_text(json.dumps(seen, indent=1))
    dist.destroy_process_group()
