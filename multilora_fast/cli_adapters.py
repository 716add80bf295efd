"""The commands that turn adapters into others: ``export`` and ``merge``. Mistakes are ValueErrors of one sentence."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    adapter: Annotated[Path, typer.Argument(help="Directory of a MultiLoRA adapter.")],
    out: Annotated[Path, typer.Argument(help="Directory for the LoRA adapter.")],
    model: Annotated[
        str | None,
        typer.Option(help="Base model, as a directory or hub id, to compare logits with.", show_default="no check"),
    ] = None,
) -> None:
    """Write a MultiLoRA adapter as a plain LoRA of the same function, for vLLM and every other server of LoRAs."""
    import tempfile

    from multilora_fast.export import export_lora

    with tempfile.TemporaryDirectory() as temporary:
        export_lora(adapter, temporary)
        if model is not None:
            difference, largest = _compare(model, adapter, temporary)
            if not difference <= 1e-6 * largest:
                raise ValueError(
                    f"the export's logits differ from the source's by {difference:.3g}, of at most {largest:.3g}: "
                    f"nothing was written to {out}."
                )
            print(f"logits differ by {difference:.3g}, of at most {largest:.3g}")
    report = export_lora(adapter, out)
    print(f"{out}: {report}")


def merge(
    lora_dirs: Annotated[list[Path], typer.Argument(help="Directories of LoRA adapters of one base model.")],
    output: Annotated[Path, typer.Option(help="Directory for the MultiLoRA adapter.")],
    weights: Annotated[
        str | None, typer.Option(help="One number per adapter, with commas.", show_default="1 for each")
    ] = None,
) -> None:
    """Make one MultiLoRA adapter whose branches are existing LoRA adapters, ready to use or to train on."""
    from multilora_fast.task_arithmetic import from_loras

    try:
        numbers = None if weights is None else [float(word) for word in weights.split(",")]
    except ValueError:
        raise ValueError(f"weights must be numbers with commas between them, not {weights!r}.") from None
    from_loras(lora_dirs, output, weights=numbers)
    print(f"{output}: {len(lora_dirs)} LoRA adapters as the branches of one MultiLoRA adapter")


def _compare(model: str, adapter: Path, lora: str) -> tuple[float, float]:
    """The largest difference between the logits under both adapters on random tokens in float32, and the largest
    logit."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import multilora_fast.peft  # noqa: F401  (registers the method)

    outputs = []
    for directory in (adapter, lora):
        try:
            base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ValueError(f"model {model} cannot be loaded: {str(error).splitlines()[0]}") from error
        try:
            adapted = PeftModel.from_pretrained(base, str(directory)).eval()
        except RuntimeError as error:
            raise ValueError(f"{directory} does not fit {model}: {' '.join(str(error).split())[:300]}") from error
        ids = torch.randint(base.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            outputs.append(adapted(ids).logits)
    source, exported = outputs
    return (source - exported).abs().max().item(), source.abs().max().item()
