"""One op for layers that read the same x: q, k and v; gate and up.

The first member called computes the outputs of all in one pass over x, which is saved once, and each other member takes
its own. Backward computes every dÃ in one pass over x, and one dx. A group draws one dropout mask. In evaluation every
layer runs alone, so that its bits do not depend on its neighbours.
"""

import threading
import weakref
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from multilora_fast.ops.autograd import apply_group
from multilora_fast.ops.call import find
from multilora_fast.ops.composite import is_seen_through
from multilora_fast.ops.equations import GroupSettings
from multilora_fast.ops.functional import Weight, autocast_dtype, checked, seed_for

# Names in the attention and MLP blocks of transformers and diffusers.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("q", "k", "v"),
    ("to_q", "to_k", "to_v"), ("w1", "w3"), ("wi_0", "wi_1"),
)  # fmt: skip
_NOTHING = (None,) * 5


def assign_groups(modules: Mapping[str, Any]) -> None:
    """Set ``shared`` on those of ``modules`` (by path) that read the same x: siblings by name, with equal K."""
    for parent in dict.fromkeys(path.rpartition(".")[0] for path in modules):
        for names in SIBLINGS:
            paths = [f"{parent}.{name}" if parent else name for name in names]
            members = {path: modules[path] for path in paths if path in modules}
            if len(members) > 1 and len({module.lora_A.shape[-1] for module in members.values()}) == 1:
                group = SharedInput(members)
                for member in members.values():
                    member.shared = group


class Base(NamedTuple):
    """The base layer of a member: weight (N, K) and bias. For a quantized layer ``weight`` is a function that returns
    it, and ``compute_dtype`` the dtype of its product."""

    weight: Weight
    bias: Tensor | None
    compute_dtype: torch.dtype | None = None


class SharedInput:
    """Layers that read one x, by path. A member's ``base(x)`` returns its :class:`Base`, or None if it must run itself.

    ``disabled_reason`` is None, or why the group stopped sharing: its layers were given different tensors.
    """

    def __init__(self, members: dict[str, Any]):
        self.members = members
        self.disabled_reason: str | None = None
        self._stopped = False  # whether the members run alone; follows ``disabled_reason`` where it may change
        self._open = False  # whether something ran in a checkpointed region since the last recomputation
        self._abandoned = 0
        self._thread = _Thread()

    def take(self, member: Any, x: Tensor) -> Tensor | None:
        """The output of ``member``, or None if it must run alone in this call."""
        if torch.compiler.is_compiling() or is_seen_through():
            return None
        finished = self.finished(member, x)
        if finished is not None:
            return finished
        waiting, self._thread.waiting = self._thread.waiting, None
        if not member.training or x.is_inference():
            return None
        recomputing = torch._C._current_graph_task_id() != -1
        # A recomputation must save what its forward saved: nothing changes from a checkpointed forward until a
        # recomputation is over. Forwards that interleave with backwards of others (1F1B) are not told apart.
        may_change = not (recomputing or self._open)
        self._open = not recomputing and (self._open or _is_checkpointed())
        if may_change:
            self._stopped = self.disabled_reason is not None
        if self._stopped:
            # Share again from the next forward on if every layer got this x: a forward that raised may have stopped it.
            if not recomputing and self._thread.readers(member, x) == len(self.members):
                self.disabled_reason, self._abandoned = None, 0
            return None
        members = [*self.members.values()]
        bases, branches = [other.base(x) for other in members], [branches_of(other) for other in members]
        if None in bases or not any(other is member for other in members):  # as for a replica
            return None
        if "ds_id" in branches[0][0].__dict__:  # ZeRO gathers parameters for one layer at a time
            return None
        weights, biases, dtypes = zip(*bases, strict=True)
        if dtypes.count(dtypes[0]) < len(members):
            return None
        tensors = (*biases, *chain(*zip(*branches, strict=True)))
        dense = weights if dtypes[0] is None else ()  # functions have no signature
        options = tuple([options_of(m) for m in members])
        key = (x, *dense, *tensors), (autocast_dtype(x), dtypes[0], options)
        call = find(*key, lambda: _settings(x, bases, branches, options))
        if call.settings is None:
            return None
        self._compare(id(member), waiting)
        self._stopped = may_change and self.disabled_reason is not None
        if self._stopped:
            return None
        outputs: dict[int, tuple] = {}
        waiting = self._thread.waiting = Waiting(x, outputs)
        seed = seed_for(call.settings.each[0], None, x)
        outs = apply_group(x, seed, call, weakref.ref(waiting), *weights, *tensors)
        for other, out, base, own in zip(members, outs, bases, branches, strict=True):
            outputs[id(other)] = out, other.scaling_factor, base, own, _version(base, own)
        return outputs.pop(id(member))[0]

    def finished(self, member: Any, x: Tensor) -> Tensor | None:
        """The output of ``member`` if another member's call computed it."""
        waiting = self._thread.waiting
        if waiting is None or waiting.x() is not x or waiting.state != _state(x):
            return None
        out, factor, base, branches, version = waiting.outputs.get(id(member), _NOTHING)
        if out is None or not member.training or factor != member.scaling_factor:
            return None
        A, B, scaling = own = branches_of(member)
        if A is not branches[0] or B is not branches[1] or scaling is not branches[2] or version != _version(base, own):
            return None
        waiting.outputs.pop(id(member), None)
        if not waiting.outputs:
            self._thread.waiting, self._abandoned = None, 0
        return out

    def _compare(self, member: int, waiting: "Waiting | None") -> None:
        """Set ``disabled_reason`` if members were given different tensors."""
        if waiting is not None and waiting.state[-1] == -1:  # not a recomputation, which may end early
            self._abandoned += 1
            if member in waiting.outputs or self._abandoned > 1:
                self.disabled_reason = "its layers were not given the same tensor"


def _settings(x: Tensor, bases: list[Base], branches: list, options: tuple) -> GroupSettings | None:
    """The settings of layers that can share x, None for others."""
    try:
        each = tuple([
            checked(x, None, base.weight, base.bias, A, B, s, one)
            for base, (A, B, s), one in zip(bases, branches, options, strict=True)
        ])  # fmt: skip
    except ValueError:  # the layer at fault raises it when it runs
        return None
    As = [A for A, _, _ in branches]
    alike = {(one._replace(scaling_factor=1.0, exact_base=False), A.dtype) for one, A in zip(each, As, strict=True)}
    if len(alike) > 1:
        return None
    counts, ranks = zip(*[A.shape[:2] for A in As], strict=True)
    widths = tuple([n * r for n, r in zip(counts, ranks, strict=True)])
    return GroupSettings(each, widths, len(set(ranks)) == 1, each[0].dtype, each[0].backend, each[0].save_inputs)


class Waiting:
    """Outputs for members not called yet: x, the state that must match, and by member id the output and what it was
    computed from. They are dropped when x is freed or a backward runs."""

    __slots__ = ("__weakref__", "outputs", "state", "x")

    def __init__(self, x: Tensor, outputs: dict[int, tuple]):
        self.x, self.state, self.outputs = weakref.ref(x, lambda _: outputs.clear()), _state(x), outputs


class _Thread(threading.local):
    """The state of one thread's forward, which copies and pickles leave behind."""

    waiting: Waiting | None = None
    last: weakref.ref[Tensor] | None = None
    state: tuple = ()

    def __reduce__(self):
        return _Thread, ()

    def readers(self, member: Any, x: Tensor) -> int:
        """How many members in a row were called on x in one state, up to ``member``."""
        state = _state(x)
        if self.last is None or self.last() is not x or self.state != state:
            self.last, self.state, self.seen = weakref.ref(x), state, set()
        self.seen.add(id(member))
        return len(self.seen)


def hooked(module: nn.Module) -> bool:
    """Whether ``module`` has hooks of torch's or a forward set on the object."""
    return has_hooks(module) or "forward" in module.__dict__


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def parameter(module: Any, name: str) -> Any:
    """``getattr(module, name)``, three times faster for parameters."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def branches_of(member: Any) -> tuple[Tensor, Tensor, Tensor]:
    """lora_A, lora_B and lora_scaling."""
    return parameter(member, "lora_A"), parameter(member, "lora_B"), parameter(member, "lora_scaling")


def options_of(member: Any) -> tuple:
    """The ``options`` of :func:`multilora_fast.ops.functional.apply`."""
    dropout = member._modules["lora_dropout"]
    p, training = getattr(dropout, "p", 0.0), dropout.training  # nn.Identity has none
    return member.scaling_factor, p, training, member.backend, member.save_inputs, member.exact_base


def _version(base: Base, branches: Sequence[Tensor]) -> int:
    """A number that changes whenever the member's parameters are written."""
    (weight, bias, _), (lora_A, lora_B, lora_scaling) = base, branches
    version = lora_A._version + lora_B._version + lora_scaling._version
    if isinstance(weight, Tensor):
        version += weight._version
    return version if bias is None else version + bias._version


def _state(x: Tensor) -> tuple:
    """What must match for all members besides x."""
    return x._version, torch.is_grad_enabled(), autocast_dtype(x), _region(), torch._C._current_graph_task_id()


def _region() -> int | None:
    """The saved-tensor hooks, which differ by region of checkpointing: each must save the same when it is recomputed.
    By id, because they hold the region's inputs."""
    pack = _pack_hook()
    return None if pack is None else id(pack)


def _is_checkpointed() -> bool:
    """Whether the saved-tensor hooks are checkpointing's, which recompute, and not offloading's or a profiler's."""
    return "checkpoint" in (getattr(_pack_hook(), "__module__", None) or "")


def _pack_hook() -> Any:
    """What the innermost saved-tensor hooks call on a tensor that is saved, or None."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]
