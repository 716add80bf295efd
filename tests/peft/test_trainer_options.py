"""What trainers ask of LoRA, as a MultiLoraConfig, and what they ask of that."""

import pytest
from peft import LoraConfig
from tiny import ATTENTION

from multilora_fast.integrations import as_multilora
from multilora_fast.peft import MultiLoraConfig


def test_options_that_both_have_are_taken_over():
    lora = LoraConfig(
        r=4, lora_alpha=12, lora_dropout=0.1, target_modules=ATTENTION, exclude_modules="k_proj", task_type="CAUSAL_LM",
        rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}, layers_to_transform=[1], layers_pattern="layers",
        modules_to_save=["lm_head"], target_parameters=["experts.down_proj"],
    )  # fmt: skip
    found = as_multilora(lora, lora_num=5, scaling="scalar")
    assert found == MultiLoraConfig(
        r=4, lora_alpha=12, lora_dropout=0.1, target_modules=ATTENTION, exclude_modules="k_proj", task_type="CAUSAL_LM",
        rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}, layers_to_transform=[1], layers_pattern="layers",
        modules_to_save=["lm_head"], target_parameters=["experts.down_proj"], lora_num=5, scaling="scalar",
    )  # fmt: skip


def test_what_trainers_leave_empty():
    empty = {"lora_dropout": None, "fan_in_fan_out": None, "target_parameters": [], "layers_pattern": None}
    assert as_multilora(LoraConfig(r=4, lora_alpha=None, **empty)) == MultiLoraConfig(r=4)


@pytest.mark.parametrize(
    "asked",
    [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}],
    ids=str,
)
def test_options_of_lora_alone_are_refused(asked):
    with pytest.raises(ValueError, match=f"{next(iter(asked))}=.* is LoRA's alone"):
        as_multilora(LoraConfig(**asked))


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="lora_nums is no field of MultiLoraConfig"):
        as_multilora(LoraConfig(), lora_nums=3)


def test_what_trainers_ask_of_a_config_is_there_and_is_not_saved():
    config = MultiLoraConfig()
    assert not any((config.use_dora, config.use_rslora, config.lora_bias))
    assert not {"use_dora", "use_rslora", "lora_bias"} & config.to_dict().keys()
