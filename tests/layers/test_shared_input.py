"""Layers that read the same x: one shrink and one mask for all of them, and the same training but for rounding."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from tiny import IDS, branches, config, llama, logits, two_adapters
from torch import nn

from multilora_fast.memory import saved_bytes
from multilora_fast.ops import functional


def model_of(dtype=torch.float64, **options):
    model = get_peft_model(llama(dtype), config(target_modules="all-linear", **options), autocast_adapter_dtype=False)
    return model.train()


def gradients(model, **inputs) -> dict[str, torch.Tensor]:
    loss = model(IDS, labels=IDS, **inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


def assert_same(ours: dict, theirs: dict, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert torch.linalg.norm(ours[name] - wanted) <= tolerance * torch.linalg.norm(wanted), name


def twins(one: nn.Module, other: nn.Module) -> None:
    other.load_state_dict(one.state_dict())


@pytest.mark.parametrize(("p", "reentrant"), [(0.0, None), (0.3, False), (0.3, True)])
def test_gradients_are_those_of_layers_alone(p, reentrant, one_seed, served):
    """They agree as far as the model's norms do, which compute in float32."""
    alone, together = (model_of(lora_dropout=p, share_inputs=share) for share in (False, True))
    twins(alone, together)
    for model in (alone, together):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
    wanted = gradients(alone)
    assert not served
    assert_same(gradients(together), wanted, 1e-6)
    assert served == [3, 2] * (4 if reentrant is not None else 2)
    assert set(together.base_model.shared_inputs().values()) == {None}
    assert len(together.base_model.shared_inputs()) == 4


def test_steps_of_training_agree(one_seed):
    models = [model_of(torch.float32, lora_dropout=0.1, share_inputs=share) for share in (False, True)]
    twins(*models)
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        losses.append([])
        for _ in range(8):
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1][-1] < losses[1][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=0)


def test_a_group_draws_one_mask(monkeypatch):
    draws, draw = [], functional._seed_tensor
    monkeypatch.setattr(functional, "_seed_tensor", lambda *a: draws.append(1) or draw(*a))
    model_of(lora_dropout=0.1)(IDS)
    assert len(draws) == 2 * 4  # q k v, o, gate up, down, in two blocks


def test_several_adapters_each_share_their_own(one_seed, served):
    models = []
    for share in (False, True):
        model = two_adapters(share_inputs=share)
        model.base_model.set_adapter(["default", "other"])
        if not share:
            for module in model.modules():
                module.__dict__.pop("shared", None)
        models.append(model.train())
    twins(*models)
    wanted = gradients(models[0])
    assert not served
    assert_same(gradients(models[1]), wanted, 1e-5)
    assert served == [3, 3]  # "other" has one layer of each group


def test_evaluation_and_mixed_batches_do_not_share(served):
    together = get_peft_model(llama(), config(target_modules="all-linear"))
    alone = get_peft_model(llama(), config(target_modules="all-linear", share_inputs=False))
    twins(alone, together)
    assert torch.equal(logits(together), logits(alone))
    assert torch.equal(
        logits(together, adapter_names=["default", "__base__"]), logits(alone, adapter_names=["default", "__base__"])
    )
    assert not served


def test_copies_and_pickles_are_groups_of_their_own(served):
    model = model_of()
    model.model.model.layers[0].self_attn.q_proj(torch.ones(1, 3, 32, dtype=torch.float64))  # H waits for k and v
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        served.clear()
        twin(IDS)
        assert served == [3, 2, 3, 2]
        own = set(map(id, branches(twin)))
        assert all(id(member) in own for b in branches(twin) if b.shared for member in b.shared.members.values())


def test_nothing_waits_after_a_step():
    model = model_of()
    gradients(model)
    assert all(b.shared is None or b.shared._thread.waiting is None for b in branches(model))


def test_autocast(one_seed):
    models = [model_of(torch.float32, share_inputs=share, lora_dropout=0.1) for share in (False, True)]
    twins(*models)
    with torch.autocast("cpu", torch.bfloat16):
        alone, together = (gradients(model) for model in models)
    assert_same(together, alone, 0.05)


def test_saves_no_more_than_layers_alone():
    counts = []
    for share in (False, True):
        model = model_of(torch.float32, share_inputs=share, lora_dropout=0.1)
        with saved_bytes(model.parameters()) as saved:
            model(IDS)
        counts.append(saved.total)
    assert counts[1] <= counts[0]


def test_under_compilation_every_layer_shrinks_alone(served):
    model = model_of(torch.float32)
    layer = model.model.model.layers[0].mlp
    x = torch.randn(1, 5, 32)
    eager = layer(x)
    assert served == [2]
    torch.testing.assert_close(
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x), eager, rtol=1e-4, atol=1e-5
    )
    assert served == [2]
    torch.compiler.reset()
