"""Fine-tuning on the mixture with transformers' Trainer: examples packed into one row, loss on answers only."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from multilora_fast.demo.scoring import Encoded


def pack(examples: Sequence[Encoded]) -> dict[str, Tensor]:
    """Pack all examples into one row without padding. Positions restart at each, which keeps attention inside it.

    Logits are computed only at the positions that predict an answer token.
    """
    ids: list[int] = []
    positions: list[int] = []
    keep: list[int] = []
    labels: list[int] = []
    for example in examples:
        answer = example.options[example.answer]
        sequence = example.prompt + answer[:-1]
        first = len(ids) + len(example.prompt) - 1
        keep += range(first, first + len(answer))
        labels += answer
        ids += sequence
        positions += range(len(sequence))
    targets = torch.tensor([labels])
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "logits_to_keep": torch.tensor(keep),
        "labels": targets,
        "shift_labels": targets,
    }


@torch.inference_mode()
def check_packing(model: nn.Module, examples: Sequence[Encoded]) -> None:
    """Raise ValueError if the logits of an example depend on what is packed before it."""
    device = next(model.parameters()).device

    def logits(*parts: Encoded) -> Tensor:
        packed = {name: tensor.to(device) for name, tensor in pack(parts).items() if "labels" not in name}
        return model(**packed).logits[0, -1].float()

    alone, packed = logits(examples[-1]), logits(examples[0], examples[-1])
    if (alone - packed).norm() > 0.05 * alone.norm():
        raise ValueError(
            f"--model: {type(model).__name__} mixes examples that are packed into one row; "
            "the demo needs a model whose attention respects position_ids."
        )


class LossBar(TrainerCallback):
    """A progress bar with the running loss, instead of the Trainer's printed logs."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc="Training", unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def train(
    model: nn.Module,
    examples: Sequence[Encoded],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: torch.device,
    scratch: Path,
) -> list[dict[str, float]]:
    """Train with AdamW, a short warm-up and linear decay. Returns the log: ``{"step": …, "loss": …}`` each."""
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=max(1, steps // 10),
        lr_scheduler_type="linear",
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=False,
        seed=seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a packed row cannot be split over data-parallel replicas
    trainer = Trainer(model=model, args=arguments, train_dataset=list(examples), data_collator=pack)
    for printing in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printing)
    trainer.add_callback(LossBar())
    trainer.train()
    model.eval()
    return [{"step": log["step"], "loss": log["loss"]} for log in trainer.state.log_history if "loss" in log]
