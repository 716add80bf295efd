"""Autograd Functions of the op and of layers that share an input."""

from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from itertools import chain

import torch
from torch import Tensor
from torch.autograd import function

from multilora_fast.ops import equations
from multilora_fast.ops.call import Call, no_autocast
from multilora_fast.ops.checks import check_base
from multilora_fast.ops.equations import GroupSettings, Needs, OpSettings, by_kind
from multilora_fast.ops.saved_input import as_tokens, cast, cast_all, restore, save_input

transforming = torch._C._are_functorch_transforms_active
is_batched = torch._C._functorch.is_legacy_batchedtensor


def once_differentiable(backward):
    """torch's once_differentiable, skipped without create_graph because it costs 3 µs. Refuses batched gradients."""
    refusing = function.once_differentiable(backward)

    @wraps(backward)
    def wrapped(ctx, *grads):
        if transforming() or [True for grad in grads if grad is not None and is_batched(grad)]:
            raise RuntimeError(
                "The backward of multilora_fast takes one gradient, not a batch as is_grads_batched=True and "
                "torch.func.vmap give it: take them one by one, or call the layer itself under torch.func."
            )
        return refusing(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return wrapped


class MultiLoRAFunction(torch.autograd.Function):
    """The op in eager mode. ``weight`` may be a function that returns the dense weight."""

    @staticmethod
    def forward(ctx, x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, call):
        ctx.needs, ctx.y_needed = needs_of(ctx.needs_input_grad[:7])
        ctx.call, ctx.dense, ctx.new = call, None if isinstance(weight, Tensor) else weight, new_in_backward()
        out, H = forward(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, call)
        kept = saved(x, H, call.settings, ctx.needs)
        ctx.save_for_backward(*kept, None if ctx.dense else weight, lora_A, lora_B, lora_scaling, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, scale, H, weight, lora_A, lora_B, lora_scaling, seed = ctx.saved_tensors
        if ctx.dense is not None and ctx.needs.x:
            weight = ctx.dense()
        branches = lora_A, lora_B, lora_scaling, seed
        dx, *grads = backward(dy, x, scale, H, weight, *branches, ctx.call, ctx.needs, ctx.new)
        return dx, dy if ctx.y_needed else None, *grads, None, None


def forward(
    x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, call: Call, new: int | None = 0
) -> Sequence[Tensor]:
    """The output (..., N), in memory of its own, and H (M, R). ``new`` as in :meth:`Call.run`."""
    dtype = call.settings.dtype
    if y is not None:
        y, weight, bias = y.clone(memory_format=torch.contiguous_format), None, None
    else:
        weight = cast(weight if isinstance(weight, Tensor) else _dense(weight, x, bias, lora_B.shape[1]), dtype)
        bias = None if bias is None else cast(bias, dtype)
    inputs = (as_tokens(x, dtype), y, weight, bias, lora_A, lora_B, lora_scaling, seed)
    return call.run(equations.forward, inputs, x.shape, new=new)


def backward(
    dy, x, scale, H, weight, lora_A, lora_B, lora_scaling, seed, call: Call, needs: Needs, new: int | None = None
) -> list[Tensor | None]:
    """The gradients in the order of ``needs``; autograd drops those that are not needed."""
    dtype = call.settings.dtype
    tokens = as_tokens(dy, dtype)
    known = restore(x, scale, dtype) if needs.lora_A or needs.weight else None
    base = cast(weight, dtype) if needs.x and weight is not None else None
    inputs = (tokens, known if needs.lora_A else None, H, base, lora_A, lora_B, lora_scaling, seed)
    dx, dA, dB, ds = call.run(equations.backward, inputs, needs, dy.shape, new=new)
    dw, db = _base_gradients(tokens, known, needs)
    return [dx, dw, db, dA, dB, _scale_gradient(ds, lora_scaling, needs)]


class GroupFunction(torch.autograd.Function):
    """The outputs of layers that read one x. ``tensors`` are their weights, biases, lora_A, lora_B and lora_scaling;
    the weights may all be functions that return the dense weight. ``waiting`` is a weak reference to the holder of the
    ``outputs`` of layers not called yet, which a backward drops."""

    @staticmethod
    def forward(ctx, x, seed, call, waiting, *tensors):
        ctx.set_materialize_grads(False)
        weights, biases, lora_As, lora_Bs, scales = by_kind(tensors, 5)
        settings, dtype = call.settings, call.settings.dtype
        ctx.needs, ctx.any_needs = group_needs(ctx.needs_input_grad)
        ctx.call, ctx.waiting, ctx.new = call, waiting, new_in_backward()
        ctx.dense = None if isinstance(weights[0], Tensor) else weights
        if ctx.dense:
            sides = zip(weights, biases, lora_Bs, strict=True)
            bases: Sequence = [partial(_dense, weight, x, bias, B.shape[1]) for weight, bias, B in sides]
            weights = [None] * len(bases)
        else:
            bases = cast_all(weights, dtype)
        below = _below(lora_As, settings)
        inputs = (as_tokens(x, dtype), below, seed, *bases, *cast_all(biases, dtype), *lora_Bs, *scales)
        run = call.run_once if ctx.dense else partial(call.run, new=0)  # a plan cannot record functions
        *outs, H = run(equations.group_forward, inputs, x.shape)
        known, scale, H = saved(x, H, settings, ctx.any_needs)
        ctx.save_for_backward(known, scale, seed, H, *weights, *lora_As, *lora_Bs, *scales)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        waiting = ctx.waiting()
        if waiting is not None:
            waiting.outputs.clear()
        present = tuple([i for i, dy in enumerate(dys) if dy is not None and True in ctx.needs[i]])
        if not present:
            return (None,) * (4 + 5 * len(dys))
        dx, *kinds = _group_backward(ctx, dys, present)
        if len(present) < len(dys):
            kinds = [[kind[present.index(i)] if i in present else None for i in range(len(dys))] for kind in kinds]
        return dx, None, None, None, *chain(*kinds)


# Past the functorch wrapper of ``Function.apply``, which costs 5 µs: neither is called under a transform.
apply_op: Callable = super(torch.autograd.Function, MultiLoRAFunction).apply  # type: ignore[misc]
apply_group: Callable = super(torch.autograd.Function, GroupFunction).apply  # type: ignore[misc]


def _group_backward(ctx, dys, present: tuple[int, ...]) -> tuple:
    """dx, and the gradients of the ``present`` layers, kind by kind."""
    x, scale, seed, H, *tensors = ctx.saved_tensors
    needs, any_needs, settings = ctx.needs, ctx.any_needs, ctx.call.settings
    dtype = settings.dtype
    weights, lora_As, lora_Bs, scales = by_kind(tensors, 4)
    if len(present) < len(dys):
        dys, needs = (tuple([t[i] for i in present]) for t in (dys, needs))
        weights, lora_As, lora_Bs, scales = ([kind[i] for i in present] for kind in (weights, lora_As, lora_Bs, scales))
        any_needs = _union(needs)
    tokens = [as_tokens(dy, dtype) for dy in dys]
    known = restore(x, scale, dtype) if any_needs.lora_A or any_needs.weight else None
    if ctx.dense:
        weights = [ctx.dense[i] for i in present]
    elif any_needs.x:
        weights = cast_all(weights, dtype)
    inputs = (
        *tokens, known if any_needs.lora_A else None, _below(lora_As, settings), seed, H, *weights, *lora_Bs, *scales,
    )  # fmt: skip
    run = ctx.call.run_once if ctx.dense else partial(ctx.call.run, new=ctx.new and len(present))
    dx, dA, *others = run(equations.group_backward, inputs, present, needs, dys[0].shape)
    dBs, dss = by_kind(others, 2)
    dAs: Sequence[Tensor | None] = [None] * len(present)
    if dA is not None:
        dAs = _apart(dA, lora_As, settings)
    base = [_base_gradients(dy, known, need) for dy, need in zip(tokens, needs, strict=True)]
    dws, dbs = zip(*base, strict=True)
    return dx, dws, dbs, dAs, dBs, [_scale_gradient(*each) for each in zip(dss, scales, needs, strict=True)]


def new_in_backward() -> int | None:
    """How many inputs of a backward may differ in kind from the recorded one: dy alone, or any (None) under
    saved-tensor hooks, which may change layouts."""
    return 1 if torch._C._autograd._top_saved_tensors_default_hooks(False) is None else None


@cache
def needs_of(flags: tuple[bool, ...]) -> tuple[Needs, bool]:
    """The needs of the op, and whether y has one, from the flags of x, y, weight, bias, A, B and s."""
    x, y, *rest = flags
    return Needs(x, *rest), y


@cache
def group_needs(flags: tuple[bool, ...]) -> tuple[tuple[Needs, ...], Needs]:
    """The needs of each layer of a group, and their union, from the flags of :class:`GroupFunction`'s arguments."""
    needs = tuple(Needs(flags[0], *own) for own in zip(*by_kind(flags[4:], 5), strict=True))
    return needs, _union(needs)


def _union(needs: Sequence[Needs]) -> Needs:
    return Needs(*map(any, zip(*needs, strict=True)))


def saved(x: Tensor, H: Tensor | None, settings: OpSettings | GroupSettings, needs: Needs) -> tuple[Tensor | None, ...]:
    """What is saved for backward: x or its 8-bit values, their scale, and H."""
    wanted_x = x if needs.lora_A or needs.weight else None
    wanted_H = H if needs.lora_B or needs.lora_scaling else None
    if settings.save_inputs == "exact" or needs.weight:
        return wanted_x, None, wanted_H
    return *save_input(wanted_x, settings.save_inputs), wanted_H


def _dense(weight: Callable[[], Tensor], x: Tensor, bias: Tensor | None, N: int) -> Tensor:
    """What ``weight`` returns, checked."""
    found = weight()
    check_base(x, found, bias, N, autocast=True)  # cast by the caller, as under autocast
    return found


def _base_gradients(dy: Tensor, x: Tensor | None, needs: Needs) -> tuple[Tensor | None, Tensor | None]:
    """dW and db."""
    if not (needs.weight or needs.bias):
        return None, None
    with no_autocast(dy.device.type):
        return dy.t() @ x if needs.weight and x is not None else None, dy.sum(0) if needs.bias else None


def _scale_gradient(ds: Tensor | None, lora_scaling: Tensor, needs: Needs) -> Tensor | None:
    if ds is None or not needs.lora_scaling:
        return None
    if lora_scaling.shape[1] == 1:
        ds = ds.sum(1, keepdim=True)
    ds = cast(ds, lora_scaling.dtype)
    return ds if ds.is_contiguous() else ds.contiguous()


def _below(lora_As: Sequence[Tensor], settings: GroupSettings) -> Tensor:
    """The branches of all layers stacked, (Σn, r, K), or (1, ΣR, K) if their ranks differ."""
    return torch.cat([*lora_As]) if settings.one_rank else torch.cat([A.flatten(0, 1) for A in lora_As])[None]


def _apart(dA: Tensor, lora_As: Sequence[Tensor], settings: GroupSettings) -> Sequence[Tensor]:
    """The dA of each layer, from that of :func:`_below`."""
    if settings.one_rank:
        return dA.split_with_sizes([len(A) for A in lora_As])
    parts = dA.flatten(0, 1).split_with_sizes([A.shape[0] * A.shape[1] for A in lora_As])
    return [part.view(A.shape) for part, A in zip(parts, lora_As, strict=True)]
