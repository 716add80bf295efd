"""The command ``plan``. Mistakes are ValueErrors of one sentence."""

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from multilora_fast.cli.paths import modules
from multilora_fast.console import quiet
from multilora_fast.files import atomic_file, check_file, check_matplotlib, check_plot


def plan(
    model: Annotated[str, Argument(help="Directory or hub id of a causal LM. Only its config is read.")],
    batch: Annotated[int, Option(help="Rows per forward, on each GPU.")] = 4,
    seq_len: Annotated[int, Option(help="Tokens per row.")] = 1024,
    lora_num: Annotated[int, Option(help="Parallel branches per layer, n.")] = 3,
    r: Annotated[int, Option(help="Rank of each branch.")] = 32,
    lora_dropout: Annotated[float, Option(help="Dropout before the branches.")] = 0.0,
    scaling: Annotated[str, Option(help="A branch's learned scale: vector or scalar.")] = "vector",
    target_modules: Annotated[
        str, Option(help="Comma-separated names of linear layers to adapt, or all-linear.")
    ] = "all-linear",
    exclude_modules: Annotated[
        str | None, Option(help="Comma-separated names of layers not to adapt.", show_default="none")
    ] = None,
    dtype: Annotated[str, Option(help="Dtype of the base: float32, bfloat16 or float16.")] = "bfloat16",
    adapter_dtype: Annotated[
        str | None, Option(help="Dtype of the adapters.", show_default="float32, PEFT's default")
    ] = None,
    quantization: Annotated[
        str | None, Option(help="Quantization of the base: 4bit (bitsandbytes' NF4) or 8bit.", show_default="none")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, Option("--gradient-checkpointing", help="Recompute activations instead of keeping them.")
    ] = False,
    gradient_accumulation: Annotated[int, Option(help="Forwards and backwards per optimizer step.")] = 1,
    fsdp: Annotated[
        int | None,
        Option(help="Number of GPUs that shard the model under FSDP2; sizes are one GPU's.", show_default="none"),
    ] = None,
    optimizer: Annotated[str, Option(help="Optimizer: adamw, adamw_8bit, adafactor or sgd.")] = "adamw",
    device: Annotated[str, Option(help="Device to plan for: cuda or cpu.")] = "cuda",
    gpu_memory: Annotated[
        str | None, Option(help="Find the largest batch for this memory, e.g. 24GiB.", show_default="none")
    ] = None,
    plot: Annotated[
        str | None, Option(help="Write a bar chart of the peaks, e.g. plan.png.", show_default="none")
    ] = None,
    output: Annotated[str | None, Option(help="Write the plan as JSON.", show_default="none")] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON document, sizes in bytes.")] = False,
) -> None:
    """Estimate the memory of a training step by full fine-tuning, LoRA, the naive loop and this library."""
    given = {name: value for name, value in locals().items() if name not in ("model", "plot", "output", "as_json")}
    if plot is not None:
        check_plot("--plot", plot)
        check_matplotlib("--plot")
    if output is not None:
        check_file("--output", output)
    quiet()
    from multilora_fast.memory.plan import plan_memory

    given["target_modules"], given["exclude_modules"] = modules(target_modules), modules(exclude_modules)
    given["checkpointing"], given["device_memory"] = given.pop("gradient_checkpointing"), given.pop("gpu_memory")
    warnings.simplefilter("ignore")  # the plan's notes repeat its warnings
    found = plan_memory(model, **given)
    say = sys.stderr if as_json else sys.stdout
    print(json.dumps(found.to_dict(), indent=1) if as_json else found)
    if plot is not None:
        print(f"wrote {found.plot(plot)}", file=say)
    if output is not None:
        with atomic_file(Path(output)) as unfinished:
            unfinished.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
        print(f"wrote {output}", file=say)
