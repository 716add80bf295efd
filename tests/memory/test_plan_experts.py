"""Plans of adapters on experts, against the tensors alive in real steps."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.causal_lms import config
from bench.plan_models import beyond, measure
from multilora_fast import plan_memory
from multilora_fast.memory.methods import LORA, OURS, REFERENCE, adapt

TARGETS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
BRANCHES = {"r": 8, "lora_num": 3, **TARGETS}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", [LORA, OURS])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_within_one_per_cent(kind, method, checkpointing):
    plan = plan_memory(
        config(kind), batch=2, seq_len=64, dtype="float32", device="cpu", checkpointing=checkpointing, **BRANCHES
    )
    model = AutoModelForCausalLM.from_config(config(kind), dtype=torch.float32)
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    real = measure(adapt(model, method, "all-linear", **BRANCHES).train(), 2, 64, "cpu")
    assert abs(beyond(plan[method]) / real - 1) <= 0.01


def test_what_has_no_experts_says_so():
    plan = plan_memory(
        config("mixtral"), batch=1, seq_len=16, dtype="float32", device="cpu", lora_dropout=0.1, **BRANCHES
    )
    assert "lora_dropout" in plan.refused[LORA]
    assert "experts" in plan.refused[REFERENCE]
    assert plan[OURS].peak
