"""Training steps on batches of few shapes. On CUDA each shape becomes a graph, whose replay takes no Python."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from examples.multitask.batches import loss

Batch = dict[str, Tensor]


class CannotCapture(ValueError):
    """A step holds what a CUDA graph cannot. Later runs of the same process may fail too."""

    status = 3  # of the command


class Steps:
    """AdamW without weight decay on the mean loss over a step's answer tokens, with gradients clipped to norm 1.

    With ``graphs``, on CUDA, the first step on one batch of a shape runs eagerly, which compiles its kernels, the
    second is captured, and all later ones are replayed. They must run on one :func:`side_stream`. ``autocast`` returns
    the context of the forward pass.
    """

    def __init__(self, model: nn.Module, autocast: Callable, *, graphs: bool = False):
        self.model, self.autocast, self.graphs = model, autocast, graphs
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        device = self.parameters[0].device
        fast = {"fused": True, "capturable": graphs} if device.type == "cuda" else {}
        rate = torch.zeros((), device=device) if graphs else 0.0
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0, **fast)
        self.seen: set[tuple] = set()
        self.captured: dict[tuple, tuple[Batch, Callable[[], Tensor]]] = {}
        self.pool = torch.cuda.graph_pool_handle() if graphs else None  # graphs that never overlap share memory
        self.replayed = 0

    def __call__(self, batches: Sequence[Batch], rate: float) -> Tensor:
        """Take a step on batches that are on the device, and return its loss there. Does not wait for the device."""
        for group in self.optimizer.param_groups:
            if self.graphs:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        shape = tuple(tensor.shape for tensor in batches[0].values())
        if not self.graphs or len(batches) > 1 or shape not in self.seen:
            self.seen.add(shape)
            return self._step(batches)
        if shape not in self.captured:
            batch = {name: tensor.clone() for name, tensor in batches[0].items()}
            self.captured[shape] = batch, self._capture(batch)
        batch, replay = self.captured[shape]
        for name, tensor in batches[0].items():
            batch[name].copy_(tensor)
        self.replayed += 1
        return replay().clone()

    def _step(self, batches: Sequence[Batch]) -> Tensor:
        parts = []
        for batch in batches:
            with self.autocast():
                part = loss(self.model, batch)
            part.backward()
            parts.append(part.detach())
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack(parts).sum()

    def _capture(self, batch: Batch) -> Callable[[], Tensor]:
        """Record a step on ``batch``, and return what repeats it on the contents of its tensors."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=torch.cuda.current_stream()):
                found = self._step([batch])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CannotCapture(
                f"a training step cannot be captured ({str(error).partition(chr(10))[0]}): give --eager."
            ) from error

        def replay() -> Tensor:
            graph.replay()
            return found

        return replay


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """On CUDA, a stream other than the default one, as captures need."""
    if device.type != "cuda":
        yield
        return
    outer, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        yield
    outer.wait_stream(stream)
