"""Launch plans: the launches of a function, recorded once and replayed on other tensors of the same kind.

Checks, tile selection and Triton's lookup take longer on the host than small kernels run. They depend only on shapes,
strides, dtypes and the alignment of addresses. The caller caches a plan by the first three; a replay checks alignments,
allocates, and calls `CompiledKernel.run` with the same arguments and new addresses. It is generated as a Python
function, `source`, with every constant inlined:

    def replay(i0, i1, i2):
        p_i0 = i0.data_ptr()
        p_i1 = i1.data_ptr()
        if (p_i0 | p_i1) & 15:
            return None
        n0 = i0.new_empty((8, 96))
        p_n0 = n0.data_ptr()
        stream = current_stream(0)
        run0(4, 1, 1, stream, function0, metadata0, None, None, None, p_i0, p_i1, None, p_n0, 8, 64, ...)
        i2.addmm_(n0, i1.t())
        return (n0,)
"""

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Launch, Product, recording

ALIGNMENT = 256  # bytes, between the temporaries of a plan
Tensors = Sequence[Tensor | None]
_aten = torch.ops.aten
_ALLOCATIONS = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}


class Plan:
    """A recorded function. `replay(*inputs)` returns what it would, or None if an input is aligned differently."""

    def __init__(self, steps: list[Launch | Product], inputs: Tensors, outputs: Tensors):
        self.device = next(t.device for t in inputs if t is not None)
        self.names: dict[str, Any] = {"empty_like": torch.empty_like, "uint8": torch.uint8, "moved": _moved}
        self.names |= {"current_stream": current_stream, "current_device": current_device, "elsewhere": self._elsewhere}
        held = {f"i{k}": t for k, t in enumerate(inputs) if t is not None}
        self.owner = {t.data_ptr(): name for name, t in held.items()}
        new = {f"n{k}": t for k, t in enumerate(t for t in outputs if t is not None and t.data_ptr() not in self.owner)}
        self.owner |= {t.data_ptr(): name for name, t in new.items()}
        allocations = [f"{name} = {self._allocation(t, held)}" for name, t in new.items()]
        self.held = held | new
        self.storages = {t.untyped_storage().data_ptr(): name for name, t in self.held.items()}
        self.used: set[str] = set()  # names of held tensors whose address is read
        self.temporary = 0
        self.starts: dict[int, int] = {}  # offsets of temporaries by the address of their storage
        lines = [self._launch(k, s) if isinstance(s, Launch) else self._product(s) for k, s in enumerate(steps)]
        if self.temporary:
            allocations.append(f"temporary = {next(iter(held))}.new_empty({self.temporary}, dtype=uint8)")
            allocations.append("p_t = temporary.data_ptr()")
        returned = ", ".join("None" if t is None else self.owner[t.data_ptr()] for t in outputs)
        arguments = ", ".join(f"i{k}" for k in range(len(inputs)))
        body = [
            f"if current_device() != {self.device.index}:",
            f"    return elsewhere({arguments})",
            *[f"p_{name} = {name}.data_ptr()" for name in held if name in self.used],
            *self._alignment_checks(),
            *allocations,
            *[f"p_{name} = {name}.data_ptr()" for name in new if name in self.used],
            f"stream = current_stream({self.device.index})",
            *lines,
            f"return ({returned}{',' if outputs else ''})",
        ]
        self.source = f"def replay({arguments}):\n" + "".join(f"    {line}\n" for line in body)
        exec(self.source, self.names)
        self.replay: Callable[..., tuple | None] = self.names["replay"]
        del self.held, self.owner, self.storages, self.used, self.starts

    def _elsewhere(self, *inputs: Tensor | None) -> tuple | None:
        """Replay on a device that is not the current one."""
        with torch.cuda.device(self.device):
            return self.replay(*inputs)

    def _constant(self, value: object, kind: str) -> str:
        """A name for a value without a literal."""
        name = next((name for name, known in self.names.items() if known is value), f"{kind}{len(self.names)}")
        self.names[name] = value
        return name

    def _allocation(self, t: Tensor, held: dict[str, Tensor]) -> str:
        """empty_like, where an input has the shape, takes two thirds of the time of new_empty."""
        for name, other in held.items():
            if (other.shape, other.dtype, other.stride()) == (t.shape, t.dtype, t.stride()):
                return f"empty_like({name})"
        alike = next((name for name, other in held.items() if other.dtype == t.dtype), None)
        if alike is not None:
            return f"{alike}.new_empty({tuple(t.shape)})"
        return f"{next(iter(held))}.new_empty({tuple(t.shape)}, dtype={self._constant(t.dtype, 'dtype')})"

    def _alignment_checks(self) -> list[str]:
        """Triton compiles in which addresses are multiples of 16."""
        rests = {f"p_{name}": self.held[name].data_ptr() % 16 for name in self.used if name[0] == "i"}
        aligned = " | ".join(name for name, rest in rests.items() if rest == 0)
        checks = [f"({aligned}) & 15"] if aligned else []
        checks += [f"{name} & 15 != {rest}" for name, rest in rests.items() if rest]
        return [f"if {' or '.join(checks)}:", "    return None"] if checks else []

    def _address(self, t: Tensor) -> str:
        """t's address in a replay, relative to an input, an output or the temporary memory."""
        address, storage = t.data_ptr(), t.untyped_storage()
        name = self.owner.get(address) or self.storages.get(storage.data_ptr())
        if name is not None:
            self.used.add(name)
            offset = address - self.held[name].data_ptr()
            return f"p_{name} + {offset}" if offset else f"p_{name}"
        if storage.data_ptr() not in self.starts:
            self.starts[storage.data_ptr()] = self.temporary
            self.temporary += -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
        return f"p_t + {self.starts[storage.data_ptr()] + address - storage.data_ptr()}"

    def _argument(self, value: object) -> str:
        if isinstance(value, Tensor):
            return self._address(value)
        if isinstance(value, TensorDescriptor):
            return f"moved({self._constant(_moved(value, 0), 'descriptor')}, {self._address(value.base)})"
        if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and value == value):
            return repr(value)
        return self._constant(value, "constant")

    def _launch(self, k: int, step: Launch) -> str:
        compiled, (grid_x, grid_y), arguments = step
        self.names |= {f"run{k}": compiled.run, f"function{k}": compiled.function}
        self.names[f"metadata{k}"] = compiled.packed_metadata
        start = f"run{k}({grid_x}, {grid_y}, 1, stream, function{k}, metadata{k}, None, None, None"
        return f"{start}, {', '.join(map(self._argument, arguments))})"

    def _product(self, step: Product) -> str:
        out, a, b = map(self._operand, step)
        return f"{out}.addmm_({a}, {b})"

    def _operand(self, t: Tensor) -> str:
        """A held matrix as the library takes it: as it is, transposed, or another view."""
        name = self.owner[t.data_ptr()]
        held = self.held[name]
        if (held.shape, held.stride()) == (t.shape, t.stride()):
            return name
        if held.ndim == 2 and (held.t().shape, held.t().stride()) == (t.shape, t.stride()):
            return f"{name}.t()"
        return f"{name}.as_strided({tuple(t.shape)}, {t.stride()})"


def record(function: Callable[..., Tensors], inputs: Tensors, *options) -> tuple[Tensors, Plan | None]:
    """Return what `function(*inputs, *options)` returns, and its plan, or None where it cannot be replayed.

    The function must do nothing with tensors but launch kernels, multiply through `launch.multiply`, allocate, and
    return new contiguous tensors or its inputs.
    """
    with _Operations() as operations, recording() as steps:
        outputs = function(*inputs, *options)
    launches = [step for step in steps if isinstance(step, Launch)]
    metadata = [step.compiled.metadata for step in launches]
    scratch = any(each.global_scratch_size or each.profile_scratch_size for each in metadata)  # allocated per launch
    if why_not() or operations.others or not launches or scratch or not _tellable(inputs, launches):
        return outputs, None
    return outputs, Plan(steps, inputs, outputs)


def _tellable(inputs: Tensors, launches: Sequence[Launch]) -> bool:
    """Whether every address belongs to exactly one input, or is new."""
    given = [t for t in inputs if t is not None]
    addresses, storages = {t.data_ptr() for t in given}, Counter(t.untyped_storage().data_ptr() for t in given)
    read = [t for step in launches for t in map(base_of, step.arguments) if isinstance(t, Tensor)]
    inside = [storages[t.untyped_storage().data_ptr()] for t in read if t.data_ptr() not in addresses]
    return len(addresses) == len(given) and 0 not in addresses and max(inside, default=0) <= 1


def base_of(argument: object) -> object:
    """The tensor behind a descriptor."""
    return argument.base if isinstance(argument, TensorDescriptor) else argument


class _Operations(TorchDispatchMode):
    """Notices operations that a plan cannot replay: anything but launches, products, views and allocations."""

    others = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.others |= not func.is_view and func.overloadpacket not in _ALLOCATIONS
        return func(*args, **(kwargs or {}))


def hooked() -> bool:
    """Whether launch hooks are set, as profilers set them."""
    runtime = knobs.runtime
    try:
        return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
    except AttributeError:  # the hooks were replaced by a plain function or None
        return bool(runtime.launch_enter_hook or runtime.launch_exit_hook)


def why_not() -> str | None:
    """Why plans are disabled in this process, or None."""
    if knobs.runtime.interpret:
        return "TRITON_INTERPRET is set"
    if torch.version.hip:
        return "launches on HIP take other arguments"
    if hooked():
        return "a launch hook is set, as profilers do"
    return None if _known_signature() else "this Triton's launcher takes other arguments than those known"


def _known_signature() -> bool:
    from triton.backends.nvidia.driver import CudaLauncher

    first = list(inspect.signature(CudaLauncher.__call__).parameters)[1:6]
    return first == ["gridX", "gridY", "gridZ", "stream", "function"]


def current_device() -> int:
    return torch._C._cuda_getDevice()


def current_stream(index: int) -> int:
    return torch._C._cuda_getCurrentRawStream(index)


class Address(int):
    """A TensorDescriptor's base, given by its address."""

    def data_ptr(self) -> int:
        return int(self)


def _moved(descriptor: TensorDescriptor, address: int) -> TensorDescriptor:
    """The descriptor of another tensor of the same kind, without the class's checks, which the first passed."""
    moved = object.__new__(TensorDescriptor)
    moved.__dict__.update(descriptor.__dict__)
    moved.base = Address(address)
    return moved
