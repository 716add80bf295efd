"""Experts trained by other people's trainers, beside PEFT's LoRA on the same parameters; what is saved, and resumed."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_moe import BOTH, logits, moe
from tiny_training import ROWS, arguments, losses, make_tokenizer, trained

from multilora_fast import MultiLoraConfig, export_lora
from multilora_fast.peft.experts import MultiLoraProjection

TARGETS = {"target_modules": ["q_proj"], "target_parameters": BOTH}


def config(**options) -> MultiLoraConfig:
    return MultiLoraConfig(**{"r": 8, "lora_num": 3, "task_type": "CAUSAL_LM", **TARGETS, **options})


def adapted(**options):
    torch.manual_seed(1)
    return get_peft_model(moe(), config(**options))


def adapters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "multilora" in name}


def assert_learned(found: torch.Tensor) -> None:
    print(f"losses {found[0]:.4f} -> {found[-1]:.4f}")
    assert found[-1] < 0.95 * found[0]


def test_the_trainer_trains_experts_beside_lora(tmp_path):
    model = adapted()
    before = {name: p.clone() for name, p in adapters(model).items()}
    ours = trained(model, tmp_path)
    lora = get_peft_model(moe(), LoraConfig(r=12, lora_alpha=12, **TARGETS))
    theirs = trained(lora, tmp_path)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)  # both start as the base
    assert_learned(ours)
    assert_learned(theirs)
    for name, p in adapters(model).items():
        assert not torch.equal(p, before[name]), name
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(moe(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert (logits(loaded) - logits(moe())).abs().max() > 0.1
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    try:
        exported = PeftModel.from_pretrained(moe(), tmp_path / "lora")
    except TypeError as error:  # its version and transformers' do not fit together
        pytest.skip(f"PEFT cannot load a LoRA on a MoE model: {error}")
    assert (logits(exported) - logits(model)).abs().max() <= 5e-6 * logits(model).abs().max()


def test_a_resumed_run_has_the_same_losses(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    whole, again = adapted(lora_dropout=0.2), adapted(lora_dropout=0.2)
    wanted = trained(whole, tmp_path, **options)
    resumed = trained(again, tmp_path / "again", resume=str(tmp_path / "checkpoint-3"), **options)
    assert torch.equal(resumed, wanted)
    for name, p in adapters(whole).items():
        assert torch.equal(adapters(again)[name], p), name


def test_trl_trains_experts(tmp_path):
    trl = pytest.importorskip("trl", reason="needs trl")
    from datasets import Dataset

    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in ROWS])
    settings = trl.SFTConfig(**arguments(tmp_path, bf16=False, gradient_checkpointing=True), shuffle_dataset=False)
    torch.manual_seed(1)
    trainer = trl.SFTTrainer(
        moe(), args=settings, train_dataset=data, processing_class=make_tokenizer(), peft_config=config()
    )
    assert_learned(losses(trainer))
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(moe(), tmp_path / "adapter")
    assert sum(isinstance(module, MultiLoraProjection) for module in loaded.modules()) == 4
    assert torch.equal(logits(loaded), logits(trainer.model))
