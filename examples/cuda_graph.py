"""A whole training step as one CUDA graph: ``PYTHONPATH=. python examples/cuda_graph.py``, on a CUDA device.

A warm-up step compiles and checks the kernels and creates the optimizer's state. The capture then records forward,
backward and AdamW. Each replay takes a step on the contents of the input buffer, with a new dropout mask. Shapes and
memory addresses are fixed at capture.
"""

import sys

import torch


def captured_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor):
    """Capture a step. Returns ``replay()``, which takes a step on ``tokens``, a buffer to copy each batch into, and
    returns the loss, a tensor that the next replay overwrites. The optimizer must be ``capturable``."""

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    stream = torch.cuda.Stream()  # warm up on a side stream, as torch.cuda.graph requires
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return loss

    return replay


def main() -> int:
    if not torch.cuda.is_available():
        print("A CUDA graph needs a CUDA device, and torch finds none here.", file=sys.stderr)
        return 1
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from multilora_fast import MultiLoraConfig

    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, vocab_size=8192)
    base = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    adapter = MultiLoraConfig(r=8, lora_num=3, lora_dropout=0.05, target_modules="all-linear")
    model = get_peft_model(base, adapter).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, capturable=True)
    tokens = torch.randint(config.vocab_size, (2, 256), device="cuda")
    step = captured_step(model, optimizer, tokens)
    for i in range(20):
        tokens.copy_(torch.arange(512).view(2, 256) + 7 * (i % 4))  # your batch
        loss = step()
    print(f"20 steps replayed, loss {loss.item():.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
