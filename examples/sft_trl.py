"""Supervised fine-tuning with TRL: ``python examples/sft_trl.py MODEL OUTPUT``."""

import sys

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from multilora_fast import MultiLoraConfig

ROWS = [
    {"prompt": "The color of the sky is", "completion": " blue"},
    {"prompt": "The color of grass is", "completion": " green"},
] * 8


def main(name: str, output: str) -> float:
    arguments = SFTConfig(
        output, learning_rate=1e-3, max_steps=8, per_device_train_batch_size=2, logging_steps=4, report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = SFTTrainer(
        name,
        args=arguments,
        train_dataset=Dataset.from_list(ROWS),
        peft_config=MultiLoraConfig(r=8, lora_num=3, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    loss = trainer.train().training_loss
    trainer.save_model(output)
    return loss


if __name__ == "__main__":
    main(*sys.argv[1:])
