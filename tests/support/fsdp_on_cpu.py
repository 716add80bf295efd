"""``multilora-fast`` as ``accelerate launch`` runs it under FSDP2, on a machine without GPUs.

accelerate shards on accelerators only: on CPUs it ignores the FSDP settings. Told here that the CPUs are GPUs which
talk through gloo, it takes the way that it takes on GPUs.
"""

import os
import sys

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from processes import FORKS, group
from torch.distributed.fsdp import FSDPModule

from multilora_fast import cli
from multilora_fast.training import run as training


def launch(config: str, count: int, words: list, out) -> list:
    """``count`` processes of the command ``words``, which write what they say to ``out``-RANK."""
    asked = launch_command_parser().parse_args(["--config_file", config, "--num_processes", str(count), "-"])
    settings = prepare_multi_gpu_env(_validate_launch_command(asked)[0])
    changed = {name: value for name, value in settings.items() if os.environ.get(name) != value}
    processes = [
        FORKS.Process(target=work, args=(words, changed | one, f"{out}-{one['RANK']}")) for one in group(count)
    ]
    for process in processes:
        process.start()
    return processes


def work(words: list, environment: dict[str, str], out: str) -> None:
    os.environ.update(environment, ACCELERATE_TORCH_DEVICE="cpu")
    file = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    init, run = PartialState.__init__, training.run
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.__init__ = lambda self, cpu=False, **kwargs: init(self, False, **kwargs)

    def run_and_report(settings):
        trainer = run(settings)
        sharded = sum(isinstance(module, FSDPModule) for module in trainer.model_wrapped.modules())
        print(f"{sharded} modules sharded in {trainer.args.world_size} processes", flush=True)
        return trainer

    training.run = run_and_report
    sys.argv = ["multilora-fast", *map(str, words)]
    cli.main()
