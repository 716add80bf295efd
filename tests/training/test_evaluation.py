"""Held-out means over tokens, independent of batches and processes; the end of a run that diverges."""

import json
import re
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from processes import finished, pair
from safetensors.torch import load_file
from tiny_training import adapter, settings, write

from multilora_fast.training.checkpoint import STATE
from multilora_fast.training.run import run
from multilora_fast.training.trainer import CountingTrainer, by_row, by_token

ROWS = [
    {"prompt": f"the sky is w{i} ?", "completion": " ".join(["blue", "green", "red"][i % 3 :] * (i % 7 + 1))}
    for i in range(25)
]
SEVERAL = pytest.mark.skipif(
    version("transformers").startswith("5.17.") or not torch.distributed.is_gloo_available(),
    reason="transformers 5.17 fails on several CPU processes, and others need gloo",
)


@pytest.fixture
def rows(tmp_path):
    return (write(tmp_path / "sky.jsonl", ROWS),)


def held_out(state: dict, step: int) -> dict[str, float]:
    [log] = [log for log in state["log_history"] if "eval_sky_loss" in log and log["step"] == step]
    return {name: log[f"eval_sky_{name}"] for name in ("loss", "accuracy")}


def test_no_batch_size_shows_in_what_is_held_out(model, rows, tmp_path):
    trainer = run(settings(model, rows, tmp_path / "out", max_steps=3, eval_fraction=0.4))
    assert len({len(row["input_ids"]) for row in trainer.eval_dataset["sky"]}) > 3
    losses, hits = [], []
    for row in trainer.eval_dataset["sky"]:
        logits = trainer.model(torch.tensor([row["input_ids"]])).logits.detach()[0, :-1].double()
        for scores, label in zip(logits, row["labels"][1:], strict=True):
            if label >= 0:
                losses.append(-float(scores.log_softmax(-1)[label]))
                hits.append(int(scores.argmax()) == label)
    for size in (1, 3, 8):
        trainer.args.per_device_eval_batch_size = size
        found = trainer.evaluate(trainer.eval_dataset["sky"], metric_key_prefix="eval")
        assert found["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)
        assert found["eval_accuracy"] == pytest.approx(sum(hits) / len(hits), abs=1e-6)


@SEVERAL
def test_two_processes_learn_and_evaluate_as_one(model, rows, tmp_path):
    options = {"max_steps": 2, "save_steps": 2, "eval_fraction": 0.4}  # of 25 rows, 10, in batches of 3
    one = settings(model, rows, tmp_path / "one", batch_size=6, **options)
    two = settings(model, rows, tmp_path / "two", batch_size=3, **options)
    processes = pair(two)
    run(one)
    assert [finished(process) for process in processes] == [0, 0]
    states = [json.loads((settings.output / STATE).read_text()) for settings in (one, two)]
    for step in (0, 2):
        assert held_out(states[1], step) == pytest.approx(held_out(states[0], step), abs=1e-6)
    for name, tensor in adapter(one.output).items():
        torch.testing.assert_close(adapter(two.output)[name], tensor, rtol=0, atol=1e-5)


def test_means_are_over_tokens():
    logits = torch.randn(2, 4, 5)
    labels = torch.tensor([[0, 1, 2, 3], [0, -100, -100, 4]])
    sums = by_row(logits, labels)
    log = logits.double().log_softmax(-1)
    losses = [-log[0, 0, 1], -log[0, 1, 2], -log[0, 2, 3], -log[1, 2, 4]]
    found = by_token(SimpleNamespace(predictions=sums.numpy()))
    assert found["loss"] == pytest.approx(float(sum(losses) / 4), abs=1e-12)
    assert sums[:, 2].tolist() == [3, 1]


def is_finite(folder) -> bool:
    tensors = [tensor for path in folder.rglob("*.safetensors") for tensor in load_file(path).values()]
    for path in folder.rglob("optimizer.pt"):
        states = torch.load(path, weights_only=True)["state"].values()
        tensors += [tensor for state in states for tensor in state.values()]
    assert tensors
    logs = [json.loads(path.read_text()) for path in folder.rglob(STATE)]
    return all(tensor.isfinite().all() for tensor in tensors) and "NaN" not in json.dumps(logs)


def test_a_run_that_diverges_ends_and_keeps_what_is_good(model, data, tmp_path, command, capsys):
    out = tmp_path / "out"
    words = ["--model", model, "--output", out, data[0], "--dtype", "float32", "--r", 4, "--max-steps", 30]
    assert command(*words, "--learning-rate", 1e37, "--save-steps", 1, "--eval-fraction", 0) == 2
    shown = capsys.readouterr()
    assert re.search("at step 2 of 30 .*checkpoint-1 is kept.*--learning-rate", shown.err.splitlines()[-1])
    assert "The adapter is in" not in shown.out
    assert {path.name for path in out.iterdir()} == {"train.json", "checkpoint-1"}
    assert is_finite(out)


def test_each_loss_and_each_weight_counts(model, rows, tmp_path):
    trainer = run(settings(model, rows, tmp_path / "out", max_steps=1, save_steps=1))
    trainer.check_step()
    for name, value in (("loss", float("nan")), ("eval_sky_loss", float("inf"))):
        with pytest.raises(ValueError, match=f"at step 1 of 1 {name} .*checkpoint-1"):
            trainer.log({"epoch": 1.0, name: value})
    trainer.losses = torch.tensor(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        trainer.check_step()
    trainer.check_step()
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    for weight in (weights[0], weights[-1]):
        before = weight.detach().clone()
        weight.data.view(-1)[-1] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            trainer.check_step()
        weight.data.copy_(before)
    assert isinstance(trainer, CountingTrainer)
