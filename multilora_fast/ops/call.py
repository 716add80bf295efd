"""Cache checked settings and launch plans by call signature.

The signature is everything that checks and launchers read: the shapes, strides, dtypes and devices of all tensors, the
settings, and autocast. Only eager calls on a GPU are cached.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from multilora_fast.ops.equations import GroupSettings, OpSettings

KEPT = 4096  # calls; a model makes about ten for each token count
_CALLS: dict[Hashable, "Call"] = {}
_ALONE = nullcontext()


class Call:
    """``settings``, None for layers that cannot share this input, and the launch ``plans`` of forward and backward: one
    per alignment of the inputs, False where it cannot be replayed, and the plan used last."""

    __slots__ = ("plans", "settings")

    def __init__(self, settings: OpSettings | GroupSettings | None):
        self.settings: Any = settings
        self.plans: dict[Hashable, Any] = {}

    def run(
        self, function: Callable, inputs: Sequence[Tensor | None], *options: Hashable, new: int | None = None
    ) -> Sequence:
        """``function(*inputs, settings, *options)``, replayed from its plan if there is one. Only the first ``new``
        inputs, or all if None, can differ in kind from earlier runs of this call."""
        x: Any = inputs[0]
        if self.settings.backend != "triton" or not is_cached(x):
            return self.run_once(function, inputs, *options)
        key: Hashable = function
        if new != 0:  # signature() inlined: every Python call counts here
            kinds = [None if t is None else (t.__class__, t.dtype, t.shape, t.stride(), t.device) for t in inputs[:new]]
            key = function, options, tuple(kinds)
        planning = _planning()
        plan = self.plans.get(key)
        if plan is not None and not planning.hooked():
            outputs = plan.replay(*inputs)
            if outputs is not None:
                return outputs
        aligned = key, alignments(inputs)  # differently from the last run of this key
        plan = self.plans.get(aligned)
        if plan is None:
            outputs, plan = planning.record(function, inputs, self.settings, *options)
            if len(self.plans) >= KEPT:
                self.plans.clear()
            self.plans[aligned] = plan or False
        elif not plan or planning.hooked():
            return function(*inputs, self.settings, *options)
        else:
            outputs = plan.replay(*inputs)
        if plan:
            self.plans[key] = plan
        return outputs

    def run_once(self, function: Callable, inputs: Sequence, *options: Hashable) -> Sequence:
        """The same without recording; ``inputs`` need not all be tensors."""
        with no_autocast(inputs[0].device.type):
            return function(*inputs, self.settings, *options)


def find(
    tensors: Sequence[Tensor | None], options: Hashable, check: Callable[[], OpSettings | GroupSettings | None]
) -> Call:
    """The call for these tensors, x first, and options. ``check`` validates a new one and returns its settings."""
    if not is_cached(tensors[0]):
        return Call(check())
    try:
        key = (options, signature(tensors))
        call = _CALLS.get(key)
    except (AttributeError, TypeError):  # no tensor, or an unhashable option, which the check refuses
        return Call(check())
    if call is None:
        call = Call(check())
        if len(_CALLS) >= KEPT:
            _CALLS.clear()
        _CALLS[key] = call
    return call


def is_cached(x: Any) -> bool:
    """Whether calls on x are cached: on a GPU, where Python takes longer than small kernels."""
    return getattr(x, "is_cuda", False)


def signature(tensors: Sequence[Tensor | None]) -> tuple:
    """The part of each tensor that checks and launchers read."""
    return tuple([None if t is None else (t.__class__, t.dtype, t.shape, t.stride(), t.device) for t in tensors])


def alignments(tensors: Sequence[Tensor | None]) -> tuple:
    """The low bits of each address, on which Triton specializes."""
    return tuple([None if t is None else t.data_ptr() & 15 for t in tensors])


def no_autocast(kind: str):
    """Turn autocast off, so that backends agree: kernels and products with out= ignore it."""
    return torch.autocast(kind, enabled=False) if kind != "meta" and torch.is_autocast_enabled(kind) else _ALONE


@cache
def _planning():
    from multilora_fast.kernels import plan

    return plan
