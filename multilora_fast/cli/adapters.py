"""The commands that turn adapters into others: ``export`` and ``merge``. Mistakes are ValueErrors of one sentence."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer


def export(
    adapter: Annotated[Path, typer.Argument(help="Directory of a MultiLoRA adapter.")],
    out: Annotated[Path, typer.Argument(help="Directory for the LoRA adapter.")],
    model: Annotated[
        str | None,
        typer.Option(help="Base model, as a directory or hub id, to compare logits with.", show_default="no check"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Write a MultiLoRA adapter as a plain LoRA of the same function, for vLLM and every other server of LoRAs."""
    from multilora_fast.adapters.export import write_lora
    from multilora_fast.adapters.files import check_new_adapter
    from multilora_fast.models import model_source

    check_new_adapter(out, "export")
    compared: dict[str, float] = {}

    def compare(lora: Path) -> None:
        difference, largest = _compare(str(model), adapter, lora)
        if not difference <= 1e-6 * largest:
            raise ValueError(
                f"the export's logits differ from the source's by {difference:.3g}, of at most {largest:.3g}: "
                f"nothing was written to {out}."
            )
        compared.update(logits_differ_by=difference, largest_logit=largest)
        if not as_json:
            print(f"logits differ by {difference:.3g}, of at most {largest:.3g}")

    if model is not None:
        model_source("--model", model)
    report = write_lora(adapter, out, verify=None if model is None else compare)
    if as_json:
        _print_json({"output": str(out), **asdict(report), **compared})
    else:
        print(f"{out}: {report}")


def merge(
    lora_dirs: Annotated[list[Path], typer.Argument(help="Directories of LoRA adapters of one base model.")],
    output: Annotated[Path, typer.Option(help="Directory for the MultiLoRA adapter.")],
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
    logit."""
    import torch
    from peft import PeftModel

    import multilora_fast.peft  # noqa: F401  (registers the method)
    from multilora_fast.models import load_model

    outputs = []
    for directory in (adapter, lora):
        base: Any = load_model(model, torch.float32, torch.device("cpu"))
        try:
            adapted = PeftModel.from_pretrained(base, str(directory)).eval()
        except RuntimeError as error:
            raise ValueError(f"{directory} does not fit {model}: {' '.join(str(error).split())[:300]}") from error
        ids = torch.randint(base.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            outputs.append(adapted(ids).logits)
    source, exported = outputs
    return (source - exported).abs().max().item(), source.abs().max().item()
