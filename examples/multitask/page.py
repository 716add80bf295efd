"""The report: summary.json, figures, and the part of README.md between its markers."""

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path

import torch

from bench.report import table
from examples.multitask.claims import RULES
from examples.multitask.execute import write
from examples.multitask.plan import FIRST, METHODS, Results, Run, Study, next_run
from examples.multitask.summary import summarise
from multilora_fast.console import MIB
from multilora_fast.files import atomic_file
from multilora_fast.spectrum import save_histograms

TELLING = 30  # least test items of a task for figures that mean something


def report(folder: Path, study: Study, done: Results) -> dict:
    """Write summary.json, the figures and the page of the finished runs, and return the summary."""
    summary = summarise(study, done)
    write(folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    figures = _figures(folder, summary, done)
    unfinished = next_run(study, done)
    parts = [*_sections(summary), *(f"![{name}]({name}.png)" for name in figures)]
    if study.test_items < TELLING:
        parts.insert(0, "**A trial run:** too short for its figures to mean anything.")
    if unfinished is not None:
        parts.insert(0, f"**Unfinished:** the next run is `{unfinished.name}`. {_decided(summary)}")
    body = "\n\n".join(parts)
    between(folder / "README.md", "results", body)
    return summary


def between(page: Path, name: str, body: str) -> None:
    """Put ``body`` between the markers ``name`` of a page, which is created if missing.

    Raises:
        ValueError: the page lacks the markers.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = page.read_text() if page.exists() else f"# Many tasks at once\n\n{start}\n{end}\n"
    if start not in text or end not in text:
        raise ValueError(f"{page} lacks the markers {start} and {end}, between which the report goes.")
    write(page, re.sub(f"{start}.*{end}", lambda _: f"{start}\n{body}\n{end}", text, flags=re.S))


def _sections(summary: Mapping):
    methods = summary["methods"]
    yield _conditions(summary)
    if methods:
        yield f"## Accuracy on test items\n\n{_accuracy(summary)}\n\n{_accuracy_notes(summary)}"
        yield f"## Learning rates, by mean accuracy on validation items\n\n{_sweeps(methods)}"
    if summary["pairs"]:
        header = ["difference in mean accuracy", "", "95 % interval", "p", "p with seeds", "seeds"]
        rows = [
            [_pair_name(name), f"{p['difference']:+.3f}", f"{p['low']:+.3f} to {p['high']:+.3f}", f"{p['p']:.3g}",
             f"{p['p_seeds']:.3g}" if "p_seeds" in p else "", str(len(p["seeds"]))]
            for name, p in summary["pairs"].items()
        ]  # fmt: skip
        yield (
            f"## Differences\n\n{table(header, rows)}\n\nIntervals: bootstrap over items and seeds. p: paired "
            "sign-flip test over items, with fixed seeds. p with seeds: t test with crossed random items and seeds. "
            "Neither is corrected for multiple comparisons."
        )
    if methods:
        yield f"## Cost of the runs\n\n{_run_costs(methods)}"
    if "cost" in summary:
        yield f"## Cost of a step on one batch, interleaved\n\n{_step_costs(summary['cost'])}"
    if methods:
        yield f"## Spectrum of ΔW\n\n{_spectra(methods, summary['settings']['total_rank'])}"
    if summary["claims"]:
        rows = [
            [c["claim"], f"**{c['verdict']}**" if c["final"] else f"so far: {c['verdict']}", c["figures"]]
            for c in summary["claims"]
        ]
        note = "" if all(c["final"] for c in summary["claims"]) else "So far: no verdict, more seeds follow. "
        yield f"## The paper's claims at this size\n\n{table(['claim', 'verdict', 'figures'], rows)}\n\n{note}{RULES}"


def _decided(summary: Mapping) -> str:
    """Which differences have all their seeds, some, or none."""
    parts: dict[str, list[str]] = {"Decided": [], "Not decided yet": [], "Not tested yet": []}
    for name, one in summary["progress"].items():
        part = "Decided" if one["complete"] else "Not decided yet" if one["seeds"] else "Not tested yet"
        count = f" ({one['seeds']} of {one['of']} seeds)" if one["seeds"] else ""
        parts[part].append(f"{_pair_name(name)}{count}")
    return " ".join(f"{part}: {'; '.join(names) or 'nothing'}." for part, names in parts.items())


def _conditions(summary: Mapping) -> str:
    s, seen = summary["settings"], summary["conditions"]
    if not seen:
        return "No run is finished."
    first = (
        f"{' and '.join(seen['model'])}: {s['steps']} steps of {s['batch_size']} examples of at most {s['max_length']} "
        f"tokens, total rank {s['total_rank']}{_ranks(s)} on all seven linear layers; float32 weights, autocast to "
        f"{s['dtype']}."
    )
    items = "; ".join(
        f"{task} {count} validation, {summary['items']['test'][task]} test"
        for task, count in summary.get("items", {}).get("validation", {}).items()
    )
    last = "; ".join(
        f"{key} {', '.join(map(str, seen[key]))}" for key in ("device", "threads", "python", "versions", "commit")
    )
    return f"{first} Items: {items}.\n\n{last}."


def _ranks(settings: Mapping) -> str:
    return "".join(f" ({METHODS[method].label}: {rank})" for method, rank in settings.get("ranks", {}).items())


def _accuracy(summary: Mapping) -> str:
    tasks = _tasks(summary)
    rows = []
    for label, key in (("majority class", "majority"), ("zero-shot", "zero_shot")):
        if key in summary:
            found, mean = summary[key], _mean(summary, key)
            rows.append([label, *(f"{found[task]:.3f}" for task in tasks), f"{mean:.3f}", "", ""])
    for method, one in summary["methods"].items():
        spread = f"{one['sd']:.3f}" if one["sd"] is not None else ""
        accuracies = [f"{one['tasks'][task]:.3f}" if task in one["tasks"] else "" for task in tasks]
        rows.append([METHODS[method].label, *accuracies, f"**{one['mean']:.3f}**", spread, str(len(one["seeds"]))])
    return table(["method", *tasks, "mean", "sd over seeds", "seeds"], rows)


def _tasks(summary: Mapping) -> list[str]:
    return list(dict.fromkeys(task for one in summary["methods"].values() for task in one["tasks"]))


def _mean(summary: Mapping, key: str) -> float:
    return statistics.mean(summary[key][task] for task in summary["in_mean"])


def _accuracy_notes(summary: Mapping) -> str:
    notes = ["The answer is the option with the highest summed log-probability."]
    few = [task for task in _tasks(summary) if task not in summary.get("in_mean", _tasks(summary))]
    if few:
        notes.append(f"Excluded from the mean for too few test items: {', '.join(few)}.")
    for method, one in summary["methods"].items():
        if not one["sweep_complete"]:
            notes.append(f"The sweep of {METHODS[method].label} is incomplete: its row is provisional.")
        elif one["at_edge"]:
            notes.append(f"The learning rate of {METHODS[method].label} is at the edge of its sweep.")
        if "task_weight" in one:
            notes.append(
                f"{METHODS[method].label}: each with weight {one['task_weight']:g}, chosen on validation items."
            )
    return " ".join(notes)


def _sweeps(methods: Mapping) -> str:
    rows = []
    for method, one in methods.items():
        marks = {rate: "**" if float(rate) == one["learning_rate"] else "" for rate in one["sweep"]}
        tried = [f"{rate}: {marks[rate]}{accuracy:.3f}{marks[rate]}" for rate, accuracy in one["sweep"].items()]
        rows.append([METHODS[method].label, "; ".join(tried)])
    return table(["method", "learning rate: accuracy, seed 0"], rows)


def _pair_name(name: str) -> str:
    first, second = name.split(" - ")
    return f"{METHODS[first].label} − {METHODS[second].label}"  # noqa: RUF001


def _run_costs(methods: Mapping) -> str:
    rows = []
    for method, one in methods.items():
        memory = one.get("memory", {})
        figures = [memory.get(key) for key in ("step", "optimizer", "step_as_loop")]
        rows.append(
            [METHODS[method].label, f"{one['mean']:.3f}", f"{one['trainable']:,}" if "trainable" in one else "",
             f"{one['tokens']:,.0f}", f"{one['tokens_per_second']:,.0f}",
             *(f"{v / MIB:,.0f}" if v is not None else "" for v in figures)]
        )  # fmt: skip
    header = ["method", "accuracy", "trainable parameters", "training tokens", "tokens/s", "peak of a step, MiB",
              "optimizer, MiB", "peak of the loop, MiB"]  # fmt: skip
    return (
        f"{table(header, rows)}\n\nTokens/s: the method's fastest run, on a machine that may have been shared; the "
        "next table is interleaved. Peak: counted bytes alive at once beyond weights and optimizer state. Loop: "
        "MultiLoRA as a loop over branches."
    )


def _step_costs(cost: Mapping) -> str:
    rows = []
    for n, costs in cost["costs"].items():
        lora = next(c for c in costs if c["method"] == "PEFT LoRA")
        for c in costs:
            figures = [c["seconds"], c["saved"] / MIB, c["peak"] / MIB]
            ratios = [c[key] / lora[key] for key in ("seconds", "saved", "peak")]
            cells = [f"{v:,.{d}f} ({r:.2f}x)" for v, r, d in zip(figures, ratios, (2, 0, 0), strict=True)]
            rows.append(
                [c["method"], n if c is not lora else "", *cells, f"{cost['batch_tokens'] / c['seconds']:,.0f}"]
            )
    header = ["method", "n", "s/step", "saved for backward, MiB", "peak, MiB", "tokens/s"]
    return (
        f"{table(header, rows)}\n\nMedians of {cost['rounds']} rounds; in brackets: relative to LoRA of the same total "
        "rank."
    )


def _spectra(methods: Mapping, total_rank: int) -> str:
    kinds = list(next(iter(methods.values()))["spectrum"])
    parts = []
    names = ("effective rank", f"effective rank of the {total_rank} largest", "top share")
    for name, key, digits in zip(names, ("effective_rank", "leading", "top_share"), (2, 2, 3), strict=True):
        rows = []
        for method, one in methods.items():
            rows.append([METHODS[method].label, *(f"{one['spectrum'][kind][key]:.{digits}f}" for kind in kinds)])
        parts.append(table([name, *kinds], rows))
    note = "Means over layers and seeds. p: a singular value's share of their sum. Effective rank: exp(−Σ p log p). "  # noqa: RUF001
    return "\n\n".join([*parts, f"{note}Top share: the largest p. An adapter has at most as many values as its rank."])


def _figures(folder: Path, summary: Mapping, done: Results) -> list[str]:
    spectra = {}
    shown = {name: one for name, one in summary["methods"].items() if name in (*FIRST, "task-arithmetic")}
    for method, one in shown.items():
        record = done[Run(method, one["learning_rate"], one["seeds"][0]).name]
        kept = {kind: s["values"] for kind, s in record["spectrum"].items() if "values" in s}
        spectra[METHODS[method].label] = {kind: [torch.tensor(v) for v in values] for kind, values in kept.items()}
    if not spectra:
        return []
    save_histograms(folder / "spectrum.png", spectra)
    _accuracy_figure(folder / "accuracy.png", summary)
    return ["accuracy", "spectrum"]


def _accuracy_figure(path: Path, summary: Mapping) -> None:
    from matplotlib.figure import Figure

    methods = summary["methods"]
    tasks = _tasks(summary)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(methods)
    for i, (method, one) in enumerate(methods.items()):
        found = [*(one["tasks"].get(task) for task in tasks), one["mean"]]
        at = [x + i * width for x, height in enumerate(found) if height is not None]
        heights = [height for height in found if height is not None]
        errors = [0.0] * (len(heights) - 1) + [one["sd"] or 0.0]
        axis.bar(at, heights, width, yerr=errors, label=METHODS[method].label)
    for key, style in (("majority", "dashed"), ("zero_shot", "dotted")):
        if key in summary:
            values = [summary[key][task] for task in tasks]
            starts = [x - width / 2 for x in range(len(tasks) + 1)]
            ends = [x + 0.8 - width / 2 for x in range(len(tasks) + 1)]
            axis.hlines([*values, _mean(summary, key)], starts, ends, colors="#444444", linestyles=style,
                        label=key.replace("_", " "))  # fmt: skip
    axis.set_xticks([x + 0.4 - width / 2 for x in range(len(tasks) + 1)], [*tasks, "mean"])
    axis.set(ylabel="accuracy on test items", ylim=(0, 1))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(ncols=4, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    with atomic_file(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=130)
