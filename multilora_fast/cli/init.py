"""The command ``init``."""

import json
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from multilora_fast.cli.paths import OVERWRITE, given_path, modules
from multilora_fast.console import quiet


def init(
    model: Annotated[str, Argument(help="Base model, a directory or hub id. Only its config is read.")],
    out: Annotated[Path, Argument(help="Output directory for the adapter.", parser=given_path)],
    lora_num: Annotated[int, Option(help="Parallel branches per layer, n.")] = 3,
    r: Annotated[int, Option(help="Rank of each branch.")] = 32,
    target_modules: Annotated[
        str | None,
        Option(
            help="Comma-separated names of the modules to adapt, all-linear, or a regular expression for whole names.",
            show_default="LoRA's for this architecture",
        ),
    ] = None,
    exclude_modules: Annotated[str | None, Option(help="Modules not to adapt, as in --target-modules.")] = None,
    lora_alpha: Annotated[
        float | None, Option(help="LoRA alpha; branches are scaled by alpha / r.", show_default="r")
    ] = None,
    lora_dropout: Annotated[float, Option(help="Dropout before the branches.")] = 0.0,
    scaling: Annotated[str, Option(help="Learned scale per branch: vector or scalar.")] = "vector",
    rank_pattern: Annotated[str, Option(help="Ranks by the end of module names, as a JSON object.")] = "{}",
    alpha_pattern: Annotated[str, Option(help="LoRA alphas by the end of module names, as a JSON object.")] = "{}",
    lora_num_pattern: Annotated[str, Option(help="Branch counts by the end of module names, as a JSON object.")] = "{}",
    layers_to_transform: Annotated[str | None, Option(help="Comma-separated indices of the layers to adapt.")] = None,
    layers_pattern: Annotated[str | None, Option(help="Name of the module list that holds the layers.")] = None,
    save_inputs: Annotated[str, Option(help="Inputs kept for backward: exact, or fp8 (8 bits).")] = "exact",
    share_inputs: Annotated[bool, Option(help="Read the input of q, k, v and of gate, up once.")] = True,
    exact_base: Annotated[
        bool, Option("--exact-base", help="Compute the base product with torch, never the joint kernel.")
    ] = False,
    init_weights: Annotated[bool, Option(help="Start scales at zero; otherwise draw them.")] = True,
    task_type: Annotated[str, Option(help="PEFT task: CAUSAL_LM, SEQ_2_SEQ_LM or FEATURE_EXTRACTION.")] = "CAUSAL_LM",
    dtype: Annotated[
        str | None,
        Option(
            help="Dtype in which training loads the base: float32, bfloat16 or float16. Branches are drawn in it and "
            "stored in float32.",
            show_default="the config's; float32 for a quantized model",
        ),
    ] = None,
    seed: Annotated[int, Option(help="Random seed.")] = 0,
    overwrite: Annotated[bool, OVERWRITE] = False,
    as_json: Annotated[bool, Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Write an untrained adapter for trainers that continue from a PEFT adapter. Run them by
    python -m multilora_fast.peft."""
    options = dict(locals())
    for name in ("model", "out", "dtype", "seed", "overwrite", "as_json"):
        del options[name]
    quiet()
    from multilora_fast.peft import MultiLoraConfig, init_adapter

    options["target_modules"], options["exclude_modules"] = modules(target_modules), modules(exclude_modules)
    options["layers_to_transform"] = layers_to_transform and _indices(layers_to_transform)
    for name in ("rank_pattern", "alpha_pattern", "lora_num_pattern"):
        options[name] = _pattern(f"--{name.replace('_', '-')}", options[name])
    made = init_adapter(model, out, MultiLoraConfig(**options), seed=seed, dtype=dtype, overwrite=overwrite)
    if as_json:
        print(json.dumps({"output": str(out), **made}, indent=1))
    else:
        print(f"{out}: an untrained adapter on {made['modules']} modules, {made['parameters']:,} parameters")


def _indices(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--layers-to-transform must be integers with commas between them, not {text!r}.") from None


def _pattern(option: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f'{option} must be a JSON object such as {{"q_proj": 16}}, not {text!r}.')
    return found
