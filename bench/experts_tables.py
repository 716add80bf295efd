"""The experts' tables, from the JSON of test_experts.py and of ``python -m bench.memory --experts``."""

import json
from pathlib import Path

from bench.tables import benches, clock_tables, conditions_line, milliseconds, table


def memory_text(found: list[dict]) -> str:
    header = ["one layer's experts, R", "", "saved per token, KiB", "saved, constant, MiB", "peak, GiB"]
    body = [
        [
            f"{row['size']}, {row['R']}", row["name"], f"{row['per_token'] / 2**10:.1f}",
            f"{row['constant'] / 2**20:,.0f}", f"{row['peak'] / 2**30:.2f}",
        ]
        for row in found
    ]  # fmt: skip
    return table(header, body)


def memory_section(path: Path) -> str:
    document = json.loads(path.read_text())
    found = document["rows"]
    note = (
        f"Bytes saved for backward, and the peak over forward and backward of {found[0]['tokens']} tokens, without "
        f"parameters, x and dy; n = {found[0]['n']}, {found[0]['dtype']}, no dropout, counted on meta "
        f"storage. {conditions_line(document['conditions'])}"
    )
    return f"## Memory of experts\n\n{note}\n\n{memory_text(found)}"


def time_section(path: Path) -> str:
    """The section made from the JSON of test_experts.py."""
    machine, found = benches(path)
    names = list(dict.fromkeys(name for row in found for name in row["median"]))

    def case(row: dict) -> str:
        s = row["settings"]
        return f"{s['tokens']} tokens, {s['E']} experts {s['H']}→{s['I']}, {s['dtype']}, dropout {s['dropout']:g}"

    body = [
        [
            case(row), *(milliseconds(row["median"][name]) if name in row["median"] else "" for name in names),
            f"{row['ratios']['ours / PEFT LoRA']:.2f}x",
        ]
        for row in found
    ]  # fmt: skip
    s = found[0]["settings"]
    note = (
        f"One layer's experts, {s['k']} per token, n = {s['n']} and total rank {s['R']}; forward + backward, "
        f"ms; medians of interleaved rounds. PEFT's LoRA on parameters has no dropout and runs without. "
        f"{conditions_line(machine)}"
    )
    first = f"## Time of experts\n\n{note}\n\n{table(['', *names, 'ours / LoRA'], body)}"
    return "\n\n".join([first, *clock_tables(found, case, "experts, forward + backward")])
