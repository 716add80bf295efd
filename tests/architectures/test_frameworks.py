"""Short trainings by other frameworks: the same lines with LoraConfig and with MultiLoraConfig."""

import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import ATTENTION, IDS, llama
from tiny_training import PROMPTS, arguments, logged, make_tokenizer
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer

from multilora_fast import MultiLoraConfig

METHODS = {
    "lora": lambda **options: LoraConfig(r=4, lora_alpha=8, **options),
    "multilora": lambda **options: MultiLoraConfig(r=4, lora_num=3, lora_alpha=8, **options),
}
pytestmark = pytest.mark.skipif(os.environ.get("ARCHITECTURES") != "all", reason="run by `make architectures`")


@pytest.fixture(params=METHODS)
def adapter(request):
    torch.manual_seed(1)
    return METHODS[request.param]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_learned(losses, model: nn.Module) -> None:
    """The losses fell, and every adapter's parameters have moved by the optimizer, the frozen ones not."""
    losses = torch.as_tensor(losses, dtype=torch.float64)
    print(f"losses {losses[0]:.4f} -> {losses[-1]:.4f}")
    assert len(losses) > 1
    assert losses[-1] < 0.97 * losses[0]
    assert_moved(model)


def assert_moved(model: nn.Module) -> None:
    scales = [p for name, p in model.named_parameters() if name.endswith(("lora_scaling", "lora_B.default.weight"))]
    assert scales
    assert all(p.requires_grad and p.any() and torch.isfinite(p).all() for p in scales)  # all start at zero


def test_dpo(adapter, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [{"prompt": row["prompt"], "chosen": " blue", "rejected": " red"} for row in PROMPTS]
    trainer = trl.DPOTrainer(
        llama(), args=trl.DPOConfig(**arguments(tmp_path, bf16=False)), processing_class=make_tokenizer(),
        train_dataset=datasets.Dataset.from_list(rows), peft_config=adapter(target_modules=ATTENTION),
    )  # fmt: skip
    trainer.train()
    assert_learned(logged(trainer), trainer.model)


def test_grpo(adapter, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    def shortness(completions, **_) -> list[float]:
        return [float(sum(map(ord, completion)) % 7) for completion in completions]

    options = arguments(tmp_path, bf16=False, num_generations=2, max_completion_length=4, beta=0.1, max_steps=3)
    trainer = trl.GRPOTrainer(
        llama(), reward_funcs=shortness, args=trl.GRPOConfig(**options), processing_class=make_tokenizer(),
        train_dataset=datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in PROMPTS]),
        peft_config=adapter(target_modules=ATTENTION),
    )  # fmt: skip
    trainer.train()
    assert torch.isfinite(logged(trainer)).all()
    assert_moved(trainer.model)


def test_lightning(adapter, tmp_path):
    lightning = pytest.importorskip("lightning")
    losses = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = get_peft_model(llama(), adapter(target_modules=ATTENTION))

        def training_step(self, batch, index):
            loss = self.model(input_ids=batch, labels=batch).loss
            losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-2)

    module = Module()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", default_root_dir=tmp_path, **options)
    trainer.fit(module, torch.utils.data.DataLoader(IDS.repeat(2, 1), batch_size=2))
    assert_learned(losses, module.model)


def test_sentence_transformers(adapter, tmp_path):
    library, datasets = pytest.importorskip("sentence_transformers"), pytest.importorskip("datasets")
    from sentence_transformers.sentence_transformer import losses

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(60))]
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    model = library.SentenceTransformer(str(folder), device="cpu")
    model[0].model = get_peft_model(model[0].model, adapter(target_modules=["query", "key", "value"]))
    rows = [{"anchor": f"w{i} w{i + 1}", "positive": f"w{i} w{i + 2}"} for i in range(24)]
    settings = library.SentenceTransformerTrainingArguments(
        **arguments(tmp_path, max_steps=8, per_device_train_batch_size=24)
    )
    loss = losses.MultipleNegativesRankingLoss(model)
    trainer = library.SentenceTransformerTrainer(
        model, args=settings, train_dataset=datasets.Dataset.from_list(rows), loss=loss
    )
    trainer.train()
    assert_learned(logged(trainer), model)


def test_diffusers(adapter):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).requires_grad_(False)  # fmt: skip
    unet.add_adapter(adapter(target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    unet.enable_gradient_checkpointing()
    unet.train()
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=10)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=3e-2)
    noise, latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 6, 16)
    steps = torch.tensor([3, 7])
    losses = []
    for _ in range(8):
        noisy = scheduler.add_noise(latents, noise, steps)
        loss = nn.functional.mse_loss(unet(noisy, steps, encoder_hidden_states=text).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert_learned(losses, unet)
