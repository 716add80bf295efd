"""Small causal LMs of many types, and what plan_memory says of a step of each, against a real one on this CPU.

Hidden size 256, two layers, so that a per cent is no luck. Measured are torch's allocations; oneDNN is off, whose
bfloat16 products take buffers of their own, which are no tensors and differ from processor to processor.
"""

import gc
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

from bench.causal_lms import TYPES, config
from multilora_fast.memory import fsdp, peak_bytes
from multilora_fast.memory.methods import FULL, LORA, METHODS, OURS, adapt
from multilora_fast.memory.plan import plan_memory
from multilora_fast.memory.report import MethodPlan
from multilora_fast.memory.step import decoder_layers

BRANCHES = {"r": 8, "lora_num": 3}
BATCH, LENGTH = 4, 128
# Base, adapters, dropout, checkpointing.
SETTINGS = [
    ("float32", "float32", 0.0, False),
    ("bfloat16", "bfloat16", 0.05, False),
    ("bfloat16", "float32", 0.0, True),
]
# Of those that are measured, several are no decoders of the Llama kind.
MEASURED = (
    "llama", "gemma2", "phi", "gpt2", "gpt_neo", "gptj", "gpt_neox", "falcon", "mpt", "bloom", "opt", "mixtral",
    "qwen3_moe",
)  # fmt: skip


def beyond(plan: MethodPlan) -> int:
    """The predicted peak without what stays between steps."""
    return plan.peak - plan.weights - plan.adapter - plan.optimizer - plan.workspace


def measure(model: nn.Module, batch: int, length: int, device: str, accumulation: int = 1) -> int:
    """The bytes alive at the peak of a real step, beyond those alive between steps."""
    ids = torch.randint(model.config.vocab_size, (batch, length), device=device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=device == "cuda")

    def step(ids):
        for _ in range(accumulation):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(ids[:1, :8])  # makes the optimizer's state
    with torch.backends.mkldnn.flags(enabled=False):
        return peak_bytes(partial(step, ids), torch.device(device))


def model_of(kind: str, method: str, dtype: str, adapters: str, p: float, checkpointing: bool) -> nn.Module:
    """As its users make it."""
    model = AutoModelForCausalLM.from_config(config(kind), dtype=getattr(torch, dtype))
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = adapt(model, method, "all-linear", **BRANCHES, lora_dropout=p).train()
    if method in (LORA, OURS):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, adapters))
    return model


def planned(kind: str, dtype: str, adapters: str, p: float, checkpointing: bool, **options):
    return plan_memory(
        config(kind), batch=BATCH, seq_len=LENGTH, dtype=dtype, adapter_dtype=adapters, lora_dropout=p,
        checkpointing=checkpointing, device="cpu", **BRANCHES, **options,
    )  # fmt: skip


def rows(kinds: tuple[str, ...] = MEASURED, settings: list[tuple] = SETTINGS) -> Iterator[dict]:
    """One row per type, setting and method; for a type that is refused, one that says why."""
    warnings.simplefilter("ignore")
    for kind in kinds:
        for setting in settings:
            dtype, adapters, p, checkpointing = setting
            asked = {
                "model": kind, "dtype": dtype, "adapters": adapters, "lora_dropout": p, "checkpointing": checkpointing,
            }  # fmt: skip
            plan = planned(kind, *setting)
            for method in METHODS:
                if method in plan.refused:
                    yield {**asked, "method": method, "refused": plan.refused[method]}
                elif method != FULL or not p:
                    predicted = beyond(plan[method])
                    real = measure(model_of(kind, method, *setting), BATCH, LENGTH, "cpu")
                    yield {
                        **asked, "method": method, "phase": plan[method].phase, "predicted": predicted,
                        "measured": real, "error": predicted / real - 1,
                    }  # fmt: skip
                gc.collect()


def refusals() -> dict[str, str]:
    """The types that are not planned, and why."""
    return {kind: reason for kind in TYPES if (reason := refusal(kind))}


def refusal(kind: str, dtype: str = "float32") -> str:
    """Why a type is not planned; nothing where it is."""
    try:
        planned(kind, dtype, dtype, 0.05, False)
    except ValueError as error:
        return str(error)
    return ""


def measure_sharded(rank: int, folder: str, kind: str, setting: tuple, accumulation: int, ranks: int = 2) -> None:
    """One of ``ranks`` gloo processes: the peak of a step under FSDP2, by method, as a file in ``folder``."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    found = {}
    for method in METHODS:
        model = model_of(kind, method, *setting)
        fsdp.shard(model, decoder_layers(model, config(kind)), init_device_mesh("cpu", (ranks,)))
        found[method] = measure(model, BATCH, LENGTH, "cpu", accumulation)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def sharded_rows(kinds: tuple[str, ...] = ("llama", "gpt2"), ranks: int = 2) -> Iterator[dict]:
    """Of the first of two processes, without and with gradient accumulation."""
    for kind in kinds:
        for setting, accumulation in ((SETTINGS[0], 1), (SETTINGS[2], 2)):
            plan = planned(kind, *setting, fsdp=ranks, gradient_accumulation=accumulation)
            with TemporaryDirectory() as folder:
                arguments = (folder, kind, setting, accumulation, ranks)
                torch.multiprocessing.spawn(measure_sharded, arguments, nprocs=ranks)
                measured = torch.load(Path(folder, "0.pt"))
            for method in METHODS:
                predicted, real = beyond(plan[method]), measured[method]
                yield {
                    "model": kind, "dtype": setting[0], "adapters": setting[1], "lora_dropout": setting[2],
                    "checkpointing": setting[3], "method": method, "phase": plan[method].phase, "predicted": predicted,
                    "measured": real, "error": predicted / real - 1, "fsdp": ranks,
                    "gradient_accumulation": accumulation,
                }  # fmt: skip
