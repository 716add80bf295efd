"""plan_memory on models of many types against real steps; which are refused; the same modules for all methods."""

import ast
import logging
import os
from pathlib import Path

import pytest
import tiny_plans
import torch
from decoders import DECODERS, MIXTURES, STATE_SPACES
from peft import get_peft_model
from tiny_plans import settings
from torch import distributed as dist
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from bench.causal_lms import TYPES, config
from bench.plan_models import BATCH, LENGTH, beyond, measure, model_of, planned, refusal, sharded_rows
from multilora_fast import MultiLoraConfig, plan_memory
from multilora_fast.memory import cuda
from multilora_fast.memory.measure import AliveBytes
from multilora_fast.memory.methods import FULL, LORA, METHODS, OURS, REFERENCE, adapt
from multilora_fast.memory.step import Step
from multilora_fast.models import LINEARS

H100 = Path(__file__).parents[2] / "bench/results/NVIDIA-H100-80GB/prototype/h100_plan_memory.txt"
SMALL = {"batch": 2, "seq_len": 16, "r": 4, "device": "cpu"}
EXPERTS = {"r": 8, "lora_num": 3, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
DENSE = ("qwen3_next", "deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe")  # whose MLPs PEFT takes for experts
REFUSED = {"jetmoe": ["all"], **{kind: [LORA] for kind in DENSE}}
LISTED = (*DECODERS, *MIXTURES, *STATE_SPACES)
EVERYTHING = os.environ.get("ARCHITECTURES") == "all"
everything = pytest.mark.skipif(not EVERYTHING, reason="run by `make architectures`")


def llama(layers=2, **options) -> LlamaConfig:
    return tiny_plans.config(layers, **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, **options})


@pytest.mark.parametrize("kind", TYPES if EVERYTHING else ["mpt", "jetmoe"])
def test_types_are_planned_or_refused_in_one_sentence(kind, caplog, monkeypatch):
    """And torch logs no traceback."""
    monkeypatch.setattr(logging.getLogger("torch._subclasses.fake_tensor"), "handlers", [caplog.handler])
    said = refusal(kind)
    assert list(said) == REFUSED.get(kind, [])
    for reason in said.values():
        assert reason.endswith((".", "]"))
        assert "\n" not in reason
    if kind == "jetmoe":
        assert said["all"].startswith("model_or_config is a JetMoeConfig, ")
    assert not [record for record in caplog.records if record.name.startswith("torch")]


@everything
@pytest.mark.parametrize("of", LISTED, ids=lambda of: of.name)
def test_the_listed_architectures_are_planned(of):
    """With the targets and exclusions of the list, all but one; without, one that cannot be adapted says so."""
    config = of.build().config
    asked = {**SMALL, "seq_len": 12, "dtype": "float32", "lora_dropout": 0.05}
    for exclude in {tuple(of.exclude or ()), ()}:
        options = {"target_modules": of.targets, "exclude_modules": list(exclude) or None}
        if of.name == "jetmoe":
            with pytest.raises(ValueError, match="model_or_config is a JetMoeConfig"):
                plan_memory(config, **asked, **options)
            continue
        plan = plan_memory(config, **asked, **options)
        assert {FULL, *plan.refused} | {plan.method for plan in plan.methods} == set(METHODS)
        assert OURS not in plan.refused or (of.exclude and not exclude)


def test_the_types_are_those_of_the_list():
    assert {of.name for of in LISTED} <= set(TYPES)


@pytest.mark.parametrize(
    ("kind", "method", "setting"),
    [
        ("gemma2", FULL, ("float32", "float32", 0.0, False)),
        ("llama", FULL, ("bfloat16", "bfloat16", 0.0, True)),
        ("llama", LORA, ("bfloat16", "float32", 0.0, True)),  # operands that a CPU casts
        ("gpt2", LORA, ("bfloat16", "bfloat16", 0.05, False)),
        ("gpt2", REFERENCE, ("bfloat16", "bfloat16", 0.05, True)),
        ("llama", REFERENCE, ("float32", "float32", 0.0, False)),
        ("falcon", OURS, ("float32", "float32", 0.0, False)),  # gradients that add up in place
        ("llama", OURS, ("bfloat16", "float32", 0.05, True)),
        ("mixtral", OURS, ("float32", "float32", 0.0, False)),
    ],
)
def test_the_peak_is_within_one_per_cent(kind, method, setting, only):
    only(method)
    predicted = beyond(planned(kind, *setting)[method])
    assert predicted == pytest.approx(measure(model_of(kind, method, *setting), BATCH, LENGTH, "cpu"), rel=0.01)


@pytest.mark.parametrize(
    ("kind", "method", "checkpointing"),
    [("mixtral", LORA, False), ("mixtral", OURS, True), ("qwen3_moe", LORA, True), ("qwen3_moe", OURS, False)],
)
def test_adapters_on_experts_are_within_one_per_cent(kind, method, checkpointing, only):
    only(method)
    asked = {"batch": 2, "seq_len": 64, "dtype": "float32", "device": "cpu", "checkpointing": checkpointing}
    plan = plan_memory(config(kind), **asked, **EXPERTS)
    model = AutoModelForCausalLM.from_config(config(kind), dtype=torch.float32)
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    real = measure(adapt(model, method, "all-linear", **EXPERTS).train(), 2, 64, "cpu")
    assert beyond(plan[method]) == pytest.approx(real, rel=0.01)


def test_methods_that_cannot_adapt_experts_say_so(only):
    only(LORA, REFERENCE, OURS)
    asked = {"batch": 1, "seq_len": 16, "dtype": "float32", "device": "cpu", "lora_dropout": 0.1}
    plan = plan_memory(config("mixtral"), **asked, **EXPERTS)
    assert "lora_dropout" in plan.refused[LORA]
    assert "experts" in plan.refused[REFERENCE]
    assert plan[OURS].peak


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ["q_proj", "gate_proj"], "rank_pattern": {"k_proj": 2}, "scaling": "scalar"},
        {"layers_to_transform": [1], "lora_num_pattern": {"v_proj": 1}},
        {"target_modules": r".*\.0\..*_proj", "modules_to_save": ["lm_head"]},
    ],
)
def test_options_reach_every_method(options, only):
    """LoRA's adapter is ours without the scales, and so are its gradients."""
    only(LORA, REFERENCE, OURS)
    targets = {"target_modules": "all-linear", **options}
    plan = plan_memory(llama(), adapter_dtype="bfloat16", **SMALL, **targets)
    model = AutoModelForCausalLM.from_config(llama(), dtype=torch.bfloat16)
    model = get_peft_model(model, MultiLoraConfig(r=4, **targets), autocast_adapter_dtype=False)
    trained = {name: p.nbytes for name, p in model.named_parameters() if p.requires_grad}
    scales = sum(size for name, size in trained.items() if name.endswith("lora_scaling"))
    assert plan[OURS].adapter == plan[REFERENCE].adapter == sum(trained.values())
    assert plan[LORA].adapter == plan[OURS].adapter - scales
    assert plan[LORA].gradients == plan[LORA].adapter


def test_experts_are_counted_for_no_adapter_or_for_all(only):
    only(LORA, OURS)
    plan = plan_memory(config("qwen3_moe"), lora_dropout=0.05, adapter_dtype="bfloat16", **SMALL)
    scales = 1 / SMALL["r"]  # of n·N numbers, beside n·r·(K + N)
    assert plan[LORA].gradients < plan[OURS].gradients < (1 + scales) * plan[LORA].gradients


def test_a_method_that_cannot_adapt_the_modules_says_so(only):
    only(LORA, OURS)
    plan = plan_memory(config("deepseek_v3"), lora_dropout=0.05, **SMALL)
    assert list(plan.refused) == [LORA]
    assert f"{LORA} cannot adapt these modules: PEFT turns the names of this model's dense MLPs" in str(plan)
    assert plan.to_dict()["refused"] == plan.refused
    with pytest.raises(ValueError, match="cannot adapt these modules"):
        plan[LORA]


def test_more_tokens_than_positions(only):
    only(OURS)
    small = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="seq_len must be at most 32"):
        plan_memory(small, **{**SMALL, "seq_len": 33})
    with pytest.warns(UserWarning, match="seq_len 33 is beyond the 32 positions"):
        plan = plan_memory(llama(1, max_position_embeddings=32), **{**SMALL, "seq_len": 33})
    assert "seq_len 33 is beyond the 32 positions" in str(plan)


@everything
def test_a_rank_of_two_over_gloo_holds_what_is_planned():
    rows = list(sharded_rows(lambda row: row["model"] != "llama"))
    assert len(rows) == 2 * len(METHODS)
    assert max(abs(row["error"]) for row in rows) <= 0.03


def test_gradients_add_up(only):
    only(FULL)
    asked = ("gpt2", "float32", "float32", 0.0, True)
    once, many = (planned(*asked, gradient_accumulation=k)[FULL] for k in (1, 4))
    assert (many.gradients, many.activations) == (once.gradients, once.activations)
    assert many.peak > once.peak
    model = model_of("gpt2", FULL, *asked[1:])
    assert beyond(many) == pytest.approx(measure(model, BATCH, LENGTH, "cpu", accumulation=3), rel=0.01)


def test_a_rank_of_fsdp_holds_its_shard(only):
    only(FULL, OURS)
    each = {}, {"fsdp": 2}, {"fsdp": 2, "gradient_accumulation": 2}
    one, half, accumulated = (plan_memory(llama(1), adapter_dtype="bfloat16", **SMALL, **options) for options in each)
    for method in (FULL, OURS):
        for kind in ("weights", "adapter", "gradients", "optimizer"):
            whole = getattr(one[method], kind)
            assert whole / 2 <= getattr(half[method], kind) <= 0.7 * whole  # of three branches the first holds two
    assert accumulated[FULL].peak > half[FULL].peak + half[FULL].gradients  # which stay whole until the last backward
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match="give one of fsdp and quantization"):
        plan_memory(llama(), fsdp=2, quantization="4bit", **SMALL)


def test_grouped_queries_have_gradients_of_their_own():
    """Each query head of FlashAttention-2 writes a dk and dv, beside dq in float32, and the three gradients."""
    q, k, v = (torch.empty(1, heads, 8, 16, requires_grad=True) for heads in (4, 2, 2))
    out = cuda.FlashAttention.apply(q, k, v, None)
    alive = AliveBytes([q, k, v, out])
    grad = torch.ones_like(out)
    with alive:
        out.backward(grad)
    size = q.numel() * 4
    assert max(alive.peaks.values()) == size + 2 * size + 2 * size  # dq in float32, own dk and dv, and dq, dk, dv


def test_a_backward_holds_the_mask_as_bits():
    """At its peak, of a model without much else: a bit per element, and the seed, which is kept since the forward."""
    wide = llama(intermediate_size=4096, vocab_size=64)
    asked = {"r": 1, "lora_num": 1, "target_modules": ["down_proj"], "seq_len": 512}
    with_mask, without = (Step(wide, OURS, settings(**asked, lora_dropout=p)).count(4)["backward"] for p in (0.05, 0.0))
    assert with_mask - without == 4 * 512 * 4096 // 8 + 8


def test_windows_keep_a_mask():
    """Attention within a window of fewer tokens than there are needs a mask, and keeps it."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    windows = [
        Qwen2Config(
            **sizes, num_key_value_heads=2, num_hidden_layers=1, use_sliding_window=True, sliding_window=window,
            layer_types=["sliding_attention"],
        )
        for window in (128, 32)
    ]  # fmt: skip
    wide, narrow = (Step(c, FULL, settings()).count(1)["activations"] for c in windows)
    assert narrow - wide >= 64 * 64 * 2


def test_workspaces_of_a_hopper_gpu_are_counted(only, monkeypatch):
    only(OURS)
    options = {**SMALL, "device": "cuda", "target_modules": ["q_proj"]}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    other = plan_memory(llama(1), **options)[OURS]
    monkeypatch.setattr(cuda, "cublas_workspaces", lambda: 64 * 2**20)
    hopper = plan_memory(llama(1), **options)[OURS]
    assert hopper.peak - other.peak == hopper.workspace == 64 * 2**20
    assert other.workspace == plan_memory(llama(1), **{**options, "device": "cpu"})[OURS].workspace == 0


@pytest.mark.parametrize(("capability", "size"), [((9, 0), 64 * 2**20), ((8, 0), 0)])
def test_workspaces_are_those_of_this_machines_gpu(capability, size, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert cuda.cublas_workspaces() == size


@pytest.mark.parametrize(
    ("batch", "p", "checkpointing"),
    [(1, 0.05, False)] + EVERYTHING * [(8, 0.0, False), (8, 0.05, False), (8, 0.05, True)],
)
def test_the_plan_is_what_an_h100_held(batch, p, checkpointing, only, monkeypatch):
    """The allocator's peaks of four layers of LLaMA-7B's size, in MiB."""
    only(LORA, OURS)
    monkeypatch.setattr(cuda, "cublas_workspaces", lambda: 64 * 2**20)
    plan = plan_memory(
        LlamaConfig(num_hidden_layers=4), batch=batch, seq_len=1024, lora_dropout=p, checkpointing=checkpointing,
        adapter_dtype="bfloat16", target_modules=list(LINEARS),
    )  # fmt: skip
    rows = [ast.literal_eval(line) for line in H100.read_text().splitlines()[1:]]
    rows = [row for row in rows if (row["b"], row["p"], row["ck"]) == (batch, p, checkpointing)]
    assert rows
    for row in rows:
        peak = plan[{"lora": LORA, "ours": OURS}[row["kind"]]].peak
        assert -0.003 < peak / 2**20 / row["measured"] - 1 <= 0
