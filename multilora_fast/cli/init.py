"""The command ``init``. Mistakes are ValueErrors of one sentence."""

import json
import logging
import re
import warnings
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from multilora_fast.cli.paths import given_path


def init(
    model: Annotated[str, Argument(help="Directory or hub id of the base model, of which only the config is read.")],
    out: Annotated[Path, Argument(help="Directory for the adapter, which must be new.", parser=given_path)],
    lora_num: Annotated[int, Option(help="Parallel branches per layer, n.")] = 3,
    r: Annotated[int, Option(help="Rank of each branch.")] = 32,
    target_modules: Annotated[
        str | None,
        Option(
            help="Names of the modules to adapt, with commas, or all-linear, or a regular expression for whole names.",
            show_default="those of LoRA for this architecture",
        ),
    ] = None,
    exclude_modules: Annotated[str | None, Option(help="Modules to leave alone, as target-modules.")] = None,
    lora_alpha: Annotated[float | None, Option(help="Branches are scaled by alpha / r; it is r if not given.")] = None,
    lora_dropout: Annotated[float, Option(help="Dropout before the branches.")] = 0.0,
    scaling: Annotated[str, Option(help="A branch's learned scale: vector or scalar.")] = "vector",
    rank_pattern: Annotated[str, Option(help="r by the end of a module's name, as JSON.")] = "{}",
    alpha_pattern: Annotated[str, Option(help="lora_alpha so.")] = "{}",
    lora_num_pattern: Annotated[str, Option(help="lora_num so.")] = "{}",
    layers_to_transform: Annotated[str | None, Option(help="Indices of the layers to adapt, with commas.")] = None,
    layers_pattern: Annotated[str | None, Option(help="Name of the list that they are in.")] = None,
    modules_to_save: Annotated[str | None, Option(hidden=True)] = None,
    bias: Annotated[str, Option(hidden=True)] = "none",
    save_inputs: Annotated[str, Option(help="exact, or fp8 to keep inputs for backward in 8 bits.")] = "exact",
    share_inputs: Annotated[bool, Option(help="Let q, k, v and gate, up read their input once.")] = True,
    exact_base: Annotated[bool, Option("--exact-base", help="Keep the base layer's product the library's.")] = False,
    init_weights: Annotated[bool, Option(help="Start scales at zero; otherwise draw them, for tests.")] = True,
    task_type: Annotated[str, Option(help="CAUSAL_LM, SEQ_2_SEQ_LM or FEATURE_EXTRACTION.")] = "CAUSAL_LM",
    dtype: Annotated[
        str | None,
        Option(
            help="That the base will be loaded in, float32, bfloat16 or float16: branches are drawn in it and kept in "
            "float32.",
            show_default="the config's; float32 for a quantized model",
        ),
    ] = None,
    seed: Annotated[int, Option(help="As of torch.manual_seed(SEED) right before get_peft_model.")] = 0,
    as_json: Annotated[bool, Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Write an untrained adapter, which every trainer that goes on from a PEFT adapter trains: run the trainer by
    python -m multilora_fast.peft."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels for CPUs that it did not find
    from transformers.utils import logging as transformers_logging

    from multilora_fast.peft import MultiLoraConfig, init_adapter

    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries about each other
    options: dict[str, Any] = {
        "lora_num": lora_num,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "scaling": scaling,
        "bias": bias,
        "save_inputs": save_inputs,
        "share_inputs": share_inputs,
        "exact_base": exact_base,
        "init_weights": init_weights,
        "task_type": task_type,
        "target_modules": _modules(target_modules),
        "exclude_modules": _modules(exclude_modules),
        "modules_to_save": modules_to_save and modules_to_save.split(","),
        "layers_to_transform": layers_to_transform and _indices(layers_to_transform),
        "layers_pattern": layers_pattern,
        "rank_pattern": _pattern("--rank-pattern", rank_pattern),
        "alpha_pattern": _pattern("--alpha-pattern", alpha_pattern),
        "lora_num_pattern": _pattern("--lora-num-pattern", lora_num_pattern),
    }
    made = init_adapter(model, out, MultiLoraConfig(**options), seed=seed, dtype=dtype)
    if as_json:
        print(json.dumps({"output": str(out), **made}, indent=1))
    else:
        print(f"{out}: an untrained adapter on {made['modules']} modules, {made['parameters']:,} parameters")


def _modules(text: str | None) -> list[str] | str | None:
    """Names, or the text itself if it is "all-linear" or holds what no name does: a regular expression."""
    if text is None or text.lower() == "all-linear" or not re.fullmatch(r"[\w.,\s-]*", text):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


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
