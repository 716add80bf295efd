"""Export an adapter and load it in plain PEFT: ``python examples/serve_export.py MODEL ADAPTER LORA``.

The directory LORA is then served as any LoRA:

    vllm serve MODEL --enable-lora --max-lora-rank 32 --lora-modules mine=LORA
    python llama.cpp/convert_lora_to_gguf.py LORA --base MODEL    # then: llama-server -m MODEL.gguf --lora LORA.gguf
"""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import multilora_fast.peft  # noqa: F401  (registers the method, for the adapter; the export does not need it)
from multilora_fast import export_lora


@torch.no_grad()
def main(name: str, adapter: str, lora: str) -> float:
    print(export_lora(adapter, lora))  # the rank, and the --max-lora-rank that vLLM needs
    ids = AutoTokenizer.from_pretrained(name)("The sky is", return_tensors="pt").input_ids
    ours, plain = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), directory).eval()
        for directory in (adapter, lora)
    )
    return (ours(ids).logits - plain(ids).logits).abs().max().item()


if __name__ == "__main__":
    print(f"the export's logits differ by {main(*sys.argv[1:]):.1g}")
