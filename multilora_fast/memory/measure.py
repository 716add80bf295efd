"""Measure a training step: the bytes saved for backward, and the bytes alive over time."""

import json
import os
import tempfile
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class SavedBytes(dict[int, torch.UntypedStorage]):
    """The storages that autograd saved, each once; ``total`` in bytes."""

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.values())


@contextmanager
def saved_bytes(exclude: Iterable[Tensor] = ()) -> Iterator[SavedBytes]:
    """Count the storages that forwards inside the block save for backward, except those of ``exclude``.

    Pass ``model.parameters()`` (and buffers) as ``exclude``. Works on any device, meta included. The storages live as
    long as the yielded object.
    """
    known = {tensor.untyped_storage()._cdata for tensor in exclude}
    saved = SavedBytes()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors alive at once during ``step()``, beyond those alive before it.

    On CUDA this is the caching allocator's peak, on a CPU the peak of :func:`timeline`.
    """
    if device.type != "cuda":
        return max((live for _, live in timeline(step)), default=0)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def timeline(step: Callable[[], object]) -> list[tuple[float, int]]:
    """(milliseconds since the first, bytes alive beyond those alive before) at every allocation and release of
    ``step()``, recorded by torch.profiler.

    Buffers that a matrix library allocates by itself are not recorded.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # keeps the profiler from writing to stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    live, points = 0, []
    for at, change in changes:
        live += change
        points.append(((at - changes[0][0]) / 1e3, live))
    return points


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside the block while they are alive: ``live`` now, ``kinds`` of them by kind,
    and by phase their ``peaks``, split by kind in ``at_peak``.

    The caller sets ``phase`` and ``kind``, and passes tensors that exist already as ``exclude``. Each storage counts
    once. Buffers inside a kernel are not counted. ``on_cpu`` adds the copies in the common dtype that CPU arithmetic
    makes of its operands, and the last gathered tensor, which gloo keeps until its next collective. For use under
    FakeTensorMode: a tensor that is asked for its value answers 1.
    """

    def __init__(self, exclude: Iterable[Tensor], *, on_cpu: bool = False):
        super().__init__()
        self.live, self.phase, self.kind, self.on_cpu = 0, "", "", on_cpu
        self._gathered: Tensor | None = None
        self.kinds: Counter[str] = Counter()
        self.peaks: Counter[str] = Counter()
        self.at_peak: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._counted = {tensor.untyped_storage()._cdata: (0, "") for tensor in exclude}  # size and kind

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            kind = self._counted.get(storage._cdata, (0, ""))[1]
            self._add(storage._cdata, size - storage.nbytes(), kind)
            return resize(storage, size)

        self._resizes = patch.object(torch.UntypedStorage, "resize_", resize_)
        self._resizes.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._resizes.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        if func is torch.ops.aten.add.Tensor and not kwargs and _accumulates(*args):
            func = torch.ops.aten.add_.Tensor
        if func is torch.ops.aten._grouped_mm.default:  # its fake takes bfloat16 only
            result: Any = _grouped_product(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        most = self.live + (_cast_bytes(func, args) if self.on_cpu else 0)
        if most > self.peaks[self.phase]:
            self.peaks[self.phase], self.at_peak[self.phase] = most, self.kinds.copy()
        if self.on_cpu and func.name().startswith("c10d::"):
            self._gathered = args[0] if func is torch.ops.c10d._allgather_base_.default else None
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._counted:
            self._add(key, storage.nbytes(), self.kind)
            weakref.finalize(storage, self._release, key).atexit = False

    def _add(self, key: int, size: int, kind: str) -> None:
        self.live += size
        self.kinds[kind] += size
        self._counted[key] = self._counted.get(key, (0, ""))[0] + size, kind

    def _release(self, key: int) -> None:
        size, kind = self._counted.pop(key)
        self.live -= size
        self.kinds[kind] -= size


def _accumulates(a: Tensor, b: Any) -> bool:
    """Whether autograd adds a second gradient to a first that it alone holds, which without a mode it does in place."""
    if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled() or not isinstance(b, Tensor):
        return False
    shared = torch._C._storage_Use_Count(a.untyped_storage()._cdata) > 2  # a's and Python's
    return a.shape == b.shape and a.dtype == b.dtype and not shared


_ARITHMETIC = {torch.ops.aten.add, torch.ops.aten.sub, torch.ops.aten.mul, torch.ops.aten.div}
_ARITHMETIC |= {torch.ops.aten.add_, torch.ops.aten.sub_, torch.ops.aten.mul_, torch.ops.aten.div_}


def _cast_bytes(func, args: tuple) -> int:
    """Bytes of the copies in the common dtype of operands that have another."""
    operands = [t for t in args if isinstance(t, Tensor) and t.ndim]
    if func.overloadpacket not in _ARITHMETIC or len(operands) < 2:
        return 0
    common = reduce(torch.promote_types, (t.dtype for t in operands))
    return sum(t.numel() * common.itemsize for t in operands if t.dtype != common)


def _grouped_product(a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None = None, out_dtype=None) -> Tensor:
    """The output of torch's grouped product: one product per group if both are 2-D, else the rows of all groups."""
    shape = (*a.shape[:-1], b.shape[-1])
    groups = offs.shape[:1] if a.ndim == b.ndim == 2 else ()
    return a.new_empty(*groups, *shape, dtype=out_dtype or a.dtype)
