"""A prepared folder's weights: exact, tied, and in files below a size."""

import json

import pytest
import torch
from tiny_tasks import made_up
from tiny_training import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from examples.multitask import compact, prepare
from examples.multitask.plan import quick
from examples.multitask.profile import gpu


def quantized(rows: int, columns: int, bits: int) -> torch.Tensor:
    """A matrix as GGUF's Q4_1 or Q8_0 restores it."""
    blocks = torch.randn(rows, columns // compact.BLOCK, compact.BLOCK)
    if bits == 8:
        scale = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
        return ((blocks / scale).round().clamp(-127, 127) * scale).view(rows, columns)
    least = blocks.amin(-1, keepdim=True).half().float()
    scale = ((blocks.amax(-1, keepdim=True) - least) / 15).half().float()
    return (((blocks - least) / scale).round().clamp(0, 15) * scale + least).view(rows, columns)


def size(codes: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in codes.values())


@pytest.mark.parametrize(("bits", "bytes_a_block"), [(4, 16 + 4), (8, 32 + 2)])
def test_quantized_weights_are_kept_exactly_in_few_bytes(bits, bytes_a_block):
    torch.manual_seed(0)
    weight = quantized(24, 96, bits)
    weight[3] = 0.0
    found = compact.compacted(weight)
    assert size(found) == weight.numel() // compact.BLOCK * bytes_a_block
    again = compact.restored(found[compact.CODES], found[compact.SCALE], found.get(compact.LEAST))
    assert torch.equal(again, weight)
    assert not torch.equal(weight.bfloat16().float(), weight)  # half as many bytes, but not the weights


@pytest.mark.parametrize("weight", [torch.rand(4, 64), torch.rand(4, 40), torch.rand(64), torch.rand(4, 64).double()])
def test_other_weights_stay_as_they_are(weight):
    assert compact.compacted(weight) is None


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for index, weight in enumerate(p for p in model.parameters() if p.dim() == 2 and p.shape[1] % compact.BLOCK == 0):
        weight.data = quantized(*weight.shape, 8 if index % 3 == 0 else 4)
    model.tie_weights()
    model.save_pretrained(tmp_path / "model")
    return model


def test_a_prepared_folder_has_the_weights_in_files_below_a_size(model, tmp_path):
    tasks = [made_up("thing", (" sky", " grass"), 10)]
    whole = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    said = prepare.prepare(tmp_path / "out", tmp_path / "model", tasks, quick(gpu("float32")), make_tokenizer(), "40KB")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= 40_000
    shards = [path for path in files if path.suffix == ".safetensors"]
    assert len(shards) > 1
    assert sum(path.stat().st_size for path in shards) < 0.5 * whole
    assert said["weights"]["as codes"] > 10
    again = compact.load(tmp_path / "out/model")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    assert not again.training
    assert not again.config.use_cache
    shards[0].unlink()
    with pytest.raises(ValueError, match=r"lacks \d+ weights"):
        compact.load(tmp_path / "out/model")


@pytest.mark.parametrize(("text", "reason"), [("2KB", r"--shard-size 2KB: .*bytes"), ("big", "50MB"), ("0MB", "50MB")])
def test_sizes_that_cannot_be(model, tmp_path, text, reason):
    tasks = [made_up("thing", (" sky", " grass"), 10)]
    with pytest.raises(ValueError, match=reason):
        prepare.prepare(tmp_path / "out", tmp_path / "model", tasks, quick(gpu("float32")), make_tokenizer(), text)
    assert not (tmp_path / "out/prepared.json").exists()
    assert json.loads((tmp_path / "model/config.json").read_text())["tie_word_embeddings"]
