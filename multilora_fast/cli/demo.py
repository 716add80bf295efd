"""The ``demo`` command. Invalid input raises a ValueError of one sentence."""

from pathlib import Path
from typing import Annotated

from typer import Option

from multilora_fast.cli.paths import given_path
from multilora_fast.console import quiet


def demo(
    model: Annotated[
        str | None, Option(help="Directory or hub id of a causal LM.", show_default="SmolLM2-135M")
    ] = None,
    steps: Annotated[int | None, Option(help="Training steps.", show_default="160, quick: 6")] = None,
    batch_size: Annotated[int, Option(help="Examples per step.")] = 8,
    max_length: Annotated[int, Option(help="Longest example in tokens; others are dropped.")] = 160,
    learning_rate: Annotated[float, Option(help="Peak learning rate of AdamW.")] = 2e-3,
    lora_num: Annotated[int, Option(help="Parallel branches per layer, n.")] = 3,
    r: Annotated[int, Option(help="Rank of each branch.")] = 8,
    lora_alpha: Annotated[float | None, Option(help="Branches are scaled by alpha / r.", show_default="r")] = None,
    lora_dropout: Annotated[float, Option(help="Dropout before the branches.")] = 0.05,
    target_modules: Annotated[
        str, Option(help="Comma-separated names of the linear layers to adapt.")
    ] = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
    dtype: Annotated[str, Option(help="Base model dtype: float32, bfloat16, or auto (by device).")] = "auto",
    eval_items: Annotated[int | None, Option(help="Held-out examples per task.", show_default="100, quick: 8")] = None,
    seed: Annotated[int, Option(help="Random seed.")] = 0,
    device: Annotated[str, Option(help="Device: auto, cpu or cuda.")] = "auto",
    output: Annotated[
        Path, Option(help="Directory for the adapter, metrics.json and comparison.png.", parser=given_path)
    ] = Path("demo-output"),
    compare: Annotated[bool, Option(help="Also train naive MultiLoRA and PEFT LoRA for comparison.")] = True,
    quick: Annotated[bool, Option("--quick", help="Run for a minute or two, without an accuracy claim.")] = False,
) -> None:
    """Fine-tune a small model on four real tasks and compare the cost of a step with LoRA's."""
    given = {name: value for name, value in locals().items() if name not in ("compare", "quick")}
    from multilora_fast.demo.settings import DemoSettings

    given["steps"] = steps if steps is not None else 6 if quick else 160
    given["eval_items"] = eval_items if eval_items is not None else 8 if quick else 100
    given["lora_alpha"] = r if lora_alpha is None else lora_alpha
    given["target_modules"] = tuple(name.strip() for name in target_modules.split(",") if name.strip())
    settings = DemoSettings(**given, rounds=0 if not compare else 2 if quick else 5)
    settings.check()
    print("Loading torch and transformers ...", flush=True)
    quiet()
    from multilora_fast.demo.run import run

    run(settings)
    if quick:
        print("This was a quick run: too short for its accuracies and times to mean anything.")
