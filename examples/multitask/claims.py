"""Which of the paper's claims hold here, by rules that are fixed before the results."""

from collections.abc import Mapping

from multilora_fast.demo.compare import LORA, NAIVE, OURS

HOLDS, NOT_SHOWN, FAILS = "holds", "not shown", "does not hold"
LEVEL, CLOSE, SIMILAR = 0.05, 0.02, 0.10  # of significance; in accuracy; in time or bytes
RULES = (
    f"A gain holds when it is positive with p < {LEVEL}, is not shown when p is larger, and does not hold when there "
    f"is none. Close to full fine-tuning means at most {CLOSE:g} below it: it holds when the whole 95 % interval is "
    f"above that, and does not when all of it is below. About as fast: at most {SIMILAR:.0%} more time; higher "
    f"memory: at least as much more. Balance is the effective rank. Beside it stands that of the leading values alone, "
    "as many as the total rank, since full fine-tuning has more values than an adapter can have."
)
BRANCHES = ("multilora-3", "multilora-5")


def claims(summary: Mapping) -> list[dict[str, str]]:
    """A claim, its verdict and the figures behind it, for every one that the summary has figures for."""
    found = []
    for method in BRANCHES:
        n = method.rpartition("-")[2]
        found += _accuracy(summary["pairs"], method, n)
        found += _cost(summary.get("cost", {}).get("costs", {}).get(n), n)
        found += _spectrum(summary["spectrum_pairs"], method, n)
    return [dict(zip(("claim", "verdict", "figures"), row, strict=True)) for row in found]


def gain(difference: float, p: float) -> str:
    if difference <= 0:
        return FAILS
    return HOLDS if p < LEVEL else NOT_SHOWN


def close(low: float, high: float) -> str:
    if low >= -CLOSE:
        return HOLDS
    return FAILS if high < -CLOSE else NOT_SHOWN


def _accuracy(pairs: Mapping, method: str, n: str):
    pair = pairs.get(f"{method} - lora")
    if pair:
        yield (
            f"MultiLoRA (n = {n}) learns the mixture better than LoRA",
            gain(pair["difference"], pair["p"]),
            _said(pair),
        )
    pair = pairs.get(f"{method} - full")
    if pair:
        yield f"MultiLoRA (n = {n}) is close to full fine-tuning", close(pair["low"], pair["high"]), _said(pair)


def _cost(costs: list[Mapping] | None, n: str):
    if not costs:
        return
    by_method = {cost["method"]: cost for cost in costs}
    for name, label in ((NAIVE, "as a loop"), (OURS, "fused")):
        seconds, peak = (by_method[name][key] / by_method[LORA][key] for key in ("seconds", "peak"))
        who = f"MultiLoRA (n = {n}), {label},"
        similar = HOLDS if seconds <= 1 + SIMILAR else FAILS
        yield f"{who} trains about as fast as LoRA", similar, f"{seconds:.2f}x the time of a step"
        higher = HOLDS if peak > 1 + SIMILAR else FAILS
        yield f"{who} has a higher peak memory than LoRA", higher, f"{peak:.2f}x the bytes"


def _spectrum(pairs: Mapping, method: str, n: str):
    for other, sign, text in (
        ("lora", 1, "more balanced than LoRA's"),
        ("full", -1, "less balanced than full tuning's"),
    ):
        pair = pairs.get(f"{method} - {other}")
        if not pair:
            continue
        for kind in ("k_proj", "v_proj"):
            difference, p = pair[kind]["difference"], pair[kind]["p"]
            figures = f"effective rank {difference:+.2f}, p = {p:.2g}; leading values {pair[kind]['leading']:+.2f}"
            yield f"ΔW of MultiLoRA (n = {n}) is {text} on {kind}", gain(sign * difference, p), figures


def _said(pair: Mapping) -> str:
    return f"{pair['difference']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}], p = {pair['p']:.2g}"
