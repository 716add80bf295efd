"""Load the model and the tasks of a study in a process that runs a part of it."""

from pathlib import Path

import torch

from examples.multitask import compact
from examples.multitask.data import real_tasks, split
from examples.multitask.execute import Bench
from examples.multitask.methods import fused_norms
from examples.multitask.methods import prepared as with_float32_head
from examples.multitask.plan import Study
from examples.multitask.prepare import read
from multilora_fast.models import PACKAGED, load_model, load_tokenizer


def load_bench(
    study: Study, device: torch.device, prepared: Path | None, threads: int | None, *, graphs: bool = False
) -> Bench:
    """From the folder ``prepared``, or from the installed packages if it is None."""
    if threads:
        torch.set_num_threads(threads)
    if prepared:
        tasks = read(prepared, study)
        base = fused_norms(compact.load(prepared / "model")).to(device)
        return Bench(with_float32_head(base), None, tasks, PACKAGED, graphs)
    tokenizer = load_tokenizer(None)
    base = load_model(None, torch.float32, device)
    return Bench(with_float32_head(base), tokenizer, split(real_tasks(), study, tokenizer), graphs=graphs)
