"""plan_memory against real steps of small causal LMs of many types on this CPU.

Hidden size 256 and two layers, large enough that one per cent is significant. Each base is in float32 and in bfloat16,
its adapters in its dtype and in float32, with and without dropout and checkpointing; full fine-tuning has no adapters
and no dropout. Measures torch's allocations with oneDNN off: its bfloat16 products take buffers outside of torch's
allocator, which differ between processors.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

from bench.causal_lms import LEFT_OUT, TYPES, config
from multilora_fast.memory import peak_bytes
from multilora_fast.memory.methods import FULL, LORA, METHODS, OURS, adapt
from multilora_fast.memory.plan import plan_memory
from multilora_fast.memory.report import MethodPlan
from multilora_fast.memory.step import decoder_layers

BRANCHES = {"r": 8, "lora_num": 3}
BATCH, LENGTH = 2, 64
# Base, adapters, dropout, checkpointing.
DTYPES = (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"))
SETTINGS = [(*dtypes, p, checkpointing) for dtypes, p, checkpointing in product(DTYPES, (0.0, 0.05), (False, True))]
NAMES = ("model", "dtype", "adapters", "lora_dropout", "checkpointing", "method")
MEASURED = (
    "llama", "gemma2", "phi", "gpt2", "gpt_neo", "gptj", "gpt_neox", "falcon", "mpt", "bloom", "opt", "mixtral",
    "qwen3_moe", "mamba2",
)  # fmt: skip
SHARDED = ("llama", "phi")


def beyond(plan: MethodPlan) -> int:
    """The predicted peak without what stays allocated between steps."""
    return plan.peak - plan.weights - plan.adapter - plan.optimizer - plan.workspace


def measure(model: nn.Module, batch: int, length: int, device: str, accumulation: int = 1) -> int:
    """The peak of a real step beyond what stays allocated between steps, in bytes. Under FSDP2 the least of a few
    steps, because a gloo thread may free a buffer late.
    """
    ids = torch.randint(model.config.vocab_size, (batch, length), device=device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=device == "cuda")

    def step(ids):
        for left in reversed(range(accumulation)):
            if hasattr(model, "set_requires_gradient_sync"):  # under FSDP2, as the Trainer does
                model.set_requires_gradient_sync(left == 0)
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(ids[:1, :8])  # allocates the optimizer state
    steps = 4 if hasattr(model, "set_requires_gradient_sync") else 1
    with torch.backends.mkldnn.flags(enabled=False):
        return min(peak_bytes(partial(step, ids), torch.device(device)) for _ in range(steps))


def model_of(kind: str, method: str, dtype: str, adapters: str, p: float, checkpointing: bool) -> nn.Module:
    """A model as users build it."""
    model = AutoModelForCausalLM.from_config(config(kind), dtype=getattr(torch, dtype))
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    options = {**BRANCHES, "lora_dropout": p, "exclude_modules": LEFT_OUT.get(kind)}
    model = adapt(model, method, "all-linear", **options).train()
    if method in (LORA, OURS):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, adapters))
    return model


def planned(kind: str, dtype: str, adapters: str, p: float, checkpointing: bool, **options):
    return plan_memory(
        config(kind), batch=BATCH, seq_len=LENGTH, dtype=dtype, adapter_dtype=adapters, lora_dropout=p,
        checkpointing=checkpointing, device="cpu", exclude_modules=LEFT_OUT.get(kind), **BRANCHES, **options,
    )  # fmt: skip


def rows(known: Callable[[dict], bool]) -> Iterator[dict]:
    """One row per type, setting and method, except those in ``known``. A method that cannot adapt the type gives one
    row with the reason.
    """
    warnings.simplefilter("ignore")
    for kind, setting in product(MEASURED, SETTINGS):
        dtype, adapters, p, _ = setting
        methods = [m for m in METHODS if m != FULL or (dtype == adapters and not p)]
        asked = [dict(zip(NAMES, (kind, *setting, method), strict=True)) for method in methods]
        asked = [row for row in asked if not known(row)]
        plan = planned(kind, *setting) if asked else None
        for row in asked:
            method = row["method"]
            if method in plan.refused:
                yield {**row, "refused": plan.refused[method]}
            else:
                real = measure(model_of(kind, method, *setting), BATCH, LENGTH, "cpu")
                yield {**row, **compared(plan[method], real)}
            gc.collect()


def compared(plan: MethodPlan, real: int) -> dict:
    predicted = beyond(plan)
    return {"phase": plan.phase, "predicted": predicted, "measured": real, "error": predicted / real - 1}


def refusals() -> dict[str, dict[str, str]]:
    """The reasons of every type that is not planned, by method; "all" stands for every method."""
    return {kind: reasons for kind in TYPES if (reasons := refusal(kind))}


def refusal(kind: str, dtype: str = "float32") -> dict[str, str]:
    """The reason why a type is not planned, or None."""
    try:
        return dict(planned(kind, dtype, dtype, 0.05, False).refused)
    except ValueError as error:
        return {"all": str(error)}


def measure_sharded(rank: int, folder: str, kind: str, setting: tuple, accumulation: int, ranks: int = 2) -> None:
    """Run one of ``ranks`` gloo processes: write the peak of a step under FSDP2, by method, into ``folder``."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    found = {}
    for method in METHODS:
        model = model_of(kind, method, *setting)
        mesh = init_device_mesh("cpu", (ranks,))
        for module in (*decoder_layers(model, config(kind)), model):
            fully_shard(module, mesh=mesh)
        found[method] = measure(model, BATCH, LENGTH, "cpu", accumulation)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def sharded_rows(known: Callable[[dict], bool], ranks: int = 2) -> Iterator[dict]:
    """The rows of the first of two processes, without and with gradient accumulation."""
    accumulated = (1, SETTINGS[0]), (3, ("bfloat16", "float32", 0.0, True))
    for kind, (accumulation, setting) in product(SHARDED, accumulated):
        shared = {"fsdp": ranks, "gradient_accumulation": accumulation}
        asked = [dict(zip(NAMES, (kind, *setting, method), strict=True)) | shared for method in METHODS]
        if all(known(row) for row in asked):
            continue
        plan = planned(kind, *setting, **shared)
        with TemporaryDirectory() as folder:
            arguments = (folder, kind, setting, accumulation, ranks)
            torch.multiprocessing.spawn(measure_sharded, arguments, nprocs=ranks)
            measured = torch.load(Path(folder, "0.pt"))
        for row in asked:
            yield {**row, **compared(plan[row["method"]], measured[row["method"]])}
