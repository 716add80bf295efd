"""The commands that turn adapters into others: ``export`` and ``merge``. Mistakes are ValueErrors of one sentence."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from multilora_fast.cli.paths import given_path

_AUTO: dict[str | None, str] = {  # transformers' class for each task of PEFT's but CAUSAL_LM
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def export(
    adapter: Annotated[Path, typer.Argument(help="Directory of a MultiLoRA adapter.", parser=given_path)],
    out: Annotated[Path, typer.Argument(help="Directory for the LoRA adapter.", parser=given_path)],
    model: Annotated[
        str | None,
        typer.Option(help="Base model, as a directory or hub id, to compare logits with.", show_default="no check"),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            help="Of experts: peft, as vLLM takes it for models with 3-D experts (gpt-oss), or per-expert, for others "
            "(Qwen3-MoE, Mixtral)."
        ),
    ] = "peft",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Write a MultiLoRA adapter as a plain LoRA of the same function, for vLLM and every other server of LoRAs."""
    from multilora_fast.adapters.export import write_lora
    from multilora_fast.adapters.files import check_new_adapter, read_multilora
    from multilora_fast.models import model_source

    check_new_adapter(out, "export")
    compared: dict[str, float] = {}

    def compare(lora: Path) -> None:
        difference, largest = _compare(str(model), adapter, lora)
        of_experts = any(branches.experts for branches in read_multilora(adapter).modules.values())
        # PEFT adds an update of experts to their weights, and rounds the sum.
        if not difference <= (5e-6 if of_experts else 1e-6) * largest:
            raise ValueError(
                f"the export's logits differ from the source's by {difference:.3g}, of at most {largest:.3g}: "
                f"nothing was written to {out}."
            )
        compared.update(logits_differ_by=difference, largest_logit=largest)
        if not as_json:
            print(f"logits differ by {difference:.3g}, of at most {largest:.3g}")

    if model is not None:
        model_source("--model", model)
    report = write_lora(adapter, out, layout=layout, base_model=model, verify=None if model is None else compare)
    if as_json:
        fields = asdict(report)
        if report.layout is None:  # these say nothing of linear layers
            fields = {name: fields[name] for name in ("rank", "modules", "max_lora_rank")}
        _print_json({"output": str(out), **fields, **compared})
    else:
        print(f"{out}: {report}")


def merge(
    lora_dirs: Annotated[
        list[Path], typer.Argument(help="Directories of LoRA adapters of one base model.", parser=given_path)
    ],
    output: Annotated[Path, typer.Option(help="Directory for the MultiLoRA adapter.", parser=given_path)],
    weights: Annotated[
        str | None, typer.Option(help="One number per adapter, with commas.", show_default="1 for each")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Make one MultiLoRA adapter whose branches are existing LoRA adapters, ready to use or to train on."""
    from multilora_fast.adapters.merge import from_loras

    try:
        numbers = None if weights is None else [float(word) for word in weights.split(",")]
    except ValueError:
        raise ValueError(f"weights must be numbers with commas between them, not {weights!r}.") from None
    if numbers is not None and len(numbers) != len(lora_dirs):
        raise ValueError(
            f"--weights must hold one number per adapter, {len(lora_dirs)}, with commas between them, not {weights!r}."
        )
    from_loras(lora_dirs, output, weights=numbers)
    if as_json:
        used = [1.0] * len(lora_dirs) if numbers is None else numbers
        _print_json({"output": str(output), "adapters": [str(path) for path in lora_dirs], "weights": used})
    else:
        count = len(lora_dirs)
        branches = "1 LoRA adapter as the branch" if count == 1 else f"{count} LoRA adapters as the branches"
        print(f"{output}: {branches} of one MultiLoRA adapter")


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=1))


def _compare(model: str, adapter: Path, lora: Path) -> tuple[float, float]:
    """The largest difference between the logits under both adapters on random tokens in float32, and the largest
    logit. Where the LoRA's B is stored in half precision, the source's is rounded as it is."""
    import torch
    from peft import PeftModel

    import multilora_fast.peft  # noqa: F401  (registers the method)

    outputs = []
    for directory in (adapter, lora):
        base = _load_base(model, adapter)
        try:
            with warnings.catch_warnings():
                # PEFT looks for the keys of these patterns among modules alone, and not among target_parameters.
                warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
                adapted: Any = PeftModel.from_pretrained(base, str(directory)).eval()
        except RuntimeError as error:
            raise ValueError(f"{directory} does not fit {model}: {' '.join(str(error).split())[:300]}") from error
        if directory is adapter:
            _round_as_stored(adapter, adapted)
        config = base.config.get_text_config()
        length = min(32, (getattr(config, "max_position_embeddings", None) or 32) - 2)
        ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
        decoder = {"decoder_input_ids": ids} if base.config.is_encoder_decoder else {}
        with torch.no_grad():
            outputs.append(adapted(input_ids=ids, **decoder)[0])
    source, exported = outputs
    return (source - exported).abs().max().item(), source.abs().max().item()


def _load_base(model: str, adapter: Path) -> Any:
    """The model that the adapter is for: of its task, with its head's number of labels and its vocabulary."""
    import torch

    from multilora_fast.adapters.files import read_multilora
    from multilora_fast.models import load_model

    config, _, whole = read_multilora(adapter)
    auto = _AUTO.get(config.get("task_type"), "AutoModelForCausalLM")
    heads = config.get("modules_to_save") or []
    labels = [t.shape[0] for name, t in whole.items() if t.dim() == 2 and set(heads) & set(name.split("."))]
    options = {"num_labels": min(labels)} if labels else {}
    base: Any = load_model(model, torch.float32, torch.device("cpu"), auto, **options)
    if base.config.get_text_config().pad_token_id is None:  # by which classifiers find a sequence's last token
        base.config.get_text_config().pad_token_id = 0
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    for name, layer in base.named_modules():
        if any(layer is embedding for embedding in layers):
            kept = whole.get(f"{name}.weight", whole.get(f"{name}.base_layer.weight"))
            if kept is not None and len(kept) != len(layer.weight):
                base.resize_token_embeddings(len(kept), mean_resizing=False)
    return base


def _round_as_stored(adapter: Path, adapted: Any) -> None:
    """Let a model's MultiLoRA adapter compute with its B as the LoRA stores it, where that is in half precision."""
    import torch

    from multilora_fast.adapters.branches import as_lora, collect
    from multilora_fast.adapters.export import rounded
    from multilora_fast.adapters.files import read_multilora

    stored = read_multilora(adapter).modules
    for name, module in collect(adapted).items():
        B = rounded(as_lora(stored[name])[1], stored[name])
        if B.dtype not in (torch.float32, torch.float64):
            branches: Any = module
            separate = B.unflatten(-1, (stored[name].lora_num, stored[name].r)).movedim(-2, -3)
            branches.lora_B.data.copy_(separate)
            branches.lora_scaling.data.fill_(1.0)
            branches.scaling_factor = 1.0
