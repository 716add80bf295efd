"""Fine-tune with transformers' Trainer: ``python examples/finetune_peft.py MODEL OUTPUT``."""

import sys

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from multilora_fast import MultiLoraConfig

TEXTS = ["The sky is blue.", "The grass is green.", "Snow is white.", "Coal is black."] * 8


def main(name: str, output: str) -> float:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    model = get_peft_model(model, MultiLoraConfig(r=8, lora_num=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    rows = [tokenizer(text) for text in TEXTS]
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    arguments = TrainingArguments(
        output, learning_rate=1e-3, max_steps=8, per_device_train_batch_size=1, logging_steps=4, report_to=[]
    )  # learning rate: 3 to 10 times LoRA's
    loss = Trainer(model, arguments, train_dataset=rows).train().training_loss
    model.save_pretrained(output)  # load it with peft.PeftModel.from_pretrained(base, output)
    return loss


if __name__ == "__main__":
    main(*sys.argv[1:])
