"""Tables and plots from committed JSON: ``python -m bench.report [DIR ...]`` (default: every bench/results/<device>/).

Each directory gets a README.md and PNGs. The project's README and two docs pages get the tables between their ``<!--
name -->`` markers from the first directory that has them; the headline table covers all directories. A number that is
in no JSON appears nowhere.
"""

import argparse
import json
import re
from pathlib import Path

from bench import experts_tables
from bench.candidates import FP8
from bench.tables import benches, clock_tables, conditions_line, layer_case, milliseconds, table
from multilora_fast.benchmark.layer import FROZEN, LORA, OURS, REFERENCE

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"
PAGES = [ROOT / page for page in ("README.md", "docs/benchmarks.md", "docs/experts.md")]


def layer_tables(path: Path) -> str:
    machine, rows = benches(path)
    parts = []
    tokens = sorted({row["settings"]["M"] for row in rows})
    for direction in ("forward+backward", "forward", "backward"):
        chosen = [row for row in rows if row["settings"]["direction"] == direction]
        if not chosen:
            continue
        names = list(dict.fromkeys(name for row in chosen for name in row["median"]))
        body = []
        for row in chosen:
            s = row["settings"]
            case = layer_case(s, tokens)
            times = [milliseconds(row["median"][n]) if n in row["median"] else "" for n in names]
            work = row["work"]
            ours = row.get("device", row["median"])[OURS]
            rate, share = f"{work['flops'] / ours / 1e12:.3f}", f"{100 * work['floor_by_frozen_layer'] / ours:.0f} %"
            body.append([case, *times, rate, share])
        header = ["layer", *names, "ours, TFLOP/s", "ours, of the floor"]
        parts.append(f"### {direction}, ms\n\n{table(header, body)}")
        parts += clock_tables(chosen, lambda row: layer_case(row["settings"], tokens), direction)
    s = rows[0]["settings"]
    note = (
        f"{', '.join(map(str, tokens))} tokens, r = {s['r']}; medians of interleaved rounds. Floor: the frozen layer's "
        f"time in the same run, scaled by the FLOPs that the branches add. {conditions_line(machine)}"
    )
    return "\n\n".join([f"## One layer\n\n{note}", *parts])


def ops_table(path: Path) -> str:
    document = json.loads(path.read_text())
    body = []
    for bench in document["benchmarks"]:
        found = bench["extra_info"]
        s = found["settings"]
        seconds = found.get("device_seconds", bench["stats"]["median"])
        figures = [f"{1e3 * seconds:.3f}", f"{found['GB/s']:.1f}", f"{found['TFLOP/s']:.3f}"]
        case = [s["use"], str(s["M"]), str(s["n"]), f"{s['dropout']:g}"]
        body.append([*case, *figures, f"{100 * found['share_of_floor']:.0f} %"])
    clock = "graph replay over inputs that exceed L2; " if "device_seconds" in found else ""
    note = (
        f"{s['D']} columns, r = {s['r']}, {s['dtype']}; {clock}medians. Floor: the FLOPs and bytes of "
        "each use over the matrix rate and copy bandwidth measured in the same run. On the torch backend the dropout "
        f"mask is an input, not drawn. {conditions_line(document['machine_info'])}"
    )
    header = ["product", "tokens", "n", "dropout", "ms", "GB/s", "TFLOP/s", "of the floor"]
    return f"## The three products\n\n{note}\n\n{table(header, body)}"


def group_case(s: dict, tokens: list[int]) -> str:
    return layer_case({**s, "N": ", ".join(map(str, s["N"]))}, tokens)


def group_table(path: Path) -> str:
    machine, rows = benches(path)
    names = list(dict.fromkeys(name for row in rows for name in row["median"]))
    tokens = sorted({row["settings"]["M"] for row in rows})
    body = []
    for row in rows:
        times = [milliseconds(row["median"][name]) if name in row["median"] else "" for name in names]
        body.append([group_case(row["settings"], tokens), *times, f"{row['ratios']['alone / shared']:.2f}x"])
    note = (
        f"{', '.join(map(str, tokens))} tokens, r = {rows[0]['settings']['r']}; forward + backward, ms; medians of "
        f"interleaved rounds. {conditions_line(machine)}"
    )
    first = f"## q, k and v together\n\n{note}\n\n{table(['layers', *names, 'alone / shared'], body)}"
    more = clock_tables(rows, lambda row: group_case(row["settings"], tokens), "q, k and v, forward + backward")
    return "\n\n".join([first, *more])


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
        f"The peak that plan_memory predicts and that of a real step of {document['rows'][0]['model']}, n = "
        f"{document['n']}, r = {document['r']}, without weights, adapter and optimizer state. "
        f"{conditions_line(document['conditions'])}"
    )
    return f"## Memory as planned\n\n{note}\n\n{table(header, body)}"


def fp8_table(path: Path) -> str:
    document = json.loads(path.read_text())
    errors = [[kind, f"{100 * value:.1f} %"] for kind, value in document["error of lora_A's gradient"].items()]
    losses = [[name, f"{value:.4f}"] for name, value in document["summary"].items()]
    note = (
        f"{document['model']}, {document['dtype']}, {document['steps']} steps of {document['batch']} examples of the "
        f"demo's mixture, n = {document['n']}, r = {document['r']}, no dropout. Distance: the mean absolute difference "
        f"from the exact run's loss over all steps. {conditions_line(document['conditions'])}"
    )
    return "\n\n".join(
        [
            f"## Inputs saved in 8 bits\n\n{note}",
            table(["loss", "value"], losses),
            "The relative error of lora_A's gradient on one batch after training, median over the layers of a kind.",
            table(["layer", "relative error"], errors),
            "![losses](fp8_inputs.png)",
        ]
    )


def step_case(s: dict) -> str:
    return f"{s['batch']} x {s['length']} tokens, dropout {s['dropout']:g}"


def step_table(path: Path) -> str:
    machine, rows = benches(path)
    body = []
    for row in rows:
        s = row["settings"]
        for name, seconds in row["median"].items():
            tokens, memory = s["batch"] * s["length"] / seconds, row["memory"][name]
            held = [f"{memory[key] / 2**20:,.0f}" if key in memory else "" for key in ("saved", "peak")]
            ratio = f"{seconds / row['median'][LORA]:.2f}x" if LORA in row["median"] else ""
            time = f"{1e3 * seconds:,.0f}" if seconds > 0.1 else f"{1e3 * seconds:.1f}"
            body.append(
                [name, f"{s['batch']} x {s['length']}", f"{s['dropout']:g}", time, ratio, f"{tokens:,.0f}", *held]
            )
    s = rows[0]["settings"]
    header = ["training step", "tokens", "dropout", "ms", "of LoRA", "tokens/s", "saved, MiB", "peak, MiB"]
    how = "rounds, one method in memory at a time" if any("device" in row for row in rows) else "interleaved rounds"
    note = (
        f"{s['model']}, {s['dtype'].removeprefix('torch.')}, n = {s['n']}, r = {s['r']}; forward, backward, AdamW; "
        f"medians of {how}. {conditions_line(machine)}"
    )
    first = f"## One training step\n\n{note}\n\n{table(header, body)}"
    return "\n\n".join([first, *clock_tables(rows, lambda row: step_case(row["settings"]), "a step", unit=1e3)])


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
        "Bytes per token that one decoder layer saves for backward, beyond the frozen layer's; n = 5, r = 32, LoRA of "
        "rank 160, bfloat16, all seven linears; dropout masks count as one byte per element, as on CUDA. "
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
            f"### By branches, rank and tokens\n\nThe same bytes per token, LLaMA-{size}, dropout {p:g}, for more "
            f"branches at one total rank, a growing rank, and more tokens.\n\n{more}",
        ]
    )


def headline(directories: list[Path]) -> str:
    """The README's table: time and peak memory of the largest step on each device, relative to PEFT LoRA."""
    found, notes, drops = {}, [], set()
    for directory in directories:
        machine, rows = benches(directory / "step.json")
        rows = sorted(rows, key=lambda row: row["settings"]["batch"] * row["settings"]["length"])
        steps = {row["settings"]["dropout"]: row for row in rows}
        found[machine["device"]] = steps
        drops |= set(steps)
        s = rows[-1]["settings"]
        notes.append(
            f"{machine['device']}: {s['model']}, {s['batch']} x {s['length']} tokens, torch "
            f"{machine['versions']['torch']}, commit {machine['commit']}."
        )
    body = []
    for device, steps in found.items():
        for name in (REFERENCE, OURS):
            cells = []
            for p in sorted(drops):
                row = steps.get(p)
                if row is None or name not in row["median"]:
                    cells += ["-", "-"]
                    continue
                peak = row["memory"][name]["peak"] / row["memory"][LORA]["peak"]
                cells += [f"{row['median'][name] / row['median'][LORA]:.2f}x", f"{peak:.2f}x"]
            body.append([device, name, *cells])
    header = [
        "relative to PEFT LoRA",
        "",
        *(f"{what}, dropout {p:g}" for p in sorted(drops) for what in ("time", "peak")),
    ]
    note = (
        "One training step: time, and peak memory without weights and optimizer state; "
        f"{s['dtype'].removeprefix('torch.')}, n = {s['n']}, r = {s['r']} against LoRA of rank {s['n'] * s['r']}; "
        f"-: not measured. {' '.join(notes)}"
    )
    return f"## In short\n\n{table(header, body)}\n\n{note}"


def plot(directory: Path, rows: list[dict]) -> None:
    """Plot one bar per candidate, forward + backward relative to the frozen layer, for each layer case."""
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
    axis.set_ylabel("time relative to the frozen layer")
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(directory / "layer.png", dpi=130)


SECTIONS = {
    "ops": ops_table, "layer": layer_tables, "group": group_table, "step": step_table, "memory": memory_table,
    "plan": plan_table, "fp8_inputs": fp8_table, "experts": experts_tables.time_section,
    "experts_memory": experts_tables.memory_section,
}  # fmt: skip


def report(directory: Path) -> dict[str, str]:
    """Write ``directory``'s README.md and plots from its JSON, and return the sections by name."""
    sections = {
        name: section(directory / f"{name}.json")
        for name, section in SECTIONS.items()
        if (directory / f"{name}.json").exists()
    }
    if "layer" in sections:
        plot(directory, benches(directory / "layer.json")[1])
        sections["layer"] += "\n\n![one layer](layer.png)"
    (directory / "README.md").write_text(f"# {directory.name}\n\n" + "\n\n".join(sections.values()) + "\n")
    return sections


def reported(results: Path) -> list[Path]:
    """The devices' folders. A folder without any file of SECTIONS is left out."""
    return sorted(p for p in results.iterdir() if any((p / f"{name}.json").exists() for name in SECTIONS))


def fill(text: str, sections: dict[str, str]) -> str:
    """Fill every ``<!-- name -->`` … ``<!-- /name -->`` in ``text`` with the section of that name."""
    for name, section in sections.items():
        body = section.partition("\n\n")[2].partition("\n\n### By branches")[0]
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, b=body: f"{m[1]}{b}\n{m[2]}", text, flags=re.S
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="*", type=Path)
    directories = parser.parse_args().directories or reported(RESULTS)
    sections = {}
    for directory in directories:
        sections = report(directory) | sections  # the first directory that has one
        print(f"wrote {directory / 'README.md'}")
    stepped = [directory for directory in directories if (directory / "step.json").exists()]
    if stepped:
        sections["headline"] = headline(stepped[::-1])
    for page in PAGES:
        page.write_text(fill(page.read_text(), sections))


if __name__ == "__main__":
    main()
