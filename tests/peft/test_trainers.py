"""Other people's trainers: each learns what it learns with the reference's layers in the same model."""

import shutil
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import IDS, branches, layers, llama
from tiny_moe import moe
from tiny_training import ROWS, adapted, arguments, config, losses, make_tokenizer, trained, twin

from multilora_fast.adapters.branches import NAMES
from multilora_fast.peft import restore_float32
from multilora_fast.peft.precision import warn_of_half_scales


@pytest.fixture(autouse=True)
def _one_thread():
    """The models are too small for more, which only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_agree(ours: torch.Tensor, reference: torch.Tensor, rtol: float) -> None:
    difference = ((ours - reference) / reference).abs().max()
    print(f"losses {reference[0]:.4f} -> {reference[-1]:.4f}, apart by {difference:.2g}")
    assert len(ours) > 1
    assert reference[-1] < 0.95 * reference[0]
    torch.testing.assert_close(ours, reference, rtol=rtol, atol=0)


@pytest.mark.parametrize(("base", "bf16", "rtol"), [("float32", False, 1e-4), ("bfloat16", True, 1e-2)])
def test_trainer(base, bf16, rtol, tmp_path):
    model = adapted(llama(getattr(torch, base)))
    reference = trained(twin(model), tmp_path, bf16=bf16)
    assert_agree(trained(model, tmp_path, bf16=bf16), reference, rtol)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_trainer_resumes_to_the_same_losses(tmp_path):
    options = {"bf16": True, "save_strategy": "steps", "save_steps": 3}
    whole = trained(adapted(lora_dropout=0.2), tmp_path, **options)
    resumed = trained(adapted(lora_dropout=0.2), tmp_path / "again", resume=str(tmp_path / "checkpoint-3"), **options)
    assert torch.equal(resumed, whole)  # the log of the first three comes from the checkpoint
    assert not torch.equal(whole, trained(adapted(), tmp_path))
    folders = (tmp_path / "checkpoint-6", tmp_path / "again/checkpoint-6")
    saved, again = (PeftModel.from_pretrained(llama(), folder) for folder in folders)
    for one, other in zip(branches(saved), branches(again), strict=True):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in NAMES)


def test_trainer_with_gradient_checkpointing(tmp_path):
    plain = trained(adapted(lora_dropout=0.2), tmp_path)
    for use_reentrant in (False, True):
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
        checkpointed = trained(adapted(lora_dropout=0.2), tmp_path, gradient_checkpointing=True, **options)
        assert_agree(checkpointed, plain, 1e-6)


def one_layer(dtype=torch.float32):
    model = llama(dtype)
    del model.model.layers[1]
    model.config.num_hidden_layers = 1
    return model


def test_trainer_with_torch_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # TrainingArguments sets it, for later tests too
    model = adapted(one_layer())
    reference = trained(twin(model, one_layer()), tmp_path)
    compiled = trained(model, tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert_agree(compiled, reference, 1e-4)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_a_layer_compiles_in_one_graph():
    (layer, *_) = layers(adapted(init_weights=False)).values()
    x = torch.randn(2, 12, 32, requires_grad=True)
    outputs = []
    for step in (layer, torch.compile(layer, fullgraph=True)):
        y = step(x)
        outputs.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.multilora_branches.parameters()])])
    for eager, compiled in zip(*outputs, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def accelerated(model) -> torch.Tensor:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerate.state.AcceleratorState._reset_state(True)  # in which an earlier test may have left torch.compile on
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    found = []
    for _ in range(6):
        with accelerator.accumulate(model):
            loss = model(input_ids=IDS, labels=IDS).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def test_accelerate():
    model = adapted()
    reference = accelerated(twin(model))
    assert_agree(accelerated(model), reference, 1e-4)


def sft(model, folder, **options):
    trl = pytest.importorskip("trl", reason="needs trl")
    from datasets import Dataset

    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in ROWS])
    settings = trl.SFTConfig(**arguments(folder, bf16=False, gradient_checkpointing=False), shuffle_dataset=False)
    return trl.SFTTrainer(model, args=settings, train_dataset=data, processing_class=make_tokenizer(), **options)


def test_sft_trainer(tmp_path):
    torch.manual_seed(1)
    trainer = sft(llama(), tmp_path, peft_config=config(task_type="CAUSAL_LM"))
    reference = losses(sft(twin(trainer.model), tmp_path))
    assert_agree(losses(trainer), reference, 1e-4)


@pytest.fixture
def on_4_bits(tmp_path):
    """Loads a 4-bit base, as transformers does."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    llama(hidden_size=128).save_pretrained(tmp_path / "base")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def load():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=options, dtype=torch.float32)

    return load


def test_sft_trainer_on_a_4_bit_base(on_4_bits, tmp_path):
    torch.manual_seed(1)
    trainer = sft(on_4_bits(), tmp_path, peft_config=config())
    scales = [module.lora_scaling for module in branches(trainer.model)]
    assert {s.dtype for s in scales} == {torch.bfloat16}
    assert restore_float32(trainer.model) == 3 * len(scales)
    assert {s.dtype for s in scales} == {torch.float32}
    dense = llama(hidden_size=128)
    dense.load_state_dict(on_4_bits().dequantize().state_dict())
    reference = losses(sft(twin(trainer.model, dense), tmp_path))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="lora_scaling")
        assert_agree(losses(trainer), reference, 1e-4)


def test_the_first_training_forward_warns_of_half_scales_once(on_4_bits, tmp_path):
    trainer = sft(on_4_bits(), tmp_path, peft_config=config())
    with pytest.warns(UserWarning, match=r"lora_scaling is trained in bfloat16.*restore_float32\(model\)") as caught:
        trainer.train()
    assert len([w for w in caught if "lora_scaling" in str(w.message)]) == 1


def test_what_does_not_warn():
    half = get_peft_model(one_layer(torch.bfloat16), config(), autocast_adapter_dtype=False)
    frozen = get_peft_model(llama(torch.bfloat16), config(), autocast_adapter_dtype=False).train()
    frozen.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="lora_scaling")
        half.eval()(IDS)
        frozen(IDS)
        adapted(llama(torch.bfloat16)).train()(IDS)
        torch.compile(half.train(), backend="eager", fullgraph=True)(IDS)
    with pytest.warns(UserWarning, match="lora_scaling is trained in bfloat16"):
        half(IDS)


def test_restore_float32_keeps_the_parameters_and_what_is_not_half():
    model = get_peft_model(llama(torch.bfloat16), config(), autocast_adapter_dtype=False)
    model.add_adapter("other", config())
    for module in branches(model, "other"):
        module.double()
    before = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    model(IDS, labels=IDS).loss.backward()
    assert restore_float32(model) == 3 * len(layers(model))
    for name, p in model.named_parameters():
        half = ".default." in name
        assert p is before[name]
        assert p.dtype == (torch.float32 if half else values[name].dtype)
        assert torch.equal(p, values[name].to(p.dtype))
        assert p.grad is None or p.grad.dtype == p.dtype
    with pytest.raises(ValueError, match="model holds no MultiLoRA adapter to restore"):
        restore_float32(llama())


@pytest.mark.parametrize("mark", ["_hp_mapping", "ds_id"])  # of ZeRO-1 and 2, and of ZeRO-3
def test_masters_of_deepspeed_are_not_warned_of(mark):
    model = get_peft_model(llama(torch.bfloat16), config(), autocast_adapter_dtype=False).train()
    for parameter in model.parameters():
        setattr(parameter, mark, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warn_of_half_scales(model)


def test_half_scales_on_experts_are_warned_of_and_restored():
    options = config(target_modules=[], target_parameters=["experts.down_proj"])
    model = get_peft_model(moe(num_hidden_layers=1).bfloat16(), options, autocast_adapter_dtype=False)
    with pytest.warns(UserWarning, match="lora_scaling is trained in bfloat16"):
        warn_of_half_scales(model)
    assert restore_float32(model) == 3
