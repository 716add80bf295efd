"""Verdicts on the paper's claims, by rules fixed before the results."""

from collections.abc import Mapping

from examples.multitask.plan import Study
from multilora_fast.demo.compare import LORA, NAIVE, OURS

HOLDS, NOT_SHOWN, FAILS = "holds", "not shown", "does not hold"
LEVEL, CLOSE, SIMILAR = 0.05, 0.02, 0.10  # significance; accuracy; time or bytes
RULES = (
    f"A gain holds if it is positive with p < {LEVEL}, is not shown if p is larger, and does not hold if it is not "
    "positive. Accuracies have two p values, over items and over items and seeds: the larger counts. Close to full "
    f"fine-tuning means at most {CLOSE:g} below it: it holds if the whole 95 % interval is above that bound, and does "
    "not hold if all of it is below. The same rule compares other scales and initializations with ours. No different "
    f"on a single task means within {CLOSE:g} of LoRA: it holds if the whole interval is within, and does not hold if "
    f"all of it is outside. About as fast: at most {SIMILAR:.0%} more time. Higher memory: over {SIMILAR:.0%} more "
    "bytes. Balance is measured by the effective rank; the effective rank of the leading values alone, as many as the "
    "total rank, stands beside it, since full fine-tuning has more values than an adapter can have."
)
BRANCHES = ("multilora-3", "multilora-5")
VARIANTS = {
    "multilora-3-scalar": "with scalar scales",
    "multilora-3-zero": "with B initialized to zero",
    "multilora-3-scalar-zero": "with scalar scales and B initialized to zero",
}


def claims(summary: Mapping, study: Study) -> list[dict[str, str]]:
    """Claim, verdict and figures of every claim that the summary has figures for."""
    found = []
    for method in BRANCHES:
        n = method.rpartition("-")[2]
        found += _accuracy(summary["pairs"], method, study.rival(method), n)
        found += _cost(summary.get("cost", {}).get("costs", {}).get(n), n)
        found += _spectrum(summary["spectrum_pairs"], method, study.rival(method), n)
    found += _choices(summary["pairs"])
    return [dict(zip(("claim", "verdict", "figures"), row, strict=True)) for row in found]


def gain(difference: float, p: float) -> str:
    if difference <= 0:
        return FAILS
    return HOLDS if p < LEVEL else NOT_SHOWN


def close(low: float, high: float) -> str:
    if low >= -CLOSE:
        return HOLDS
    return FAILS if high < -CLOSE else NOT_SHOWN


def same(low: float, high: float) -> str:
    if low >= -CLOSE and high <= CLOSE:
        return HOLDS
    return FAILS if low > CLOSE or high < -CLOSE else NOT_SHOWN


def _choices(pairs: Mapping):
    pair = pairs.get("multilora-3-alone - lora-alone")
    if pair:
        verdict = same(pair["low"], pair["high"])
        yield "MultiLoRA (n = 3) is no different from LoRA on a single task", verdict, _said(pair)
    for method, text in VARIANTS.items():
        pair = pairs.get(f"{method} - multilora-3")
        if pair:
            yield f"MultiLoRA (n = 3) {text} learns as well", close(pair["low"], pair["high"]), _said(pair)


def _accuracy(pairs: Mapping, method: str, rival: str, n: str):
    pair = pairs.get(f"{method} - {rival}")
    if pair:
        yield (
            f"MultiLoRA (n = {n}) learns the mixture better than LoRA",
            gain(pair["difference"], max(pair["p"], pair.get("p_seeds", 0.0))),
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


def _spectrum(pairs: Mapping, method: str, rival: str, n: str):
    for other, sign, text in (
        (rival, 1, "more balanced than LoRA's"),
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
    seeds = f", with seeds {pair['p_seeds']:.2g}" if "p_seeds" in pair else ""
    return f"{pair['difference']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}], p = {pair['p']:.2g}{seeds}"
