"""The effect of ``save_inputs="fp8"`` on training: ``python -m bench.fp8_inputs [--out DIR] [--quick]``.

Trains SmolLM2-135M on the demo's mixture with exact and with 8-bit inputs: same seed, batches and initial branches.
Writes fp8_inputs.json (every loss, and the relative error of each layer's gradient of lora_A on one batch after
training) and fp8_inputs.png. A second exact run with differently initialized branches shows the spread between
equivalent runs.
"""

import argparse
import json
import random
import statistics
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from tqdm import tqdm

from bench.environment import conditions
from multilora_fast import MultiLoraConfig
from multilora_fast.demo.scoring import Encoded, sample
from multilora_fast.demo.tasks import load_tasks
from multilora_fast.demo.training import pack
from multilora_fast.devices import choose_device, choose_dtype
from multilora_fast.models import LINEARS, load_model, load_tokenizer, shallow_copy

RUNS = {"exact": ("exact", 0), "fp8": ("fp8", 0), "exact, other branches": ("exact", 1)}


def adapted(base: nn.Module, save_inputs: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = MultiLoraConfig(r=8, lora_num=3, target_modules=list(LINEARS), save_inputs=save_inputs)
    return get_peft_model(shallow_copy(base), config).train()


def batches(steps: int, size: int) -> list[list[Encoded]]:
    tokenizer, draw = load_tokenizer(None), random.Random(0)
    pool = [e for t in load_tasks() for e in sample(t.train, steps * size // 4 + 1, tokenizer, max_length=96, seed=0)]
    draw.shuffle(pool)
    return [pool[i * size : (i + 1) * size] for i in range(steps)]


def train(model: nn.Module, data: list[list[Encoded]], title: str) -> list[float]:
    """The loss of every step: AdamW at 1e-3, warmup over a tenth of the steps, then linear decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    device, warmup, losses = parameters[0].device, max(1, len(data) // 10), []
    for step, batch in enumerate(tqdm(data, desc=title, unit="step")):
        share = (step + 1) / warmup if step < warmup else (len(data) - step) / (len(data) - warmup)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, share)
        loss = model(**{name: t.to(device) for name, t in pack(batch).items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def gradient_errors(model: nn.Module, batch: list[Encoded]) -> dict[str, float]:
    """The median of ‖dA with fp8 − dA‖ / ‖dA‖ by kind of layer, with the exact run's gradients elsewhere."""
    adapters = [m for m in model.modules() if hasattr(m, "save_inputs")]
    before = [m.save_inputs for m in adapters]
    found = []
    for choice in ("exact", "fp8"):
        for module in adapters:
            module.save_inputs = choice
        model.zero_grad()
        model(**{name: t.to(model.device) for name, t in pack(batch).items()}).loss.backward()
        found.append({name: p.grad.float() for name, p in model.named_parameters() if name.endswith("lora_A")})
    for module, choice in zip(adapters, before, strict=True):
        module.save_inputs = choice
    model.zero_grad()
    errors: dict[str, list[float]] = {}
    for name, exact in found[0].items():
        if exact.norm() > 0:
            kind = next(kind for kind in LINEARS if f".{kind}." in name)
            errors.setdefault(kind, []).append(((found[1][name] - exact).norm() / exact.norm()).item())
    return {kind: statistics.median(values) for kind, values in errors.items()}


def summary(runs: dict[str, list[float]]) -> dict[str, float]:
    """The mean loss of each run's last fifth, and each curve's mean distance to the exact one."""
    last = max(1, len(runs["exact"]) // 5)
    found = {f"last fifth, {name}": statistics.mean(losses[-last:]) for name, losses in runs.items()}
    for name, losses in runs.items():
        if name != "exact":
            distances = [abs(a - b) for a, b in zip(losses, runs["exact"], strict=True)]
            found[f"distance, {name}"] = statistics.mean(distances)
    return found


def plot(runs: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    width = max(1, len(runs["exact"]) // 20)
    for name, losses in runs.items():
        smooth = [statistics.mean(losses[max(0, i - width) : i + 1]) for i in range(len(losses))]
        axis.plot(smooth, label=name, linestyle="--" if name == "fp8" else "-")
    axis.set(xlabel="step", ylabel=f"loss, mean of {width + 1} steps")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="directory for fp8_inputs.json and .png")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="a few steps, as a smoke test")
    arguments = parser.parse_args()
    device = choose_device("auto")
    base = load_model(None, choose_dtype("auto", device), device).requires_grad_(False)
    steps, size = (4 if arguments.quick else arguments.steps), 4
    data, runs, errors = batches(steps, size), {}, {}
    for name, (save_inputs, seed) in RUNS.items():
        model = adapted(base, save_inputs, seed)
        runs[name] = train(model, data, name)
        if name == "exact":
            errors = gradient_errors(model, data[0])
    document = {
        "conditions": conditions(), "model": "SmolLM2-135M", "dtype": str(base.dtype).removeprefix("torch."),
        "steps": steps, "batch": size, "n": 3, "r": 8, "learning_rate": 1e-3,
        "summary": summary(runs), "error of lora_A's gradient": errors, "losses": runs,
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "fp8_inputs.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(runs, arguments.out / "fp8_inputs.png")
    for name, value in {**document["summary"], **errors}.items():
        print(f"{name:36}{value:.4f}")


if __name__ == "__main__":
    main()
