"""Captured training steps of the study: without a GPU the buffers, on one the graphs."""

import dataclasses

import pytest
import torch
from tiny import llama

from examples.multitask import methods
from examples.multitask.plan import quick
from examples.multitask.profile import gpu
from examples.multitask.steps import CannotCapture, Steps
from multilora_fast.demo.scoring import Encoded

STUDY = dataclasses.replace(quick(gpu("float32")), total_rank=6, micro_tokens=512, max_length=64, batch_size=6)


def examples(count: int) -> list[Encoded]:
    """Steps of 2 and of 4 bins, in turn."""
    rows = []
    for i in range(count):
        size = 9 + i % 5 if i // STUDY.batch_size % 2 else 33 + i % 7
        rows.append(Encoded("t", [(7 * i + k) % 60 + 1 for k in range(size)], [[3 + i % 9, 5], [4]], 0))
    return rows


def trained(method: str, study=STUDY, device="cpu", **options) -> tuple[methods.Training, list[torch.Tensor]]:
    torch.manual_seed(0)
    base = methods.prepared(llama().requires_grad_(False).to(device))
    torch.manual_seed(1)
    model = methods.adapted(base, method, study.total_rank)
    done = methods.train(model, examples(60), study, 1e-2, **options)
    return done, [p.detach().cpu() for p in model.parameters() if p.requires_grad]


def test_a_replay_works_on_its_own_buffers(monkeypatch):
    shapes = []

    def capture(self, batch):
        shapes.append(batch["ids"].shape)
        return lambda: self._step([batch])

    plain, weights = trained("multilora-3")
    assert plain.losses[-1] < plain.losses[0]
    assert plain.replayed == 0
    monkeypatch.setattr(Steps, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.optim.AdamW, "step", _with_a_number(torch.optim.AdamW.step))
    again, others = trained("multilora-3", graphs=True)
    assert again.losses == pytest.approx(plain.losses, rel=1e-5)  # the rates are rounded to float32
    assert again.tokens == plain.tokens
    assert again.replayed == 10 - 2
    assert len(shapes) == len(set(shapes)) == 2
    torch.testing.assert_close(others, weights, rtol=1e-3, atol=1e-5)


def _with_a_number(step):
    """On a CPU, AdamW takes no tensor as its learning rate."""

    def stepped(self, *args):
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = group["lr"].item()
        step(self, *args)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate

    return stepped


def test_the_learning_rate_rises_and_falls(monkeypatch):
    rates, step = [], Steps.__call__
    monkeypatch.setattr(Steps, "__call__", lambda self, batches, rate: rates.append(rate) or step(self, batches, rate))
    trained("lora")
    assert rates == pytest.approx([1e-2, *(1e-2 * left / 9 for left in range(9, 0, -1))])


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora", "multilora-3", "full"])
def test_graphs_learn_what_eager_steps_learn(method):
    for dtype, bound in (("float32", 1e-4), ("bfloat16", 2e-2)):
        study = dataclasses.replace(STUDY, dtype=dtype)
        plain, _ = trained(method, study, "cuda")
        again, _ = trained(method, study, "cuda", graphs=True)
        assert again.replayed == 10 - 2
        torch.testing.assert_close(torch.tensor(again.losses), torch.tensor(plain.losses), rtol=bound, atol=bound)


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_says_so(monkeypatch):
    step = Steps._step

    def waits(self, batches):
        found = step(self, batches)
        found.item()
        return found

    monkeypatch.setattr(Steps, "_step", waits)
    with pytest.raises(CannotCapture, match="--eager"):
        trained("lora", device="cuda", graphs=True)
