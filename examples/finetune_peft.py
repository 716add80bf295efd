"""Fine-tune on a JSONL file with transformers' Trainer: ``python examples/finetune_peft.py MODEL DATA.jsonl OUTPUT``.

Each line is {"prompt": ..., "completion": ...}. Only the completion is learned.
"""

import json
import sys
from pathlib import Path

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from multilora_fast import MultiLoraConfig


def main(name: str, data: str, output: str) -> float:
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def encode(row: dict) -> dict:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}

    rows = [encode(json.loads(line)) for line in Path(data).read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(name)
    model = get_peft_model(model, MultiLoraConfig(r=8, lora_num=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        output, learning_rate=1e-3, num_train_epochs=3, per_device_train_batch_size=4, logging_steps=1, report_to=[]
    )  # learning rate: 3 to 10 times LoRA's
    trainer = Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), train_dataset=rows)
    loss = trainer.train().training_loss
    model.save_pretrained(output)  # load it with peft.PeftModel.from_pretrained(base, output)
    return loss


if __name__ == "__main__":
    main(*sys.argv[1:])
