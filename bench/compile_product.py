"""Compiles the joint kernel, `product`, for every architecture with TMA: a part of bench.compile_report.

A case fails when it spills, exceeds the shared memory, lacks the architecture's tensor-core instruction or TMA copies,
or when ptxas serializes its wgmma instructions (sm_90).
"""

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from triton.backends.nvidia.compiler import get_ptxas

from bench.compiled import NOT_COMPILED, compile_for, inspect, launches
from multilora_fast.kernels.configs import PRODUCT_TILES
from multilora_fast.kernels.product import product

ARCHITECTURES = [arch for arch in PRODUCT_TILES if arch.startswith("sm_")]
TOKENS, IN, OUT, RANK = 8192, 4096, 11008, 32


def cases(quick: bool) -> Iterator[dict]:
    """Both directions, without and with dropout in backward, in both half types, at ranks 96 and 160; quick ones in
    bfloat16 at rank 96, because the rank does not change the code."""
    for arch in ARCHITECTURES:
        for use, dropout in (("product.forward", False), ("product.backward", False), ("product.backward", True)):
            for dtype in ("bfloat16",) if quick else ("bfloat16", "float16"):
                for n in (3,) if quick else (3, 5):
                    yield {"use": use, "arch": arch, "M": TOKENS, "n": n, "r": RANK, "dtype": dtype, "dropout": dropout}


def call(case: dict) -> None:
    """Calls the launcher on uninitialized tensors."""
    M, n, r, dtype = case["M"], case["n"], case["r"], getattr(torch, case["dtype"])
    forward = case["use"] == "product.forward"
    K, N = (IN, OUT) if forward else (OUT, IN)
    x, h, weight = torch.empty(M, K, dtype=dtype), torch.empty(M, n * r, dtype=dtype), torch.empty(OUT, IN, dtype=dtype)
    config = PRODUCT_TILES[case["arch"]]
    if forward:
        w, scale, bias = torch.empty(n, N, r, dtype=dtype), torch.empty(n, N, dtype=dtype), torch.empty(N, dtype=dtype)
        product(x, weight, bias, h, w.transpose(1, 2), scale, 0.5, transposed=True, config=config)
    else:
        bits = torch.empty(M, N // 32, dtype=torch.int32) if case["dropout"] else None
        w = torch.empty(n, r, N, dtype=dtype)
        product(x, weight, None, h, w, bits=bits, p=0.05, transposed=False, config=config)


def examine(job: tuple[dict, int]) -> dict:
    """Compile one case; `fails` names what it breaks, `limit` bytes of shared memory included."""
    case, limit = job
    kernel, kwargs = launches(lambda: call(case))[-1]
    named = {"kernel": "product", "D": OUT, "params": case["dtype"], "row": "product/" + case["arch"], **case}
    try:
        compiled = compile_for(kernel, kwargs, case["arch"])
    except Exception:  # a pass of Triton's or ptxas, each with an exception of its own
        return {**named, **NOT_COMPILED}
    found = inspect(compiled, case["arch"])
    short = {
        "spills": found["stack"] > 0,
        "shared memory": found["shared"] > limit,
        f"no {found['tensor_core']}": not found["tensor_cores"],
        "no copy engine": "cp.async.bulk.tensor" not in compiled.asm["ptx"],
        "serialized": case["arch"] == "sm_90" and serialized(compiled.asm["ptx"]),
    }
    copies = compiled.asm["ptx"].count("cp.async.bulk.tensor")
    fails = [name for name, is_short in short.items() if is_short]
    return {**named, "sass_per_element": None, **found, "copies": copies, "fails": fails}


def serialized(ptx: str) -> bool:
    """Whether ptxas reports serialized wgmma instructions, as where Triton omits a wait."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", source, "-o", source.with_suffix(".cubin")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return "serialized" in done.stdout + done.stderr
