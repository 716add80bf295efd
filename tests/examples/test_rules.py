"""Rules of examples/multitask: learning rates, significance, verdicts."""

import itertools

import pytest
import torch

from examples.multitask.claims import FAILS, HOLDS, NOT_SHOWN, claims, close, gain
from examples.multitask.plan import Run, Study, chosen, next_run, sweep
from examples.multitask.significance import compare, sign_flip_p


def scored(validation: float, test: float, nll: float = 1.0) -> dict:
    return {"validation": {"a": {"accuracy": validation, "nll": nll}}, "test": {"a": {"accuracy": test, "nll": nll}}}


def test_the_learning_rate_is_chosen_on_validation_items():
    study = Study(rates={"lora": (1e-4, 1e-3, 1e-2)})
    names = [Run("lora", rate).name for rate in (1e-4, 1e-3, 1e-2, 1e-1)]
    assert chosen(study, "lora", {}) is None
    done = dict(zip(names, [scored(0.5, 0.9), scored(0.6, 0.1), scored(0.4, 0.8)], strict=False))
    assert chosen(study, "lora", done) == 1e-3
    assert sweep(study, "lora", done) == [1e-4, 1e-3, 1e-2]
    tie = dict(zip(names, [scored(0.6, 0.9, nll=2.0), scored(0.6, 0.1), scored(0.4, 0.8)], strict=False))
    assert chosen(study, "lora", tie) == 1e-3
    edge = dict(zip(names, [scored(0.5, 0.9), scored(0.6, 0.1), scored(0.7, 0.1)], strict=False))
    assert sweep(study, "lora", edge) == [1e-4, 1e-3, 1e-2, 1e-1]
    assert next_run(study, {"zero-shot": {}, **edge}).name == names[3]
    assert chosen(study, "lora", edge | {names[3]: scored(0.1, 0.9)}) == 1e-2
    assert len(sweep(study, "lora", edge | {names[3]: scored(0.9, 0.9)})) == 4


def test_the_test_of_significance():
    same = {"a": torch.tensor([[1, 0, 1, 1]]), "b": torch.tensor([[0, 1]])}
    assert compare(same, same)["p"] == 1.0
    assert compare(same, same)["difference"] == 0.0
    better = {"a": torch.ones(2, 40), "b": torch.ones(2, 10)}
    worse = {"a": torch.tensor([[0, 1] * 20] * 2), "b": torch.ones(2, 10)}
    found = compare(better, worse)
    assert found["difference"] == pytest.approx(0.25)  # tasks count the same
    assert found["p"] < 0.001
    assert 0 < found["low"] < 0.25 < found["high"]
    assert compare(worse, better)["difference"] == -found["difference"]


def test_p_is_that_of_all_signs():
    differences = torch.tensor([0.5, -0.2, 0.4, 0.1, 0.3])
    total = differences.sum().abs()
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5)))
    exact = ((signs @ differences).abs() >= total - 1e-6).double().mean().item()
    assert sign_flip_p(differences, draws=50_000) == pytest.approx(exact, abs=0.01)


def test_verdicts():
    assert [gain(0.1, 0.01), gain(0.1, 0.2), gain(0.0, 1.0), gain(-0.1, 0.01)] == [HOLDS, NOT_SHOWN, FAILS, FAILS]
    assert [close(-0.01, 0.2), close(-0.05, 0.2), close(-0.3, -0.1)] == [HOLDS, NOT_SHOWN, FAILS]
    pair = {"difference": -0.02, "low": -0.05, "high": 0.01, "p": 0.2}
    found = claims({"pairs": {"multilora-3 - lora": pair}, "spectrum_pairs": {}}, Study())
    assert [(c["verdict"], c["figures"]) for c in found] == [(FAILS, "-0.020 [-0.050, +0.010], p = 0.2")]
