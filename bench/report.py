"""Committed JSON → tables and plots: ``python -m bench.report [DIR ...]`` (default: every bench/results/<device>/).

Each directory gets a README.md and PNGs; the project's README gets the tables between its ``<!-- name -->`` markers
from bench/results/<the first directory>. A number that is in no JSON appears nowhere.
"""

import argparse
import json
import re
from pathlib import Path

from bench.candidates import FP8
from multilora_fast.benchmark.layer import FROZEN, LORA, OURS, REFERENCE

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def benches(path: Path) -> tuple[dict, list[dict]]:
    """The machine and the benches (settings, medians, ratios) of one pytest-benchmark file."""
    document = json.loads(path.read_text())
    return document["machine_info"], [bench["extra_info"] for bench in document["benchmarks"]]


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.{2 if seconds < 5e-3 else 1}f}"


def conditions_line(machine: dict) -> str:
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items() if found)
    return f"{machine['device']}, {machine['threads']} threads; {versions}; commit {machine['commit']}."


def layer_tables(path: Path) -> str:
    machine, rows = benches(path)
    parts = []
    for direction in ("forward+backward", "forward", "backward"):
        chosen = [row for row in rows if row["settings"]["direction"] == direction]
        if not chosen:
            continue
        names = list(dict.fromkeys(name for row in chosen for name in row["median"]))
        body = []
        for row in chosen:
            s = row["settings"]
            case = f"{s['K']}→{s['N']}, n = {s['n']}, {s['dtype']}, dropout {s['dropout']:g}"
            times = [milliseconds(row["median"][n]) if n in row["median"] else "" for n in names]
            work = row["work"]
            ours = row["median"][OURS]
            rate, share = f"{work['flops'] / ours / 1e12:.3f}", f"{100 * work['floor_by_frozen_layer'] / ours:.0f} %"
            body.append([case, *times, rate, share])
        header = ["layer", *names, "ours, TFLOP/s", "ours, of the floor"]
        parts.append(f"### {direction}, ms\n\n{table(header, body)}")
    s = rows[0]["settings"]
    note = (
        f"{s['M']} tokens, r = {s['r']}; medians of rounds in which all take turns. Floor: the frozen layer's time of "
        f"the same run times the FLOPs that the branches add. {conditions_line(machine)}"
    )
    return "\n\n".join([f"## One layer\n\n{note}", *parts])


def ops_table(path: Path) -> str:
    document = json.loads(path.read_text())
    body = []
    for bench in document["benchmarks"]:
        found = bench["extra_info"]
        s = found["settings"]
        figures = [f"{1e3 * bench['stats']['median']:.3f}", f"{found['GB/s']:.1f}", f"{found['TFLOP/s']:.3f}"]
        body.append([s["use"], str(s["n"]), f"{s['dropout']:g}", *figures, f"{100 * found['share_of_floor']:.0f} %"])
    note = (
        f"{s['M']} tokens, {s['D']} columns, r = {s['r']}, {s['dtype']}; medians. Floor: the FLOPs and the bytes that "
        "each use must move, over the matrix rate and copy bandwidth measured in the same run. Where torch stands in "
        f"for the kernels the mask is given, not drawn. {conditions_line(document['machine_info'])}"
    )
    header = ["product", "n", "dropout", "ms", "GB/s", "TFLOP/s", "of the floor"]
    return f"## The three products\n\n{note}\n\n{table(header, body)}"


def group_table(path: Path) -> str:
    machine, rows = benches(path)
    names = list(rows[0]["median"])
    body = []
    for row in rows:
        s = row["settings"]
        sizes = ", ".join(map(str, s["N"]))
        case = f"{s['K']}→{sizes}, n = {s['n']}, {s['dtype']}, dropout {s['dropout']:g}"
        times = [milliseconds(row["median"][name]) for name in names]
        body.append([case, *times, f"{row['ratios']['alone / shared']:.2f}x"])
    s = rows[0]["settings"]
    note = (
        f"{s['M']} tokens, r = {s['r']}; forward + backward, ms; medians of rounds in which all take turns. "
        f"{conditions_line(machine)}"
    )
    return f"## q, k and v together\n\n{note}\n\n{table(['layers', *names, 'alone / shared'], body)}"


def plan_table(path: Path) -> str:
    document = json.loads(path.read_text())
    body = []
    for row in document["rows"]:
        sizes = [f"{row[key] / 2**20:,.1f}" for key in ("predicted", "measured")]
        case = f"{row['batch']} x {row['seq_len']}"
        recomputed = "yes" if row["checkpointing"] else "no"
        body.append([row["method"], case, f"{row['lora_dropout']:g}", recomputed, *sizes, f"{row['error']:+.2%}"])
    header = ["method", "tokens", "dropout", "checkpointing", "planned, MiB", "measured, MiB", "error"]
    note = (
        f"The peak that plan_memory says against that of a real step of {document['rows'][0]['model']}, n = "
        f"{document['n']}, r = {document['r']}, without weights, adapter and optimizer's state. "
        f"{conditions_line(document['conditions'])}"
    )
    return f"## Memory as planned\n\n{note}\n\n{table(header, body)}"


def fp8_table(path: Path) -> str:
    document = json.loads(path.read_text())
    errors = [[kind, f"{100 * value:.1f} %"] for kind, value in document["error of lora_A's gradient"].items()]
    losses = [[name, f"{value:.4f}"] for name, value in document["summary"].items()]
    note = (
        f"{document['model']}, {document['dtype']}, {document['steps']} steps of {document['batch']} examples of the "
        f"demo's mixture, n = {document['n']}, r = {document['r']}, no dropout. A distance is the mean over all steps "
        f"of how far a run's loss is from the exact run's. {conditions_line(document['conditions'])}"
    )
    return "\n\n".join(
        [
            f"## Inputs kept in 8 bits\n\n{note}",
            table(["loss", "value"], losses),
            "After training, on one batch: the error of lora_A's gradient, the median over the layers of a kind.",
            table(["layer", "relative error"], errors),
            "![losses](fp8_inputs.png)",
        ]
    )


def step_table(path: Path) -> str:
    machine, rows = benches(path)
    body = []
    for row in rows:
        s = row["settings"]
        for name, seconds in row["median"].items():
            tokens = s["batch"] * s["length"] / seconds
            saved, peak = (f"{row['memory'][name][key] / 2**20:,.0f}" for key in ("saved", "peak"))
            ratio = f"{seconds / row['median'][LORA]:.2f}x"
            body.append([name, f"{s['dropout']:g}", f"{1e3 * seconds:,.0f}", ratio, f"{tokens:,.0f}", saved, peak])
    s = rows[0]["settings"]
    header = ["training step", "dropout", "ms", "of LoRA", "tokens/s", "saved, MiB", "peak, MiB"]
    note = (
        f"{s['model']}, {s['dtype'].removeprefix('torch.')}, batch {s['batch']} of {s['length']} tokens, n = {s['n']}, "
        f"r = {s['r']}; forward, backward, AdamW; medians of rounds in which all take turns. {conditions_line(machine)}"
    )
    return f"## One training step\n\n{note}\n\n{table(header, body)}"


def memory_table(path: Path) -> str:
    document = json.loads(path.read_text())
    body = []
    for row in document["rows"]:
        counts = [row["beyond"][name] for name in (LORA, REFERENCE, OURS, FP8)]
        lora, loop, ours, fp8 = counts
        ratios = [f"{ours / lora:.2f}x", f"{fp8 / lora:.2f}x", f"{ours / loop:.3f}x"]
        figures = [*(f"{count:,.0f}" for count in counts), *ratios]
        body.append([f"LLaMA-{row['size']}", f"{row['dropout']:g}", *figures])
    header = ["decoder layer", "dropout", LORA, REFERENCE, OURS, FP8, "ours / LoRA", "fp8 / LoRA", "ours / loop"]
    note = (
        "Bytes per token that one decoder layer saves for backward beyond the frozen layer, n = 5, r = 32 against "
        "LoRA of rank 160, bfloat16, all seven linears; dropout masks counted as one byte per element, as on CUDA. "
        f"{conditions_line(document['conditions'])}"
    )
    growth = [
        [f"{row['n']} x {row['r']}", str(row["tokens"]), *(f"{count:,.0f}" for count in row["beyond"].values())]
        for row in document["growth"]
    ]
    more = table(["n x r", "tokens", LORA, REFERENCE, OURS, FP8], growth)
    size, p = (document["growth"][0][key] for key in ("size", "dropout"))
    return "\n\n".join(
        [
            f"## Memory saved for backward\n\n{note}\n\n{table(header, body)}",
            f"### How it grows\n\nThe same bytes per token, LLaMA-{size}, dropout {p:g}: with the branches that one "
            f"total rank is cut into, with the rank, and with the tokens.\n\n{more}",
        ]
    )


def headline(directory: Path) -> str:
    """The README's first table: what a LLaMA-7B layer saves, and the time and peak of a whole training step."""
    saved = {row["dropout"]: row["beyond"] for row in json.loads((directory / "memory.json").read_text())["rows"][:2]}
    machine, rows = benches(directory / "step.json")
    steps = {row["settings"]["dropout"]: row for row in rows}
    body = []
    for name in (REFERENCE, LORA, OURS, FP8):
        cells = [f"{saved[p][name] / saved[p][LORA]:.2f}x" for p in saved]
        for row in steps.values():
            cells.append(f"{row['median'][name] / row['median'][LORA]:.2f}x")
            cells.append(f"{row['memory'][name]['peak'] / row['memory'][LORA]['peak']:.2f}x")
        body.append([name, *cells])
    s = rows[0]["settings"]
    header = ["of PEFT LoRA", *(f"saved, dropout {p:g}" for p in saved)]
    header += [f"{what}, dropout {p:g}" for p in steps for what in ("step", "peak")]
    note = (
        "Saved: bytes kept for backward by one LLaMA-7B decoder layer beyond the frozen layer, n = 5, r = 32 against "
        "LoRA of rank 160, bfloat16, counted. Step and peak: time, and most bytes alive beside the weights and the "
        f"optimizer's state, in a training step of {s['model']}, {s['dtype'].removeprefix('torch.')}, {s['batch']} x "
        f"{s['length']} tokens, n = {s['n']}, r = {s['r']}. Adapters in the base's dtype: in float32, PEFT's default, "
        f"LoRA saves a second copy of its inputs. {conditions_line(machine)}"
    )
    return f"## In short\n\n{table(header, body)}\n\n{note}"


def plot(directory: Path, rows: list[dict]) -> None:
    """One bar per candidate, forward + backward against the frozen layer, for each layer case."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["settings"]["direction"] == "forward+backward"]
    names = [name for name in rows[0]["median"] if "float32" not in name]
    figure = Figure(figsize=(1.1 * len(rows) + 4, 4.5), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = [row["median"].get(name, 0) / row["median"][FROZEN] for row in rows]
        at = [x + i * width for x in range(len(rows))]
        style = {"color": "#1f5fa8"} if name == OURS else {"alpha": 0.55}
        axis.bar(at, heights, width, label=name, **style)
    labels = ["{K}→{N}\nn = {n}\n{dtype}\np = {dropout:g}".format(**row["settings"]) for row in rows]
    axis.set_xticks([x + 0.4 for x in range(len(rows))], labels, fontsize=7)
    axis.set_ylabel("time against the frozen layer")
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(directory / "layer.png", dpi=130)


SECTIONS = {
    "ops": ops_table, "layer": layer_tables, "group": group_table, "step": step_table, "memory": memory_table,
    "plan": plan_table, "fp8_inputs": fp8_table,
}  # fmt: skip


def report(directory: Path) -> dict[str, str]:
    """Write ``directory``'s README.md and plots from its JSON; return the sections by name."""
    sections = {
        name: section(directory / f"{name}.json")
        for name, section in SECTIONS.items()
        if (directory / f"{name}.json").exists()
    }
    if "layer" in sections:
        plot(directory, benches(directory / "layer.json")[1])
        sections["layer"] += "\n\n![one layer](layer.png)"
    if {"memory", "step"} <= sections.keys():
        sections = {"headline": headline(directory), **sections}
    (directory / "README.md").write_text(f"# {directory.name}\n\n" + "\n\n".join(sections.values()) + "\n")
    return sections


def fill(text: str, sections: dict[str, str]) -> str:
    """``text`` with every ``<!-- name -->`` … ``<!-- /name -->`` filled from the section of that name."""
    for name, section in sections.items():
        body = section.partition("\n\n")[2].partition("\n\n### How")[0]
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, b=body: f"{m[1]}{b}\n{m[2]}", text, flags=re.S
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="*", type=Path)
    directories = parser.parse_args().directories or sorted(p for p in RESULTS.iterdir() if p.is_dir())
    for i, directory in enumerate(directories):
        sections = report(directory)
        print(f"wrote {directory / 'README.md'}")
        if i == 0:
            readme = ROOT / "README.md"
            readme.write_text(fill(readme.read_text(), sections))


if __name__ == "__main__":
    main()
