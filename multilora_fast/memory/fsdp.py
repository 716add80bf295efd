"""The first rank under FSDP2 without the others: fully_shard over torch's fake process group."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch import distributed as dist


@contextmanager
def world(ranks: int | None) -> Iterator[None]:
    """Inside, this process is the first of ``ranks``. It holds the most where a tensor does not divide evenly.

    Raises:
        ValueError: the process is already one of several.
    """
    if ranks is None:
        yield
        return
    if dist.is_initialized():
        raise ValueError("fsdp cannot be planned where torch.distributed is initialized: plan before, or elsewhere.")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of ``tensor``."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
