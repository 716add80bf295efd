"""plan_memory: what a row is made of, its extrapolation, the largest batch, and what the plan shows."""

import json
import time
from functools import cache

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_plans import config, settings
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from bench.candidates import FP8
from bench.memory import bytes_per_token
from multilora_fast import MultiLoraConfig, plan_memory
from multilora_fast.memory import peak_bytes
from multilora_fast.memory.methods import FULL, LORA, METHODS, OURS, REFERENCE
from multilora_fast.memory.plan import counter, largest_batch
from multilora_fast.memory.report import KINDS, MethodPlan
from multilora_fast.memory.step import PHASES, STEP, Step

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = ["q_proj", "v_proj", "down_proj"]
SMALL = {"batch": 2, "seq_len": 16, "r": 4}


def llama(dtype=torch.bfloat16, **options) -> nn.Module:
    return AutoModelForCausalLM.from_config(config(**options), dtype=dtype)


@pytest.mark.parametrize("method", [LORA, OURS])
def test_adapters_are_float32_where_peft_makes_them_so(method, only):
    only(method)
    plan = plan_memory(config(2), r=8, batch=1, seq_len=8, target_modules=LINEARS, device="cpu")[method]
    options = {"r": 24} if method == LORA else {"r": 8, "lora_num": 3}
    made = (LoraConfig if method == LORA else MultiLoraConfig)(**options, target_modules=LINEARS)
    model = get_peft_model(llama(layers=2), made)
    own = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert (plan.adapter, plan.gradients) == (own, own)
    assert plan.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - own


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor"])
def test_the_optimizers_state_and_its_temporaries(optimizer):
    cls = {"sgd": torch.optim.SGD, "adafactor": torch.optim.Adafactor}[optimizer]
    model = llama(torch.float32, vocab_size=4096).train()
    s = settings(device="cpu", seq_len=8, dtype=torch.float32, optimizer=optimizer)
    plan = MethodPlan.of(FULL, counter(config(vocab_size=4096), FULL, s, whole=False)(1))
    assert (plan.phase == "optimizer step") == (optimizer != "sgd")
    ids, steps = torch.randint(4096, (1, 8)), cls(model.parameters(), lr=1e-5)

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        steps.step()
        steps.zero_grad()

    step()
    real = peak_bytes(step, torch.device("cpu"))
    assert plan.peak - plan.weights - plan.optimizer == pytest.approx(real, rel=0.05)


def test_what_is_alive_at_the_peak():
    """With checkpointing and few logits, it is where the first layer's backward begins: before it one input is left of
    all activations, and after down_proj, the first gradient there, all others but that layer's."""
    s = settings(device="cpu", checkpointing=True, seq_len=256)
    step = Step(config(3, vocab_size=64, num_key_value_heads=4), FULL, s)
    plan = MethodPlan.of(FULL, step.count(4))
    first = step.layers[0]
    late = [p for name, p in first.named_parameters() if "down_proj" not in name]
    late.append(step.model.get_input_embeddings().weight)
    rotary = 256 * (2 * 32 * 2 + 8)  # cosines and sines of 32 in bfloat16, and positions
    assert plan.phase == "backward"
    assert plan.at_peak["activations"] == 4 * 256 * 128 * 2 + rotary < plan.activations
    assert plan.at_peak["gradients"] == plan.gradients - sum(p.nbytes for p in late)
    assert list(plan.at_peak) == list(KINDS)
    assert sum(plan.at_peak.values()) == plan.peak


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (FULL, {"device": "cpu", "checkpointing": True}),
        (LORA, {"quantization": "4bit"}),
        (REFERENCE, {}),
        (OURS, {"device": "cpu", "checkpointing": True, "lora_dropout": 0.05}),
        (OURS, {"quantization": "4bit"}),
    ],
)
def test_few_layers_stand_for_all(method, options):
    s = settings(target_modules=SOME, lora_num=2, **options)
    few, all_ = (counter(config(), method, s, whole=whole)(3) for whole in (False, True))
    assert few == all_


def test_unequal_layers_are_counted_whole(monkeypatch, only):
    only(OURS)
    kinds = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    mixed = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, layer_types=kinds, use_sliding_window=True, sliding_window=8,
    )  # fmt: skip
    monkeypatch.setattr("multilora_fast.memory.plan.shallow", None)
    s = settings(seq_len=16, r=4, target_modules=SOME, adapter_dtype=torch.float32)
    plan = plan_memory(mixed, target_modules=SOME, **SMALL)
    assert plan[OURS] == MethodPlan.of(OURS, Step(mixed, OURS, s).count(2))


@pytest.mark.parametrize("p", [0.0, 0.05])
def test_a_gpu_keeps_masks_of_a_byte_and_ours_none_and_inputs_in_8_bits_if_asked(p):
    """Against bench.memory, which counts a real layer with such masks: bytes per token and layer, but for seeds."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4}
    per_layer = {}
    for name, method, options in (
        (LORA, LORA, {}), (REFERENCE, REFERENCE, {}), (OURS, OURS, {}), (FP8, OURS, {"save_inputs": "fp8"})
    ):  # fmt: skip
        s = settings(lora_dropout=p, r=32, lora_num=2, options=options)
        few, more = (Step(config(layers, **sizes), method, s).count(2)["activations"] for layers in (1, 2))
        per_layer[name] = (more - few) / (2 * s.seq_len)
    real = {name: bytes_per_token("tiny", name, n=2, p=p) for name in per_layer}
    for name in (LORA, REFERENCE, FP8):
        assert per_layer[name] - per_layer[OURS] == pytest.approx(real[name] - real[OURS], abs=0.5)


def test_packed_weights_take_bitsandbytes_bytes():
    bnb = pytest.importorskip("bitsandbytes")
    w = torch.randn(512, 1024)
    packed, state = bnb.functional.quantize_4bit(w, compress_statistics=True, quant_type="nf4")
    real = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    sizes = config(hidden_size=1024, intermediate_size=512)
    weights = {q: Step(sizes, OURS, settings(quantization=q)).fixed()["weights"] for q in (None, "4bit", "8bit")}
    numbers = 5 * (1024 * (1024 + 1024 + 512 + 512) + 3 * 1024 * 512)
    rows = 5 * (1024 + 1024 + 512 + 512 + 2 * 512 + 1024)
    assert weights[None] - weights["4bit"] == pytest.approx(numbers * (2 - real / w.numel()), rel=1e-3)
    assert weights[None] - weights["8bit"] == numbers - 4 * rows


def test_eight_bit_adam_takes_a_byte_per_moment():
    names = ("adamw", "adamw_8bit")
    full, eight = (Step(config(2), FULL, settings(optimizer=name)).count(1) for name in names)
    assert eight["optimizer"] == pytest.approx(full["optimizer"] / 2, rel=0.05)  # of moments in bfloat16
    assert eight[STEP] == eight["weights"] + eight["gradients"] + eight["optimizer"] < full[STEP]


def test_the_largest_batch_fits_and_one_more_does_not():
    count = cache(Step(config(2), OURS, settings(quantization="4bit", target_modules=SOME)).count)
    tried = set()

    def peaks(rows):
        tried.add(rows)
        return [count(rows)[phase] for phase in PHASES]

    rows = largest_batch(peaks, 60 * 2**20, 4)
    assert rows > 4
    assert max(peaks(rows)) <= 60 * 2**20 < max(peaks(rows + 1))
    assert len(tried) <= 6


@pytest.mark.parametrize("start", [1, 2, 17, 1000])
@pytest.mark.parametrize(
    "peaks_of",
    [lambda b: [7 * b + 3], lambda b: [900, 7 * b], lambda b: [500 + b, max(2 * b, 50 * b - 3000), max(400, 3 * b)]],
)
def test_the_search_finds_what_trying_all_would(peaks_of, start):
    for budget in (1, 10, 899, 900, 1000, 12345):
        expected = max((b for b in range(1, 2000) if max(peaks_of(b)) <= budget), default=0)
        assert largest_batch(peaks_of, budget, start) == expected


def test_a_large_model_takes_seconds_and_no_memory(only):
    only(OURS)
    llama = LlamaConfig(
        vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    )
    started = time.perf_counter()
    allocated = peak_bytes(lambda: plan_memory(llama, batch=4, seq_len=2048, target_modules=SOME), torch.device("cpu"))
    assert time.perf_counter() - started < 60
    assert allocated < 2**20


def test_what_the_plan_shows(tmp_path):
    config(1).save_pretrained(tmp_path)
    plan = plan_memory(
        tmp_path, target_modules=SOME, device_memory="64KiB", lora_dropout=0.05, quantization="4bit", **SMALL
    )
    text = str(plan)
    assert text == repr(plan)
    assert [found.largest_batch for found in plan.methods] == [0, 0, 0, 0]
    peaks, full_sizes = (text.split("\n\n")[i].splitlines() for i in (1, 2))
    for method, row, whole in zip(METHODS, peaks[2:], full_sizes[2:], strict=True):
        found = plan[method]
        kinds = list(found.at_peak.values())
        assert sum(kinds) == found.peak
        assert min(kinds) >= 0
        full = found.activations, found.logits, found.gradients
        for line, sizes in ((row, (*kinds, found.peak)), (whole, full)):
            assert line.removeprefix(method).split()[: len(sizes)] == [f"{size / 2**20:.1f}" for size in sizes]
    assert json.loads(json.dumps(plan.to_dict()))["methods"][OURS]["at_peak"] == plan[OURS].at_peak
    assert plan.plot(tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert all(f"<!-- {kind} -->" in plan.plot(tmp_path / "plan.svg").read_text() for kind in KINDS)


def test_a_model_is_planned_by_its_config(only):
    only(OURS)
    options = {"target_modules": SOME, **SMALL}
    assert plan_memory(llama(layers=1), **options)[OURS] == plan_memory(config(1), **options)[OURS]


def test_the_plan_says_that_peft_keeps_copies_in_the_adapters_dtype(only):
    only(LORA, OURS)
    float32, equal = (plan_memory(config(1), adapter_dtype=own, **SMALL) for own in (None, "bfloat16"))
    assert float32[LORA].activations > 1.1 * float32[OURS].activations
    assert equal[LORA].activations == pytest.approx(equal[OURS].activations, rel=0.01)
    said = "casts its inputs to its adapters' float32"
    assert said in str(float32)
    assert said not in str(equal)
    assert "adapters in float32 (the reference loop's in bfloat16);" in float32.title()
    assert "adapters in bfloat16;" in equal.title()
