"""What a training step holds for its backward pass."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class SavedBytes:
    """Storages that autograd keeps, each counted once; ``total`` in bytes."""

    storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@contextmanager
def saved_bytes(exclude: Iterable[Tensor] = ()) -> Iterator[SavedBytes]:
    """Count what the forwards inside the block save for backward, by storage, without those of ``exclude``.

    Pass ``model.parameters()`` (and buffers) as ``exclude``. Works on any device, meta included. The storages stay
    alive as long as the yielded object does.
    """
    known = {tensor.untyped_storage()._cdata for tensor in exclude}
    saved = SavedBytes()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved.storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
