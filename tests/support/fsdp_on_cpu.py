"""``multilora-fast`` as accelerate runs it under FSDP2, on a machine without GPUs.

accelerate shards on accelerators only: on CPUs it leaves the FSDP settings unused. Told here that the CPUs are
GPUs which talk through gloo, it takes the way that it takes on GPUs.
"""

import os

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

from multilora_fast import cli
from multilora_fast.training import run as training

init, run = PartialState.__init__, training.run


def run_and_report(settings):
    trainer = run(settings)
    sharded = sum(isinstance(module, FSDPModule) for module in trainer.model_wrapped.modules())
    print(f"process {trainer.args.process_index} of {trainer.args.world_size}: {sharded} modules sharded", flush=True)
    return trainer


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.__init__ = lambda self, cpu=False, **kwargs: init(self, False, **kwargs)
    training.run = run_and_report
    cli.main()
