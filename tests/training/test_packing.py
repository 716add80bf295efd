"""Packing: whole rows, full bins, and the losses of the rows alone."""

import random
import re

import pytest
import torch
from peft import get_peft_model
from tiny import config, gpt2, llama
from tiny_training import settings, write

from multilora_fast.training.data import collate
from multilora_fast.training.packing import check_bins, flatten, pack
from multilora_fast.training.run import run
from multilora_fast.training.trainer import by_row

SKEWED = [
    {"prompt": f"the sky is w{i} ?", "completion": " ".join(["blue"] * (40 if i % 8 == 0 else i % 5 + 1))}
    for i in range(40)
]


def made(sizes, seed=0):
    rng = random.Random(seed)
    rows = [[rng.randrange(60) for _ in range(size)] for size in sizes]
    return [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in rows]


def size(rows) -> int:
    return sum(len(row["input_ids"]) for row in rows)


def test_bins_hold_every_row_once_and_are_full():
    rng = random.Random(1)
    for _ in range(20):
        rows = made([rng.choice([1, 3, 9, 20, 50]) for _ in range(rng.randint(1, 60))])
        bins = pack(rows, 50)
        assert sorted(id(row) for rows in bins for row in rows) == sorted(map(id, rows))
        assert all(size(rows) <= 50 for rows in bins)
        assert sum(2 * size(rows) <= 50 for rows in bins) <= 1  # two that are half empty would be one
    assert pack([], 50) == []


def adapted_by(attention, base=llama):
    made = base().double()
    made.config.use_cache = False
    made.set_attn_implementation(attention)
    return get_peft_model(made, config(target_modules="all-linear")).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("base", [llama, gpt2])
@torch.no_grad()
def test_the_loss_of_a_bin_is_that_of_its_rows(attention, base):
    adapted = adapted_by(attention, base)
    for rows in pack(made([12, 7, 5, 5, 3, 2, 1, 1]), 20):
        bin = flatten([rows], 0)
        together = by_row(adapted(**bin).logits, bin["labels"]).sum(0)
        alone = sum(
            by_row(adapted(**batch).logits, batch["labels"]).sum(0) for batch in ([collate([r], 0) for r in rows])
        )
        torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    check_bins(adapted, pack(made([12, 7, 5]), 20))


def test_rows_that_see_each_other_are_found():
    adapted = adapted_by("sdpa")
    bins = pack(made([12, 7, 5]), 20)
    adapted.config.use_cache = True  # transformers then ignores restarting positions
    with pytest.raises(ValueError, match="--packing"):
        check_bins(adapted, bins)
    check_bins(adapted, pack(made([12, 17]), 20))  # one row each


def test_a_run_with_packing_learns_the_same_tokens_in_fewer_steps(model, tmp_path, capsys):
    data = (write(tmp_path / "sky.jsonl", SKEWED),)
    options = {"max_steps": None, "save_steps": None, "epochs": 1.0, "batch_size": 2, "max_length": 48}
    packed = run(settings(model, data, tmp_path / "packed", packing=True, **options))
    said = capsys.readouterr().out
    assert re.search(r"^32 examples in 10 bins of 48 tokens, 90% full$", said, re.M)
    assert "steps of 2 bins." in said
    padded = run(settings(model, data, tmp_path / "padded", **options))
    assert packed.state.max_steps < 0.7 * padded.state.max_steps
    assert packed.all_tokens() == padded.all_tokens()
    losses, others = (
        [log["eval_sky_loss"] for log in trainer.state.log_history if "eval_sky_loss" in log]
        for trainer in (packed, padded)
    )
    assert losses[0] == others[0]
    assert losses[-1] < 0.9 * losses[0]


def test_a_model_that_cannot_be_packed_writes_nothing(model, tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("--packing: no")

    monkeypatch.setattr("multilora_fast.training.run.check_bins", refuse)
    with pytest.raises(ValueError, match="--packing: no"):
        run(settings(model, (write(tmp_path / "sky.jsonl", SKEWED),), tmp_path / "out", packing=True))
    assert not (tmp_path / "out").exists()
