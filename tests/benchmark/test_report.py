"""Tables from a GPU's JSON, and the folders that have them."""

import json

from bench import report
from multilora_fast.benchmark.layer import FROZEN, LORA, OURS, REFERENCE

MACHINE = {"device": "a GPU", "threads": 2, "versions": {"torch": "2.11"}, "commit": "abc"}
MEDIAN = {FROZEN: 1e-3, REFERENCE: 4e-3, LORA: 2e-3, OURS: 1.5e-3}
DEVICE = {FROZEN: 0.7e-3, LORA: 1.1e-3, OURS: 0.9e-3}


def write(folder, name, rows):
    benchmarks = [{"extra_info": row, "stats": {"median": row.get("median", {OURS: 1e-3})[OURS]}} for row in rows]
    (folder / f"{name}.json").write_text(json.dumps({"machine_info": MACHINE, "benchmarks": benchmarks}))


def layer(M, p, **more):
    settings = {"M": M, "K": 64, "N": 48, "n": 3, "r": 32, "dropout": p, "dtype": "bfloat16"}
    return {
        "settings": {**settings, "direction": "forward+backward"}, "median": MEDIAN,
        "work": {"flops": 1e9, "floor_by_frozen_layer": 0.8e-3}, "ratios": {"alone / shared": 1.25}, **more,
    }  # fmt: skip


def step(batch, p, median=MEDIAN, **more):
    settings = {"model": "LLaMA-7B, 4 layers", "batch": batch, "length": 1024, "n": 3, "r": 32}
    memory = {name: {"saved": 2**20, "peak": 2**21} for name in median}
    return {
        "settings": {**settings, "dropout": p, "dtype": "torch.bfloat16"},
        "median": median,
        "memory": memory,
        **more,
    }


def test_device_host_and_own_cost_have_tables_of_their_own(tmp_path):
    own = {"wall clock": {OURS: 0.5, REFERENCE: 3.0}, "device": {OURS: 0.51}}
    rows = [layer(8192, 0.0, device=DEVICE, host={OURS: 2e-4}, **{"own cost": own}), layer(1024, 0.05)]
    write(tmp_path, "layer", rows)
    write(tmp_path, "step", [step(8, 0.05, device=DEVICE, **{"own cost": own}), step(1, 0.05)])
    text = "\n\n".join(report.report(tmp_path).values())
    assert "### forward+backward, us: GPU time" in text
    assert "| 8192 tokens, 64→48, n = 3, bfloat16, dropout 0 | 700 | 1,100 | 900 |" in text
    assert "host time to enqueue 16 tokens" in text
    assert "| 8192 tokens, 64→48, n = 3, bfloat16, dropout 0 | device | 0.51 |  |" in text
    assert "| ours | 8 x 1024 | 0.05 | 1.5 | 0.75x |" in text
    assert "one method in memory at a time" in text
    assert (tmp_path / "layer.png").exists()


def test_a_group_names_its_rows_and_a_product_its_device_time(tmp_path):
    write(
        tmp_path,
        "group",
        [{**layer(8192, 0.0, device=DEVICE), "settings": {**layer(8192, 0.0)["settings"], "N": [48, 16]}}],
    )
    settings = {"use": "expand forward", "M": 64, "D": 32, "n": 3, "r": 32, "dropout": 0.0, "dtype": "bfloat16"}
    row = {"settings": settings, "device_seconds": 5e-6, "GB/s": 1.0, "TFLOP/s": 2.0, "share_of_floor": 0.5}
    write(tmp_path, "ops", [row])
    sections = report.report(tmp_path)
    assert "| 64→48, 16, n = 3, bfloat16, dropout 0 | 1.00 | 4.00 | 2.00 | 1.50 | 1.25x |" in sections["group"]
    assert "| expand forward | 64 | 3 | 0 | 0.005 | 1.0 | 2.000 | 50 % |" in sections["ops"]
    assert "exceed L2" in sections["ops"]


def test_the_headline_is_of_the_largest_step_of_each_device_and_of_what_fits(tmp_path):
    small = {**MEDIAN, OURS: 9e-3}
    large = {name: seconds for name, seconds in MEDIAN.items() if name != REFERENCE}
    first, second = tmp_path / "one", tmp_path / "two"
    first.mkdir()
    second.mkdir()
    write(first, "step", [step(8, 0.05, large), step(8, 0.0, large), step(1, 0.05, small), step(1, 0.0, small)])
    write(second, "step", [step(1, 0.0)])
    text = report.headline([first])
    assert f"| a GPU | {OURS} | 0.75x | 1.00x | 0.75x | 1.00x |" in text
    assert f"| a GPU | {REFERENCE} | - | - | - | - |" in text
    assert "8 x 1024 tokens" in text
    assert f"| a GPU | {REFERENCE} | 2.00x | 1.00x |\n" in report.headline([second])


def test_a_folder_without_a_table_is_left_alone(tmp_path):
    (tmp_path / "H100" / "prototype").mkdir(parents=True)
    (tmp_path / "H100" / "prototype" / "layer.json").write_text("{}")
    (tmp_path / "H200").mkdir()
    write(tmp_path / "H200", "step", [step(1, 0.0)])
    assert report.reported(tmp_path) == [tmp_path / "H200"]
    assert not [path for path in report.reported(report.RESULTS) if "prototype" in path.parts]
