"""All that the report says, in numbers, from the records of the runs: ``summarise`` makes one dictionary of JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch

from examples.multitask.claims import claims
from examples.multitask.plan import COST, METHODS, ZERO_SHOT, Results, Run, Study, chosen, sweep, validation_score
from examples.multitask.significance import Marks, compare, sign_flip_p

PAIRS = [("multilora-3", "lora"), ("multilora-5", "lora"), ("multilora-3", "full"), ("multilora-5", "full"),
         ("lora", "full"), ("multilora-3", "task-arithmetic"), ("multilora-5", "task-arithmetic")]  # fmt: skip


def summarise(study: Study, done: Results) -> dict:
    """Of the runs that are there; methods and pairs without any are left out."""
    finals = {method: _finals(study, method, done) for method in METHODS if method in study.rates}
    finals = {method: records for method, records in finals.items() if records}
    found = {"settings": study.settings(), "conditions": _conditions(done)}
    if ZERO_SHOT in done:
        record = done[ZERO_SHOT]
        found["items"] = {
            part: {t: len(r["right"]) for t, r in record[part].items()} for part in ("validation", "test")
        }
        found["zero_shot"] = {task: result["accuracy"] for task, result in record["test"].items()}
        found["majority"] = record["majority"]
    found["methods"] = {method: _method(study, method, records, done) for method, records in finals.items()}
    pairs = [(a, b) for a, b in PAIRS if a in finals and b in finals]
    found["pairs"] = {f"{a} - {b}": _pair(finals[a], finals[b]) for a, b in pairs}
    found["spectrum_pairs"] = {f"{a} - {b}": _spectrum_pair(finals[a], finals[b]) for a, b in pairs}
    if COST in done:
        found["cost"] = {key: done[COST][key] for key in ("batch_tokens", "rounds", "costs", "environment")}
    return found | {"claims": claims(found)}


def _finals(study: Study, method: str, done: Results) -> dict[int, Mapping]:
    """By seed, the method's records at its chosen learning rate."""
    rate = chosen(study, method, done)
    names = {seed: Run(method, rate, seed).name for seed in range(study.seeds)} if rate is not None else {}
    return {seed: done[name] for seed, name in names.items() if name in done}


def _method(study: Study, method: str, records: Mapping[int, Mapping], done: Results) -> dict:
    grid = sweep(study, method, done)
    tried = {rate: done[Run(method, rate).name] for rate in grid if Run(method, rate).name in done}
    rate = chosen(study, method, done)
    runs = list(records.values())
    tasks = {task: [run["test"][task]["accuracy"] for run in runs] for task in runs[0]["test"]}
    means = [statistics.mean(accuracies) for accuracies in zip(*tasks.values(), strict=True)]
    found = {
        "learning_rate": rate,
        "sweep": {f"{r:g}": validation_score(record)[0] for r, record in sorted(tried.items())},
        "sweep_complete": len(tried) == len(grid),
        "at_edge": len(tried) > 1 and rate in (min(tried), max(tried)),
        "seeds": sorted(records),
        "tasks": {task: statistics.mean(accuracies) for task, accuracies in tasks.items()},
        "mean": statistics.mean(means),
        "sd": statistics.stdev(means) if len(means) > 1 else None,
        "tokens": statistics.mean(run["tokens"] for run in runs),
        "tokens_per_second": max(run["tokens_per_second"] for run in runs),
        "spectrum": {kind: _kind([run["spectrum"][kind] for run in runs]) for kind in runs[0]["spectrum"]},
    }
    for key in ("trainable", "task_weight"):
        if key in runs[0]:
            found[key] = runs[0][key]
    if "memory" in runs[0]:
        found["memory"] = {key: statistics.mean(run["memory"][key] for run in runs) for key in runs[0]["memory"]}
    return found


def _kind(spectra: Sequence[Mapping]) -> dict:
    """Means over layers and seeds, and the spread of the seeds' effective ranks."""
    by_seed = {key: [statistics.mean(s[key]) for s in spectra] for key in ("effective_rank", "leading", "top_share")}
    ranks = by_seed["effective_rank"]
    spread = {"effective_rank_sd": statistics.stdev(ranks) if len(ranks) > 1 else None}
    return {key: statistics.mean(values) for key, values in by_seed.items()} | spread


def _pair(first: Mapping[int, Mapping], second: Mapping[int, Mapping]) -> dict:
    seeds = sorted(first.keys() & second.keys())
    return compare(*(_marks([records[seed] for seed in seeds]) for records in (first, second))) | {"seeds": seeds}


def _marks(runs: Sequence[Mapping]) -> Marks:
    return {
        task: torch.tensor([[int(mark) for mark in run["test"][task]["right"]] for run in runs])
        for task in runs[0]["test"]
    }


def _spectrum_pair(first: Mapping[int, Mapping], second: Mapping[int, Mapping]) -> dict[str, dict]:
    """By projection, the mean difference of the effective ranks, its p over the layers, and that of the leading
    values' effective ranks."""
    seeds = sorted(first.keys() & second.keys())

    def differences(kind: str, key: str) -> torch.Tensor:
        one, other = (torch.tensor([r[seed]["spectrum"][kind][key] for seed in seeds]) for r in (first, second))
        return (one - other).double().mean(0)

    found = {}
    for kind in first[seeds[0]]["spectrum"]:
        by_layer = differences(kind, "effective_rank")
        found[kind] = {
            "difference": by_layer.mean().item(),
            "p": sign_flip_p(by_layer),
            "leading": differences(kind, "leading").mean().item(),
        }
    return found


def _conditions(done: Results) -> dict:
    """Every value that the runs' environments have, so that a mixture of machines or commits shows."""
    seen: dict[str, list] = {}
    for record in done.values():
        environment = record["environment"]
        versions = ", ".join(f"{name} {found}" for name, found in environment["versions"].items() if found)
        for key, value in {**environment, "versions": versions, "model": record["model"]}.items():
            if value not in seen.setdefault(key, []):
                seen[key].append(value)
    return seen
