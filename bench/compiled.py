"""Compile a launch without a GPU and read its registers, spills, shared memory and instructions."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# In place of `inspect` and `sass_per_element` for a case that does not compile.
NOT_COMPILED = {
    **dict.fromkeys(("registers", "stack", "shared", "tensor_core", "tensor_cores", "sass_per_element")),
    "fails": ["does not compile"],
}
TENSOR_CORES = {"sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "mfma"}
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
    torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1",
}  # fmt: skip


# (of the tokens, of A, B and s)
DTYPES = (("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32"), ("float32", "float32"))


@dataclass(frozen=True)
class LauncherCall:
    """`use` is kernel.direction, M its tokens, D the features of the large tensor, params the dtype of A, B, s."""

    use: str
    arch: str
    M: int
    D: int
    n: int
    r: int
    dtype: str
    params: str
    dropout: bool


def launches(call: Callable[[], object]) -> list[tuple[JITFunction, dict]]:
    """(kernel, arguments) of every kernel that `call` launches, recorded instead of run."""
    recorded = []
    run = JITFunction.run
    JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: recorded.append((kernel, kwargs))
    try:
        call()
    finally:
        JITFunction.run = run
    return recorded


def source(kernel: JITFunction, kwargs: dict) -> ASTSource:
    """What the JIT would compile for these arguments: 1 is a constant, multiples of 16 are marked."""
    signature, constants, attrs = {}, {}, {}
    for position, param in enumerate(kernel.params):
        value = kwargs[param.name]
        special = not param.do_not_specialize
        if param.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[param.name] = "constexpr"
            constants[(position,)] = value
            continue
        if isinstance(value, TensorDescriptor):
            signature[param.name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
            continue
        is_tensor = torch.is_tensor(value)
        signature[param.name] = POINTERS[value.dtype] if is_tensor else "i32" if -(2**31) <= value < 2**31 else "i64"
        if special and (value.data_ptr() if is_tensor else value) % 16 == 0:
            attrs[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attrs)


def options(kwargs: dict, arch: str) -> dict:
    names = ("num_warps", "num_stages", "enable_fp_fusion", *(["maxnreg"] if arch.startswith("sm_") else []))
    return {name: kwargs[name] for name in names if name in kwargs}


def compile_for(kernel: JITFunction, kwargs: dict, arch: str):
    target = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)
    return triton.compile(source(kernel, kwargs), target=target, options=options(kwargs, arch))


def tool(name: str, *args: str, binary: bytes) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([path, *args, file.name], check=True, capture_output=True, text=True).stdout


def tensor_core(arch: str, rows: int) -> str:
    """The tensor-core instruction for a product of `rows` rows: wgmma and tcgen05 need at least 64."""
    return "mma.sync" if arch.startswith("sm_") and rows < 64 else TENSOR_CORES.get(arch, "mma.sync")


def inspect(compiled, arch: str, rows: int = 64) -> dict:
    """Registers per thread, bytes of stack that are read back, shared memory, and tensor-core instructions.

    A stack that nothing reads holds no spill: on sm_120 ptxas guards every copy to distributed shared memory, which is
    how Triton 3.6 writes all copies, by a call to the driver, and leaves the call's arguments there.
    """
    name = tensor_core(arch, rows)
    if arch.startswith("sm_"):
        code, usage = compiled.asm["ptx"], tool("cuobjdump", "--dump-resource-usage", binary=compiled.asm["cubin"])
        patterns = (r"REG:(\d+)", r"STACK:(\d+)")
    else:
        code = usage = compiled.asm["amdgcn"]
        patterns = (r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)")
    registers, stack = (int(re.search(pattern, usage)[1]) for pattern in patterns)
    if (
        stack
        and arch.startswith("sm_")
        and not re.search(r"\bLDL\b", tool("nvdisasm", "-c", binary=compiled.asm["cubin"]))
    ):
        stack = 0
    return {
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "tensor_core": name,
        "tensor_cores": len(re.findall(rf"\b(?:v_)?{re.escape(name)}", code)),
    }


def sass_per_element(compiled, kwargs: dict) -> float:
    """SASS instructions per thread and element of its tile of the large tensor, or of the mask."""
    if "BLOCK_W" in kwargs:
        return tile_instructions(compiled, False) / (kwargs["BLOCK_M"] * kwargs["BLOCK_W"] / kwargs["num_warps"])
    elements = kwargs["BLOCK_M"] * kwargs["BLOCK_D"] / (32 * kwargs["num_warps"])
    return tile_instructions(compiled, True) / elements


def tile_instructions(compiled, looped: bool) -> int:
    """SASS instructions per thread and tile: those of the largest loop if `looped`, else of the kernel."""
    labels, loops, lines = {}, [], []
    for text in tool("nvdisasm", "-c", binary=compiled.asm["cubin"]).splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", text):
            labels[label[1]] = len(lines)
        elif re.search(r"/\*[0-9a-f]{4,}\*/\s+(?!NOP)[@A-Z]", text):
            lines.append(text)
            jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", text)
            if jump and jump[1] in labels:
                loops.append(len(lines) - labels[jump[1]])
    return max(loops, default=len(lines)) if looped else len(lines)
