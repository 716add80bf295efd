"""The joint kernel against expand plus the library's product, by graph replay: rows for PRODUCT_WINS in
kernels/configs.py.

Both write the same matrix: y = x Wᵀ + H B̃ᵀ forward, dx = dy W + dH Ã backward. In backward the joint kernel must also
win with dropout, which the table does not distinguish. Each result is checked against torch in float32 before timing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from bench.clock import cache_bytes, cold_copies, device_time
from bench.tune_uses import DTYPE, P, near
from multilora_fast.kernels.dropout import draw, dropout_mask
from multilora_fast.kernels.expand import expand
from multilora_fast.kernels.launch import multiply
from multilora_fast.kernels.product import product, serves
from multilora_fast.ops.torch_backend import inverse_keep

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))  # in_features, out_features
DIRECTIONS = ("forward", "backward")
TOKENS = (8192, 2048, 1024)
MARGIN = 0.98  # of the library's time: clock changes move single figures by a few per cent
LIBRARY, JOINT = "expand + addmm_", "product"


@dataclass(frozen=True)
class ProductStage:
    """One direction of a layer of K in_features and N out_features, at one rank and every count of TOKENS."""

    direction: str
    K: int
    N: int
    rank: int

    @property
    def key(self) -> tuple:
        return JOINT, self.direction, self.K, self.N, self.rank


def product_stages(ranks: Iterable[int]) -> list[ProductStage]:
    return [ProductStage(way, *shape, rank) for rank in ranks for shape in SHAPES for way in DIRECTIONS]


def ways(
    direction: str, M: int, K: int, N: int, n: int, r: int, p: float, dtype=DTYPE, device="cuda"
) -> tuple[dict[str, Callable[[], torch.Tensor]], torch.Tensor]:
    """Each way by name, returning what it wrote, and torch's float32 result for the same inputs."""

    def make(*size, scale=1.0):
        return torch.randn(*size, device=device, dtype=dtype) * scale

    transposed = direction == "forward"
    inner, outer = (K, N) if transposed else (N, K)  # columns of x, or dy, and of the output
    x, weight, h = make(M, inner), make(N, K, scale=inner**-0.5), make(M, n * r)
    if transposed:
        w, scale = make(n, N, r, scale=r**-0.5).transpose(1, 2), make(n, N)
        packed = (scale[:, None].float() * w.float()).flatten(0, 1)
    else:
        w, scale = make(n, r, K, scale=r**-0.5), None
        packed = w.float().flatten(0, 1)
    seed = torch.tensor([1], device=device)
    bits, keep = draw(seed, M, outer, p), 1.0
    if p:
        keep = dropout_mask(seed, M, outer, p) * inverse_keep(p)
    matrix = weight.t() if transposed else weight
    truth = x.float() @ matrix.float() + keep * (h.float() @ packed)
    y = torch.empty(M, outer, device=device, dtype=dtype)

    def library():
        expand(y, h, w, scale, 1.0, bits, p, accumulate=False)
        multiply(y, x, matrix)
        return y

    def joint():
        return product(x, weight, None, h, w, scale, 1.0, bits, p, transposed=transposed, out=y)

    found = {LIBRARY: library}
    if serves(x, weight, h, y):
        found[JOINT] = joint
    return found, truth


def time_product(stage: ProductStage, n: int, r: int) -> dict[str, dict[str, float] | str]:
    """Microseconds of both ways by tokens and dropout, or why a way fails."""
    found: dict[str, dict[str, float] | str] = {}
    for M in TOKENS:
        for p in (0.0, P) if stage.direction == "backward" else (0.0,):
            copies = cold_copies(2 * (stage.K * stage.N + M * (stage.K + stage.N)), cache_bytes())
            sets = [ways(stage.direction, M, stage.K, stage.N, n, r, p) for _ in range(copies)]
            case, (first, truth) = f"{M} tokens, dropout {p:g}", sets[0]
            try:
                wrong = [name for name, way in first.items() if not near(way(), truth)]
            except Exception as error:  # a compiler or driver error in one way leaves the other valid
                found[case] = f"does not compile or run ({(str(error).splitlines() or [repr(error)])[0][:200]})"
                continue
            if wrong or JOINT not in first:
                found[case] = f"wrong result of {wrong[0]}" if wrong else "the copy engine cannot read its matrices"
                continue
            calls = max(copies, 6)
            found[case] = {
                name: device_time([sets[i % copies][0][name] for i in range(calls)], replays=5) for name in first
            }
    return found


def wins(times: dict[str, dict[str, float] | str]) -> dict[int, bool]:
    """By tokens, whether the joint kernel was faster with and without dropout by more than MARGIN."""
    found: dict[int, bool] = {}
    for case, result in times.items():
        tokens = int(case.split()[0])
        won = not isinstance(result, str) and result[JOINT] < MARGIN * result[LIBRARY]
        found[tokens] = won and found.get(tokens, True)
    return found


def winning_rows(measured: dict[ProductStage, dict[int, bool]], ranks: Iterable[int]) -> dict[str, list[tuple]]:
    """(in_features, out_features, rank, tokens) by direction, as PRODUCT_WINS stores them.

    A row covers all lower ranks and all larger token counts, so it requires that every timed one of those won. A rank
    whose lower ranks were not timed gives no row.
    """
    found: dict[str, list[tuple]] = {way: [] for way in DIRECTIONS}
    for way in DIRECTIONS:
        for K, N in SHAPES:
            least, rows = 0, []
            for rank in sorted(ranks):
                won = measured.get(ProductStage(way, K, N, rank))
                tokens = None if won is None else _least_tokens(won)
                if tokens is None:
                    break
                least = max(least, tokens)
                rows = [row for row in rows if row[3] < least]  # the result of a wider rank for the same tokens
                rows.append((K, N, rank, least))
            found[way] += rows
    return found


def _least_tokens(won: dict[int, bool]) -> int | None:
    least = None
    for tokens in sorted(won, reverse=True):
        if not won[tokens]:
            break
        least = tokens
    return least
