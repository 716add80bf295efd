"""Building blocks of the tables of bench.report."""

import json
from collections.abc import Callable
from pathlib import Path


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


def layer_case(s: dict, tokens: list[int]) -> str:
    """A row's label, with its tokens in tables whose rows differ in them."""
    many = f"{s['M']} tokens, " if len(tokens) > 1 else ""
    return f"{many}{s['K']}→{s['N']}, n = {s['n']}, {s['dtype']}, dropout {s['dropout']:g}"


CLOCKS = {
    "device": "GPU time, graph replay",
    "host": "host time to enqueue 16 tokens",
}


def clock_tables(rows: list[dict], case: Callable[[dict], str], what: str, unit: float = 1e6) -> list[str]:
    """Device and host times in microseconds (``unit`` a second), and own costs by every clock; empty for files without
    them.
    """
    parts = []
    for clock, meaning in CLOCKS.items():
        chosen = [row for row in rows if row.get(clock)]
        names = list(dict.fromkeys(name for row in chosen for name in row[clock]))
        body = [
            [case(row), *(f"{unit * row[clock][n]:,.0f}" if n in row[clock] else "" for n in names)] for row in chosen
        ]
        if body:
            parts.append(f"### {what}, {'us' if unit == 1e6 else 'ms'}: {meaning}\n\n{table(['', *names], body)}")
    body = []
    for row in rows:
        for clock, costs in row.get("own cost", {}).items():
            body += [[case(row), clock, costs]] if costs else []
    names = list(dict.fromkeys(name for *_, costs in body for name in costs))
    cells = [[label, clock, *(f"{costs[n]:.2f}" if n in costs else "" for n in names)] for label, clock, costs in body]
    if cells:
        parts.append(
            f"### {what}, own cost\n\nThe time beyond the frozen layer, relative to that of PEFT LoRA.\n\n"
            f"{table(['', 'clock', *names], cells)}"
        )
    return parts
