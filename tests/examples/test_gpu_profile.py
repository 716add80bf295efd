"""The GPU profile of examples/multitask at toy size on a CPU: prepared folder, bins, workers, runs of every kind."""

import dataclasses
import gzip
import json
import random
import re
import shutil
import sys

import pytest
import torch
from tiny import llama
from tiny_tasks import made_up
from tiny_training import make_tokenizer

from examples.multitask import __main__ as command
from examples.multitask import methods, prepare, schedule
from examples.multitask.batches import batches, loss, tokens
from examples.multitask.data import drawn
from examples.multitask.execute import Bench, read_results
from examples.multitask.page import report
from examples.multitask.plan import ALONE, METHODS, next_run, quick
from examples.multitask.power import Spread, items_needed, power, spread
from examples.multitask.profile import COUNTED, gpu
from examples.multitask.significance import crossed, t_p
from multilora_fast.adapters.branches import collect
from multilora_fast.demo.scoring import Encoded
from multilora_fast.demo.training import pack

STUDY = dataclasses.replace(
    quick(gpu("float32")), steps=2, micro_tokens=40, total_rank=6, ranks={"lora-160": 10, "multilora-5": 10}
)
PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("prepared")
    llama().save_pretrained(made / "tiny")
    tasks = [made_up(ALONE, (" red", " green", " blue"), 0), made_up("thing", (" sky", " grass"), 10)]
    prepare.prepare(made / "folder", made / "tiny", tasks, STUDY, make_tokenizer())
    return made / "folder"


@pytest.fixture
def bench(folder) -> Bench:
    base = methods.prepared(llama().requires_grad_(False))
    return Bench(base, None, prepare.read(folder, STUDY), "tiny")


def test_the_profile_runs_from_end_to_end_and_resumes(bench, tmp_path):
    runs = tmp_path / "runs"
    schedule.run_missing(runs, STUDY, bench, {}, limit=3)
    done = read_results(runs, STUDY)
    assert len(done) == 3
    schedule.run_missing(runs, STUDY, bench, done)
    assert next_run(STUDY, done) is None
    assert done == read_results(runs, STUDY)
    trained = [record for record in done.values() if "losses" in record]
    assert {record["method"] for record in trained} == set(STUDY.rates)
    for record in trained:
        assert ("test" in record) == (record["seed"] >= 1)  # the sweep sees no test item
        task = METHODS[record["method"]].task
        assert set(record["validation"]) == ({task} if task else {ALONE, "thing"})
    pytest.importorskip("matplotlib")
    summary = report(tmp_path, STUDY, done)
    pairs = {
        "multilora-3 - lora",
        "multilora-5 - lora-160",
        "multilora-3-alone - lora-alone",
        "multilora-3-zero - multilora-3",
    }
    assert pairs <= summary["pairs"].keys()
    assert any("single task" in claim["claim"] for claim in summary["claims"])
    assert (tmp_path / "spectrum.png").exists()


@pytest.fixture
def threads():
    """Puts back the number of threads, which the command sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_workers_run_side_by_side_and_leave_the_same_records(folder, tmp_path, monkeypatch, capsys, threads):
    records, said = [], []
    for workers in (1, 2):
        words = f"--profile gpu --prepared {folder} --quick --device cpu --threads 1 --max-runs 2 --workers {workers}"
        monkeypatch.setattr(sys, "argv", ["multitask", *words.split(), "--output", str(tmp_path / str(workers))])
        command.main()
        records.append({path.name: json.loads(path.read_text()) for path in (tmp_path / f"{workers}/runs").iterdir()})
        said.append(re.findall(r"^[\d:]+  \S+( \.\.\.)?", capsys.readouterr().out, re.M))
    assert [bool(begun) for begun in said[0]] == [True, False] * 2
    assert [bool(begun) for begun in said[1]] == [True, True, False, False]
    assert len(records[0]) == 2
    assert records[0].keys() == records[1].keys()
    for name, one in records[0].items():
        for key in {"tokens", "validation", "losses"} & one.keys():
            assert records[1][name][key] == one[key]


def test_a_prepared_folder_keeps_its_parts_apart(folder, bench):
    for name in bench.items.train:
        parts = [{tuple(row.prompt) for row in getattr(bench.items, part)[name]} for part in PARTS]
        assert all(parts)
        assert sum(map(len, parts)) == len(set().union(*parts))
    counts = json.loads((folder / "prepared.json").read_text())["tasks"]["thing"]
    assert counts["test"] == len(bench.items.test["thing"])
    with pytest.raises(ValueError, match="folder"):
        prepare.prepare(folder, folder / "model", [], STUDY, None)


def test_a_test_item_in_training_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    held_out = gzip.decompress((folder / "test/thing.jsonl.gz").read_bytes()).splitlines(keepends=True)
    with gzip.open(tmp_path / "copy/train/thing.jsonl.gz", "ab") as rows:
        rows.write(held_out[0])
    with pytest.raises(ValueError, match=r"--prepared .*thing"):
        prepare.read(tmp_path / "copy", STUDY)


def test_bins_have_the_gradients_of_one_packed_row(bench):
    examples = drawn(bench.items, STUDY, None, 0)[:7]
    assert len(list(batches(examples, 20, 20))) > 1
    model = llama(torch.float64)
    model.config.use_cache = False  # with a cache, transformers does not keep packed rows apart
    model.zero_grad()
    expected = model(**pack(examples)).loss
    expected.backward()
    wanted = [expected, *(p.grad for p in model.parameters())]
    for limit, length in ((None, 20), (20, 20), (40, 20), (400, 20)):
        model.zero_grad()
        found = sum(loss(model, batch) for batch in batches(examples, limit, length))
        found.backward()
        torch.testing.assert_close([found, *(p.grad for p in model.parameters())], wanted)
    assert tokens(examples) == pack(examples)["input_ids"].numel()


def test_padding_stays_below_a_quarter():
    rng = random.Random(0)
    for _ in range(5):  # steps of 64 examples, most of them short: of 12 to 400 tokens
        sizes = [int(rng.lognormvariate(3.9, 0.8)) % 390 + 12 for _ in range(64)]
        examples = [Encoded("t", [1] * size, [[2, 3], [4]], 0) for size in sizes]
        made = list(batches(examples, 16_384, 512))
        assert all(batch["ids"].numel() <= 16_384 for batch in made)
        assert sum(batch["ids"].numel() for batch in made) < 1.25 * tokens(examples)


def test_scales_and_starts(bench):
    ids = torch.arange(12)[None]
    for name in ("multilora-3", "multilora-3-scalar", "multilora-3-zero", "multilora-3-scalar-zero"):
        model = methods.adapted(bench.base, name, 6)
        torch.testing.assert_close(model(ids).logits, bench.base(ids).logits)
        layer = next(iter(collect(model).values()))
        assert layer.lora_scaling.shape[1] == (1 if "scalar" in name else layer.lora_B.shape[1])
        model(ids, labels=ids).loss.backward()
        learned = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        assert {n.rpartition(".")[2] for n in learned} == {"lora_B" if name.endswith("zero") else "lora_scaling"}


def test_spread_and_power():
    assert [round(t_p(t, f), 3) for t, f in ((2.776, 4), (4.303, 2), (1.96, 1e6))] == [0.05, 0.05, 0.05]
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    many = {str(t): 0.1 * normal(400, 1) + 0.2 * normal(1, 400) + 0.3 * normal(400, 400) for t in range(4)}
    found = spread([many], 1000.0)
    assert [found.seed, found.item, found.rest] == pytest.approx([0.01 / 4, 0.04, 0.09], rel=0.2)
    few = {task: d[:5] for task, d in many.items()}
    assert crossed(few).p(0.0) == 1.0
    assert found.at(4000.0).seed == pytest.approx(found.seed / 4)
    quiet = Spread(0.0, 0.04, 0.16, 1.0)
    assert power(quiet, 5, COUNTED, 0.0) < 0.04  # half of the level lies on the other side
    assert power(quiet, 5, COUNTED, 0.02) > 0.99
    needed = items_needed(quiet, 5, 8)
    assert power(quiet, 5, [needed] * 8) >= 0.8 > power(quiet, 5, [needed // 2] * 8)
