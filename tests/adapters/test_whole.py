"""Tensors that PEFT stores whole (heads, embeddings, an adapted lm_head), and names of wrapped modules: all readers
accept them, and the export of a directory equals that of the model."""

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import IDS, assert_differ, assert_same_logits, config, llama, logits
from tiny_training import PROMPTS, make_tokenizer, write
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from multilora_fast import export_lora, from_loras, singular_values
from multilora_fast.adapters import load_adapter
from multilora_fast.adapters.files import CONFIG, WEIGHTS
from multilora_fast.training.checkpoint import last_checkpoint
from multilora_fast.training.config import TrainSettings
from multilora_fast.training.run import run


def classifier():
    torch.manual_seed(0)
    options = llama().config
    options.num_labels, options.pad_token_id = 3, 0
    return LlamaForSequenceClassification(options).eval()


def bert(cls, labels):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return cls(BertConfig(vocab_size=64, num_labels=labels, initializer_range=0.2, **sizes)).eval()


def resized(base=None):
    """A model with a resized vocabulary, whose new rows are random."""
    model = llama() if base is None else LlamaForCausalLM.from_pretrained(base).eval()
    model.resize_token_embeddings(70, mean_resizing=False)
    torch.manual_seed(3)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        nn.init.normal_(layer.weight.data[64:], std=0.2)
    return model


def blank(base=None):
    """The same with blank new rows, the base that the adapter is loaded onto."""
    model = resized(base)
    model.get_input_embeddings().weight.data[64:] = 0
    return model


@torch.no_grad()
def output(model):
    with torch.compiler.set_stance("force_eager"):  # a compiled model is one by its names
        return model.eval()(input_ids=IDS)[0]


CASES = {
    "lm_head": (llama, llama, {"target_modules": ["q_proj", "lm_head"]}, {"lm_head.base_layer.weight"}),
    "vocabulary": (resized, blank, {}, {"model.embed_tokens.weight", "lm_head.weight"}),
    "SEQ_CLS": (classifier, classifier, {"task_type": "SEQ_CLS"}, {"score.weight"}),
    "TOKEN_CLS": (
        lambda: bert(BertForTokenClassification, 3), lambda: bert(BertForTokenClassification, 3),
        {"task_type": "TOKEN_CLS", "target_modules": ["query"]}, {"classifier.weight", "classifier.bias"},
    ),
    "QUESTION_ANS": (
        lambda: bert(BertForQuestionAnswering, 2), lambda: bert(BertForQuestionAnswering, 2),
        {"task_type": "QUESTION_ANS", "target_modules": ["query"]}, {"qa_outputs.weight", "qa_outputs.bias"},
    ),
    "compiled": (
        lambda: torch.compile(llama(), backend="eager"), llama, {"rank_pattern": {"1.self_attn.q_proj": 2}}, ()
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_reader_takes_it(case, tmp_path):
    make, again, options, kept = CASES[case]
    if case == "vocabulary":  # PEFT looks at the base's config
        llama().save_pretrained(tmp_path / "base")
        make, again = (lambda f=f: f(tmp_path / "base") for f in (make, again))
    base = make()
    plain = output(base)
    model = get_peft_model(base, config(**options))
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            nn.init.normal_(parameter)
    expected = output(model)
    assert_differ(expected, plain)
    model.save_pretrained(tmp_path / "source")
    export_lora(model, tmp_path / "a")
    export_lora(tmp_path / "source", tmp_path / "b")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    assert {key.removeprefix("base_model.model.") for key in tensors if ".lora_" not in key} == set(kept)
    assert not any("_orig_mod" in key for key in tensors)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    exported = PeftModel.from_pretrained(again(), tmp_path / "a")
    assert type(exported) is type(PeftModel.from_pretrained(make(), tmp_path / "source"))
    assert_same_logits(output(exported), expected)
    loaded = again()
    load_adapter(loaded, tmp_path / "source")
    assert_same_logits(output(loaded), expected)
    assert singular_values(tmp_path / "source").keys() == singular_values(tmp_path / "a").keys()
    if options.get("task_type"):
        with pytest.raises(ValueError, match="modules_to_save="):
            from_loras([tmp_path / "a"], tmp_path / "merged")
        return
    merged = PeftModel.from_pretrained(again(), from_loras([tmp_path / "a"], tmp_path / "merged"))
    assert_same_logits(output(merged), expected, 2e-6)


def compiled_lora(path, seed):
    torch.manual_seed(seed)
    options = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    get_peft_model(torch.compile(llama(), backend="eager"), options).save_pretrained(path)
    return path


def test_loras_of_a_compiled_model_with_an_adapted_head_are_merged(tmp_path):
    loras = [compiled_lora(tmp_path / str(i), i) for i in range(2)]
    assert any("_orig_mod" in key for key in load_file(loras[0] / WEIGHTS))
    from_loras(loras, tmp_path / "out", weights=[1, 0.5])
    clean = llama()
    for weight, folder in zip((1, 0.5), loras, strict=True):
        tensors = load_file(folder / WEIGHTS)
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "lm_head"):
            A, B = (tensors[f"base_model.model._orig_mod.{name}.lora_{which}.weight"] for which in "AB")
            clean.get_submodule(name).weight.data += weight * B @ A  # alpha is r
    merged = PeftModel.from_pretrained(llama(), tmp_path / "out")
    assert_same_logits(logits(merged), logits(clean), 1e-5)
    path = loras[1] / WEIGHTS
    tensors = load_file(path)
    tensors["base_model.model._orig_mod.lm_head.base_layer.weight"] += 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"holds another lm_head\.base_layer\.weight"):
        from_loras(loras, tmp_path / "new")


def test_patterns_that_name_the_wrapper_still_mean_what_they_meant(tmp_path):
    model = llama()
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    model = get_peft_model(model, config(rank_pattern={"_orig_mod.self_attn.q_proj": 2}))
    expected = output(model)
    model.save_pretrained(tmp_path / "source")
    export_lora(tmp_path / "source", tmp_path / "out")
    assert_same_logits(logits(PeftModel.from_pretrained(llama(), tmp_path / "out")), expected)


def edit(path, **new):
    path.write_text(json.dumps(json.loads(path.read_text()) | new))


@pytest.mark.parametrize("source", ["model", "directory"])
def test_revision_and_task_survive(source, tmp_path):
    options = {"revision": "v1.1", "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/base"}
    model = get_peft_model(llama(), config())
    for name, value in options.items():
        setattr(model.peft_config["default"], name, value)
    model.save_pretrained(tmp_path / "source")
    edit(tmp_path / "source" / CONFIG, **options)
    export_lora(model if source == "model" else tmp_path / "source", tmp_path / "lora")
    from_loras([tmp_path / "lora"] * 2, tmp_path / "merged")
    for name in ("lora", "merged"):
        written = json.loads((tmp_path / name / CONFIG).read_text())
        assert {field: written[field] for field in options} == options
    edit(tmp_path / "lora" / CONFIG, revision=None)
    export_lora(tmp_path / "source", tmp_path / "other")
    from_loras([tmp_path / "lora", tmp_path / "other"], tmp_path / "merged", overwrite=True)
    assert json.loads((tmp_path / "merged" / CONFIG).read_text())["revision"] is None


def test_only_the_heads_that_peft_adds_are_exported(tmp_path):
    for options, left in (
        ({"modules_to_save": ["embed_tokens"], "task_type": "SEQ_CLS"}, "['embed_tokens']"),
        ({"modules_to_save": ["score"]}, "['score']"),
    ):
        model = get_peft_model(classifier(), config(**options))
        model.save_pretrained(tmp_path / "source")
        for source in (model, tmp_path / "source"):
            with pytest.raises(ValueError, match=re.escape(f"modules_to_save {left}")):
                export_lora(source, tmp_path / "out")


def test_a_head_that_does_not_fit_leaves_the_model_alone(tmp_path):
    model = get_peft_model(classifier(), config(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    for other, message in (
        (llama(), r"score\.weight"),
        (LlamaForSequenceClassification(llama().config), r"score\.weight of shape \(3, 32\)"),
    ):
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_adapter(other, tmp_path)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_a_run_that_adapts_the_head_is_resumed(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    files = (write(tmp_path / "sky.jsonl", PROMPTS),)
    options = {"r": 2, "target_modules": ("lm_head",), "dtype": "float32", "eval_fraction": 0.0, "save_steps": 1}
    for steps in (1, 2):
        settings = TrainSettings(
            str(tmp_path / "base"), tmp_path / "run", files, max_steps=steps, resume=steps > 1, **options
        )
        run(settings)
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-2"
    export_lora(tmp_path / "run", tmp_path / "lora")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "lora" / WEIGHTS)
