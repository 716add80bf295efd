"""Tokenized examples, and accuracy by the likelihood of each option after the prompt."""

import inspect
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache

from multilora_fast.demo.tasks import Example

ROWS = 64  # options whose probabilities are taken at a time: those of a batch may take gigabytes


@dataclass(frozen=True)
class Encoded:
    """Token ids of an :class:`Example`: the prompt, and each option as it follows the prompt."""

    task: str
    prompt: list[int]
    options: list[list[int]]
    answer: int


def encode(example: Example, tokenizer) -> Encoded:
    prompt = tokenizer(example.prompt).input_ids
    if prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]
    whole = tokenizer([example.prompt + option for option in example.options]).input_ids
    options = [[token for token in ids[len(prompt) :] if token != tokenizer.eos_token_id] for ids in whole]
    return Encoded(example.task, prompt, options, example.answer)


def sample(examples: Sequence[Example], count: int, tokenizer, *, max_length: int, seed: int) -> list[Encoded]:
    """Draw up to ``count`` distinct examples of at most ``max_length`` tokens.

    Raises:
        ValueError: no example is that short.
    """
    chosen: list[Encoded] = []
    for example in random.Random(seed).sample(examples, len(examples)):
        encoded = encode(example, tokenizer)
        if len(encoded.prompt) + max(map(len, encoded.options)) <= max_length:
            chosen.append(encoded)
        if len(chosen) == count:
            break
    if not chosen:
        raise ValueError(f"--max-length {max_length}: no example of {examples[0].task} is that short")
    return chosen


def accuracy(
    model: nn.Module, examples: Sequence[Encoded], *, batch_size: int = 16, progress: tqdm | None = None
) -> float:
    """Share of the examples whose right option has the highest summed log-probability."""
    scores = all_scores(model, examples, batch_size=batch_size, progress=progress)
    right = sum(int(one.argmax()) == example.answer for one, example in zip(scores, examples, strict=True))
    return right / len(examples)


def all_scores(
    model: nn.Module,
    examples: Sequence[Encoded],
    *,
    batch_size: int = 16,
    limit: int | None = None,
    progress: tqdm | None = None,
) -> list[Tensor]:
    """Log-probabilities of the options of every example, in order, on the CPU.

    A batch holds at most ``batch_size`` examples and, unless it is a single one, neither prompts nor options of more
    than ``limit`` tokens with their padding.
    """
    found: dict[int, Tensor] = {}
    for batch in _batches(examples, batch_size, limit or sys.maxsize):
        found |= zip(batch, option_scores(model, [examples[i] for i in batch]), strict=True)
        if progress is not None:
            progress.update(len(batch))
    return [found[i] for i in range(len(examples))]


def _batches(examples: Sequence[Encoded], most: int, limit: int) -> Iterator[list[int]]:
    """Indices of examples whose prompts and whose options are about as long."""
    longest = [max(map(len, example.options)) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: (longest[i].bit_length(), len(examples[i].prompt)))
    batch: list[int] = []
    prompt = option = options = 0  # the longest prompt and option of the batch, and how many options
    for i in order:
        own = len(examples[i].prompt), longest[i], len(examples[i].options)
        prompt, option, options = max(prompt, own[0]), max(option, own[1]), options + own[2]
        if batch and (len(batch) == most or max((len(batch) + 1) * prompt, options * option) > limit):
            yield batch
            batch, (prompt, option, options) = [], own
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def option_scores(model: nn.Module, batch: Sequence[Encoded]) -> list[Tensor]:
    """Log-probability of every option of every example, on the CPU.

    Each prompt is read once; its cache then serves all its options, and logits exist at answer positions only.
    """
    device = next(model.parameters()).device
    prompts, mask = _padded([example.prompt for example in batch], left=True)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    prompts, mask = prompts.to(device), mask.to(device)
    cache = DynamicCache(config=model.config)
    caching = {_cache_argument(model): cache, "use_cache": True}
    read = model(prompts, attention_mask=mask, position_ids=positions.to(device), logits_to_keep=1, **caching)

    options = [option for example in batch for option in example.options]
    counts = [len(example.options) for example in batch]
    owner = torch.arange(len(batch)).repeat_interleave(torch.tensor(counts)).to(device)
    first = torch.tensor([option[0] for option in options], device=device)
    scores = read.logits[:, -1].float().log_softmax(-1)[owner, first]

    if max(map(len, options)) > 1:
        inputs, valid = (t.to(device) for t in _padded([option[:-1] for option in options], left=False))
        targets = _padded([option[1:] for option in options], left=False)[0].to(device)
        cache.batch_select_indices(owner)
        seen = mask[owner]
        logits = model(
            inputs,
            attention_mask=torch.cat([seen, valid], dim=1),
            position_ids=seen.sum(-1, keepdim=True) + torch.arange(inputs.shape[1], device=device),
            **caching,
        ).logits
        rows = zip(logits.split(ROWS), targets.split(ROWS), strict=True)
        logprobs = [part.float().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1) for part, ids in rows]
        scores = scores + (torch.cat(logprobs) * valid).sum(-1)
    return list(scores.cpu().split(counts))


def _cache_argument(model: nn.Module) -> str:
    """``cache`` in newer transformers, ``past_key_values`` before."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model  # PEFT's forward names neither
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


def _padded(rows: Sequence[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids (rows, longest) padded with 0, and the mask of real tokens."""
    longest = max(map(len, rows))
    padding = [[0] * (longest - len(row)) for row in rows]
    ids = [pad + row if left else row + pad for row, pad in zip(rows, padding, strict=True)]
    mask = [pad + [1] * len(row) if left else [1] * len(row) + pad for row, pad in zip(rows, padding, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)
