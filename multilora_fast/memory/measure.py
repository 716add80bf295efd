"""What a training step holds: the bytes saved for its backward pass, and the bytes alive over its time."""

import json
import os
import tempfile
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


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


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors alive at once during ``step()`` beyond those alive before it.

    CUDA: the caching allocator's own peak. CPU: :func:`timeline`'s.
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
    ``step()``, as torch.profiler records them of torch's allocators.

    Buffers that a matrix library allocates by itself are not seen there.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler announces itself on stderr
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
    """Counts the bytes of tensors made inside the block while they are alive: ``live`` now, of which ``kinds`` by kind,
    and by phase the ``peaks`` with their kinds ``at_peak``.

    The caller names the ``phase``, the ``kind`` of what is made, and in ``exclude`` the tensors from before that are
    not to be counted. A storage counts once; what a kernel allocates for itself is not seen. For use under torch's
    FakeTensorMode, where nothing is allocated: a tensor that is asked there for its value, which is not, says 1.
    """

    def __init__(self, exclude: Iterable[Tensor]):
        super().__init__()
        self.live, self.phase, self.kind = 0, "", ""
        self.kinds: Counter[str] = Counter()
        self.peaks: Counter[str] = Counter()
        self.at_peak: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._known = {tensor.untyped_storage()._cdata for tensor in exclude}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        if self.live > self.peaks[self.phase]:
            self.peaks[self.phase], self.at_peak[self.phase] = self.live, self.kinds.copy()
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.kinds[self.kind] += size
            weakref.finalize(storage, self._release, key, size, self.kind).atexit = False

    def _release(self, key: int, size: int, kind: str) -> None:
        self._known.discard(key)
        self.live -= size
        self.kinds[kind] -= size
