"""The commands ``export`` and ``merge``."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from multilora_fast.cli.paths import OVERWRITE, given_path
from multilora_fast.console import quiet
from multilora_fast.files import atomic_dir, check_new_folder

_AUTO: dict[str | None, str] = {  # PEFT's task types but CAUSAL_LM, and transformers' classes
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def export(
    adapter: Annotated[Path, Argument(help="Directory of a MultiLoRA adapter.", parser=given_path)],
    out: Annotated[Path, Argument(help="Output directory for the LoRA adapter.", parser=given_path)],
    model: Annotated[
        str | None,
        Option(help="Base model to compare logits with, a directory or hub id.", show_default="no check"),
    ] = None,
    layout: Annotated[
        str,
        Option(
            help="Layout of experts: peft, for models whose experts vLLM keeps as 3-D weights (gpt-oss), or "
            "per-expert, for others (Qwen3-MoE, Mixtral)."
        ),
    ] = "peft",
    overwrite: Annotated[bool, OVERWRITE] = False,
    as_json: Annotated[bool, Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Write a MultiLoRA adapter as a plain LoRA that computes the same, for vLLM and other LoRA servers."""
    from multilora_fast.adapters.export import export_lora
    from multilora_fast.adapters.files import CONFIG
    from multilora_fast.models import model_source

    quiet()
    check_new_folder("the output", out, overwrite)
    if model is not None:
        model_source("--model", model)
    compared = {}
    with atomic_dir(out, last=CONFIG) as stage:
        report = export_lora(adapter, stage, layout=layout)
        if model is not None:
            difference, largest = _compare(model, adapter, stage)
            # PEFT adds an update of experts, which have a layout, to their weights, and rounds the sum.
            if not difference <= (1e-6 if report.layout is None else 5e-6) * largest:
                raise ValueError(
                    f"the export's logits differ from the source's by {difference:.3g}, of at most {largest:.3g}: "
                    f"nothing was written to {out}."
                )
            compared = {"logits_differ_by": difference, "largest_logit": largest}
    if as_json:
        fields = asdict(report)
        if report.layout is None:  # the other fields describe experts
            fields = {name: fields[name] for name in ("rank", "modules", "max_lora_rank")}
        print(json.dumps({"output": str(out), **fields, **compared}, indent=1))
        return
    if compared:
        print(f"logits differ by at most {difference:.3g}; the largest logit is {largest:.3g}")
    print(f"{out}: {report}")


def merge(
    lora_dirs: Annotated[
        list[Path], Argument(help="Directories of LoRA adapters of one base model.", parser=given_path)
    ],
    output: Annotated[Path, Option(help="Output directory for the MultiLoRA adapter.", parser=given_path)],
    weights: Annotated[
        str | None, Option(help="Comma-separated numbers, one per adapter.", show_default="1 for each")
    ] = None,
    overwrite: Annotated[bool, OVERWRITE] = False,
    as_json: Annotated[bool, Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Make one MultiLoRA adapter whose branches are existing LoRA adapters, to use or to train further."""
    from multilora_fast.adapters.merge import from_loras

    try:
        numbers = [1.0] * len(lora_dirs) if weights is None else [float(word) for word in weights.split(",")]
    except ValueError:
        raise ValueError(f"weights must be numbers with commas between them, not {weights!r}.") from None
    if len(numbers) != len(lora_dirs):
        raise ValueError(
            f"--weights must hold one number per adapter, {len(lora_dirs)}, with commas between them, not {weights!r}."
        )
    from_loras(lora_dirs, output, weights=numbers, overwrite=overwrite)
    if as_json:
        print(json.dumps({"output": str(output), "adapters": list(map(str, lora_dirs)), "weights": numbers}, indent=1))
    else:
        count = len(lora_dirs)
        branches = "1 LoRA adapter as the branch" if count == 1 else f"{count} LoRA adapters as the branches"
        print(f"{output}: {branches} of one MultiLoRA adapter. Load it as any PEFT adapter, after multilora_fast.peft.")


def _compare(model: str, adapter: Path, lora: Path) -> tuple[float, float]:
    """The largest difference between the logits of both adapters, on random tokens in float32, and the largest logit.
    Where the LoRA stores B in half precision, the source's B is rounded likewise."""
    import torch
    from peft import PeftModel

    import multilora_fast.peft  # noqa: F401  (registers the method)
    from multilora_fast.adapters.files import read_multilora

    source = read_multilora(adapter)
    outputs = []
    for directory in (adapter, lora):
        base = _load_base(model, source.config, source.whole)
        try:
            with warnings.catch_warnings():
                # PEFT looks for the keys of these patterns among modules alone, and not among target_parameters.
                warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
                adapted: Any = PeftModel.from_pretrained(base, str(directory)).eval()
        except RuntimeError as error:
            raise ValueError(f"{directory} does not fit {model}: {' '.join(str(error).split())[:300]}") from error
        if directory is adapter:
            _round_as_stored(adapted, source.modules)
        config = base.config.get_text_config()
        length = min(32, (getattr(config, "max_position_embeddings", None) or 32) - 2)
        ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
        decoder = {"decoder_input_ids": ids} if base.config.is_encoder_decoder else {}
        with torch.no_grad():
            outputs.append(adapted(input_ids=ids, **decoder)[0])
    return (outputs[0] - outputs[1]).abs().max().item(), outputs[0].abs().max().item()


def _load_base(model: str, config: dict, whole: dict) -> Any:
    """The adapter's base model: of its task, with its head's number of labels and its vocabulary."""
    import torch

    from multilora_fast.models import load_model

    auto = _AUTO.get(config.get("task_type"), "AutoModelForCausalLM")
    heads = set(config.get("modules_to_save") or ())
    labels = [t.shape[0] for name, t in whole.items() if t.dim() == 2 and heads & set(name.split("."))]
    options = {"num_labels": min(labels)} if labels else {}
    base: Any = load_model(model, torch.float32, torch.device("cpu"), auto, **options)
    text = base.config.get_text_config()
    if text.pad_token_id is None:  # classifiers find a sequence's last token by it
        text.pad_token_id = 0
    for name, layer in base.named_modules():
        if layer in (base.get_input_embeddings(), base.get_output_embeddings()):
            kept = whole.get(f"{name}.weight", whole.get(f"{name}.base_layer.weight"))
            if kept is not None and len(kept) != len(layer.weight):
                base.resize_token_embeddings(len(kept), mean_resizing=False)
    return base


def _round_as_stored(adapted: Any, stored: dict[str, Any]) -> None:
    """Replace B and the scales of a model's MultiLoRA adapter by B̃ as the LoRA stores it in half precision."""
    import torch

    from multilora_fast.adapters.branches import as_lora, collect
    from multilora_fast.adapters.export import rounded

    for name, module in collect(adapted).items():
        B = rounded(as_lora(stored[name])[1], stored[name])
        if B.dtype in (torch.bfloat16, torch.float16):
            branches: Any = module
            branches.lora_B.data.copy_(B.unflatten(-1, (-1, stored[name].r)).movedim(-2, -3))
            branches.lora_scaling.data.fill_(1.0)
            branches.scaling_factor = 1.0
