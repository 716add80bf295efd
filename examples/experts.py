"""Train and export the experts of a small MoE model, beside LoRA on them: ``python examples/experts.py OUTPUT``."""

import sys

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

from multilora_fast import MultiLoraConfig, export_lora

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
ADAPTED = {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
TEXTS = [(torch.arange(16) * 7 + start) % 64 for start in range(64)]
ROWS = [{"input_ids": ids, "labels": ids} for ids in TEXTS]


def base() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES))


def train(config: PeftConfig, learning_rate: float, output: str) -> float:
    model = get_peft_model(base(), config)
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        output, learning_rate=learning_rate, max_steps=30, per_device_train_batch_size=8, logging_steps=10, report_to=[]
    )
    trainer = Trainer(model, arguments, train_dataset=ROWS)
    trainer.train()
    model.save_pretrained(output)
    return trainer.state.log_history[-2]["loss"]


def main(output: str) -> dict[str, float]:
    # top-k is 2, so each expert has branches of rank r // 2 = 4: a total rank of 12, as LoRA's.
    multilora = MultiLoraConfig(r=8, lora_num=3, lora_dropout=0.05, **ADAPTED)
    losses = {"MultiLoRA": train(multilora, 1e-2, f"{output}/multilora")}
    losses["LoRA"] = train(LoraConfig(r=12, lora_alpha=12, **ADAPTED), 3e-3, f"{output}/lora")
    print(losses)
    export_lora(f"{output}/multilora", f"{output}/exported", overwrite=True)  # or layout="per-expert"
    ours, exported = (PeftModel.from_pretrained(base(), f"{output}/{name}") for name in ("multilora", "exported"))
    ids = TEXTS[0][None]
    print("the export's logits differ by", (ours(ids).logits - exported(ids).logits).abs().max().item())
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
