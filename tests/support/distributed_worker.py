"""The work of each of two gloo processes in test_distributed.py, which starts them once for all of its tests."""

import torch
from peft import PeftModel
from tiny import IDS, llama
from tiny_training import adapted
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from multilora_fast.peft import restore_float32

WORLD = 2
BATCH = torch.cat([IDS, IDS.flip(0, 1)])  # two rows for each process


def model(dtype="float32", **options):
    """Branches with scales that are not zero, so that every gradient is more than zero."""
    made = adapted(llama(getattr(torch, dtype)), init_weights=False, **options).train()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.endswith("lora_scaling"):
                p.mul_(0.3)
    return made


def gradients(model, ids) -> dict[str, torch.Tensor]:
    """The full gradients of the mean loss, by parameter name."""
    model(input_ids=ids, labels=ids).loss.backward()
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            found[name.removeprefix("module.")] = grad.detach().clone()
    return found


def sharded(model, policy=None):
    """Under FSDP2 as users shard a transformer: each decoder layer, then the rest."""
    options = {"mesh": init_device_mesh("cpu", (WORLD,)), "mp_policy": policy or MixedPrecisionPolicy()}
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def stepped(model, ids) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    found = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return found


def saved(model, folder) -> None:
    """Gather the shards and let the first process write the adapter."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
    dist.barrier()


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
CASES = {
    "ddp": lambda: DistributedDataParallel(model()),
    "ddp checkpointed": lambda: DistributedDataParallel(checkpointed(model())),
    "fsdp": lambda: sharded(model()),
    "fsdp n=1": lambda: sharded(model(lora_num=1)),
    "fsdp scalar": lambda: sharded(model(lora_num=1, scaling="scalar")),
    "fsdp checkpointed": lambda: sharded(checkpointed(model())),
    "fsdp bf16 policy": lambda: sharded(model(), BF16),
    "fsdp bf16 base": lambda: sharded(model("bfloat16")),
    "fsdp bf16 base and policy": lambda: sharded(model("bfloat16"), BF16),
}


def checkpointed(model):
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return model


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    mine = BATCH.chunk(WORLD)[rank]
    found = {name: gradients(make(), mine) for name, make in CASES.items()}

    for n in (1, 3):
        trained = sharded(model(lora_num=n))
        losses = torch.stack(stepped(trained, mine))
        dist.all_reduce(losses)
        found[f"losses n={n}"] = losses / WORLD
        scales = [p for name, p in trained.named_parameters() if name.endswith("lora_scaling")]
        found[f"share n={n}"] = {len(p.to_local()) for p in scales}
        saved(trained, f"{folder}/n={n}")
        again = PeftModel.from_pretrained(llama(), f"{folder}/n={n}").eval()
        with torch.no_grad():
            found[f"logits n={n}"] = trained.eval()(BATCH).logits
            found[f"logits again n={n}"] = again(BATCH).logits

    try:
        restore_float32(sharded(model("bfloat16").to(torch.bfloat16)))
    except ValueError as error:
        found["refused"] = str(error)
    torch.save(found, f"{folder}/found-{rank}.pt")
    dist.destroy_process_group()
