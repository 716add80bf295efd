"""``multilora-fast bench``: what it counts and prints, and that it times no wrong result."""

import json
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from multilora_fast.benchmark import layer as layer_bench
from multilora_fast.benchmark.timing import Timed, interleaved
from multilora_fast.cli import app

SIZES = "--tokens 64 --in-features 32 --out-features 48 --lora-num 5 --r 4 --dtype float32 --device cpu --rounds 3"


def run(words: str) -> str:
    result = CliRunner().invoke(app, ["bench", *words.split()], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("p", [0.0, 0.05])
def test_the_document_holds_settings_and_costs(p):
    found = json.loads(run(f"{SIZES} --lora-dropout {p} --json"))
    layer, costs = found["layer"], found["costs"]
    assert (layer["tokens"], layer["in_features"], layer["out_features"]) == (64, 32, 48)
    assert (layer["lora_num"], layer["r"], layer["dtype"], layer["backend"]) == (5, 4, "float32", "torch")
    assert found["environment"]["versions"]["torch"] == version("torch")
    assert list(costs) == ["frozen base layer", "reference loop", "PEFT LoRA", "ours"]
    assert all(set(cost["seconds"]) == {"forward", "backward", "forward+backward"} for cost in costs.values())
    assert all(second > 0 for cost in costs.values() for second in cost["seconds"].values())
    x, H, seed, y = 64 * 32 * 4, 64 * 20 * 4, 8, 64 * 48 * 4
    saved = {name: cost["saved"] for name, cost in costs.items()}
    assert saved["frozen base layer"] == 0
    assert saved["ours"] == x + H + (seed if p else 0)
    assert saved["PEFT LoRA"] == x + H + (x if p else 0)  # the mask; on a CPU in x's dtype
    assert saved["reference loop"] > 5 * y
    assert all(cost["peak"] > cost["saved"] for cost in costs.values())


def test_the_table_compares_with_lora():
    shown = run(SIZES)
    assert "nn.Linear(32, 48) in float32, 64 tokens; 5 branches of rank 4, LoRA of rank 20, dropout 0" in shown
    row = next(line for line in shown.splitlines() if line.startswith("PEFT LoRA"))
    assert row.count("(1.00x)") == 5


def test_nothing_is_timed_whose_result_is_wrong(monkeypatch):
    right = layer_bench.multilora_linear
    monkeypatch.setattr(layer_bench, "multilora_linear", lambda *args, **kwargs: 1.001 * right(*args, **kwargs))
    monkeypatch.setattr(layer_bench, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="error beyond the 2x rule"):
        run(SIZES)


def test_candidates_are_interleaved():
    said = []
    timed = {name: Timed(lambda name=name: f"{name} ready", said.append) for name in "ab"}
    seconds = interleaved(timed, range(3))
    assert said == ["a ready", "b ready"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
