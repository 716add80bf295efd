"""What one training step holds, counted on a model without storage: the real modules, forward and backward, run under
torch's FakeTensorMode, where a tensor has a shape, a dtype and the size of a storage, but no bytes."""

import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode, UnsupportedOperatorException
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from multilora_fast.memory.measure import AliveBytes
from multilora_fast.memory.methods import LORA, OURS, REFERENCE, adapt

FORWARD, TOP, REST, STEP = PHASES = ("forward", "backward of the last layer", "backward", "optimizer step")
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adamw_8bit": None,  # bitsandbytes': by formula
    "adafactor": torch.optim.Adafactor,
    "sgd": torch.optim.SGD,
}
# Bytes per weight: bitsandbytes' NF4 with double quantization, blocks of 64 and of 256; int8.
PACKED = {"4bit": 1 / 2 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}


@dataclass(frozen=True)
class StepSettings:
    seq_len: int
    r: int
    lora_num: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    lora_dropout: float
    target_modules: list[str] | str
    quantization: str | None
    checkpointing: bool
    optimizer: str
    device: str
    options: dict = field(default_factory=dict)  # further fields of MultiLoraConfig


def build(config: PreTrainedConfig, method: str, s: StepSettings) -> Any:
    """The causal LM as ``method`` trains it, on the meta device."""
    attention = f"multilora_fast_plan_{s.device}"
    AttentionInterface.register(attention, _attention)
    with _quiet(), torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=s.dtype, attn_implementation=attention)
        except (ValueError, KeyError):  # a model whose attention is its own code
            model = AutoModelForCausalLM.from_config(config, dtype=s.dtype)
        model.config.use_cache = False
        if s.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model = _adapted(model, method, s).train()
    if s.device == "cuda":
        keep_byte_masks(model)
    return model


@contextmanager
def _quiet():
    """Without the warnings of libraries about each other, and of scales in half precision, which nobody trains here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="lora_scaling is trained in")
        yield


def _adapted(model: Any, method: str, s: StepSettings) -> Any:
    # The kernels keep no mask, only a seed of 8 bytes.
    p = 0.0 if method == OURS and s.device == "cuda" else s.lora_dropout
    options = s.options if method in (OURS, REFERENCE) else {}
    return adapt(model, method, s.target_modules, r=s.r, lora_num=s.lora_num, lora_dropout=p, **options)


class Step:
    """A training step of one model by one method, counted at any batch size."""

    def __init__(self, config: PreTrainedConfig, method: str, s: StepSettings):
        self.settings, self.mode = s, FakeTensorMode()
        self.model = build(config, method, s)
        self.layers: Any = decoder_layers(self.model, config)
        self.head = self.model.get_output_embeddings()
        self.packed, self.dense = self._quantized() if method in (LORA, OURS) else ({}, 0)
        own = s.adapter_dtype if method in (LORA, OURS) else s.dtype
        with self.mode:
            self._fake(own)

    def _quantized(self) -> tuple[dict[str, int], int]:
        """Bytes of the packed weights by name, and of the largest as a dense one, which is there while it is used.

        A quantized base is counted as a dense one, but for these: bitsandbytes' layers save what nn.Linear saves.
        """
        if self.settings.quantization is None:
            return {}, 0
        weights = {
            f"{name}.weight": module.weight
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module is not self.head and not module.weight.requires_grad
        }
        rows = 4 if self.settings.quantization == "8bit" else 0
        each = PACKED[self.settings.quantization]
        packed = {name: round(w.numel() * each) + rows * w.shape[0] for name, w in weights.items()}
        return packed, max((w.nbytes for w in weights.values()), default=0)

    def _fake(self, trainable: torch.dtype) -> None:
        """Give every parameter and buffer a fake of itself on the CPU, a shared one once."""
        made: dict[Tensor, Any] = {}
        for module in self.model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, old in tensors.items():
                    if old is not None and old not in made:
                        new = torch.empty(old.shape, dtype=trainable if old.requires_grad else old.dtype)
                        made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                    tensors[name] = old if old is None else made[old]

    def fixed(self) -> dict[str, int]:
        """Bytes of the base's weights, which full fine-tuning trains, and of the adapter."""
        parameters = dict(self.model.named_parameters())
        adapter = 0
        if not all(p.requires_grad for p in parameters.values()):
            adapter = sum(p.nbytes for p in parameters.values() if p.requires_grad)
        weights = sum(self.packed.get(name, p.nbytes) for name, p in parameters.items()) - adapter
        return {"weights": weights + sum(b.nbytes for b in self.model.buffers()), "adapter": adapter}

    def count(self, batch: int) -> dict[str, int]:
        """Bytes by kind; under a name of PHASES the most that is alive in it, and under "PHASE: gradients" and
        "PHASE: activations" how much of that they are."""
        found = self.fixed()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        with self.mode:
            ids = torch.zeros(batch, self.settings.seq_len, dtype=torch.long)
            alive = AliveBytes([*self.model.parameters(), *self.model.buffers(), ids])
            optimizer = self._optimizer(trainable)
            handles = self._watch(alive, trainable)
            try:
                with _quiet(), alive:
                    alive.phase, alive.kind = FORWARD, "activations"
                    loss = self._forward(ids)
                    found["activations"] = alive.kinds["activations"]
                    found["logits"] = alive.live - found["activations"]
                    alive.phase = TOP
                    loss.backward()
                    del loss
                    found["gradients"] = alive.kinds["gradients"]
                    alive.phase = STEP
                    if optimizer is not None:
                        optimizer.step()
            finally:
                for handle in handles:
                    handle.remove()
            found["optimizer"] = self._state(optimizer, trainable)
            for p in trainable:
                p.grad = None
        held = found["weights"] + found["adapter"]
        for phase in (FORWARD, TOP, REST):
            found[phase] = held + found["optimizer"] + self.dense + alive.peaks[phase]
        formula = found["optimizer"] if optimizer is None else 0
        found[STEP] = held + formula + max(alive.peaks[STEP], found["gradients"])
        alive.at_peak[STEP]["gradients"] = found["gradients"]
        kinds = ("gradients", "activations")
        return found | {f"{phase}: {kind}": alive.at_peak[phase][kind] for phase in PHASES for kind in kinds}

    def _forward(self, ids: Tensor) -> Tensor:
        try:
            return self.model(input_ids=ids, labels=ids).loss
        except (DynamicOutputShapeException, UnsupportedOperatorException) as error:
            kind = type(self.model.config).__name__
            raise ValueError(
                f"model_or_config is a {kind}, whose step cannot be counted without its values: {error}"
            ) from error

    def _optimizer(self, trainable: list[nn.Parameter]) -> torch.optim.Optimizer | None:
        cls: Any = OPTIMIZERS[self.settings.optimizer]
        # The Trainer's default on a GPU; torch's own default there copies all second moments at once.
        options = {"fused": True} if cls is torch.optim.AdamW and self.settings.device == "cuda" else {"foreach": False}
        return cls and cls(trainable, lr=1e-4, **options)

    def _state(self, optimizer: torch.optim.Optimizer | None, trainable: list[nn.Parameter]) -> int:
        if optimizer is not None:
            return sum(t.nbytes for state in optimizer.state.values() for t in state.values())
        # Two moments of a byte with a float32 per block of 256; small tensors keep float32 moments.
        return sum(2 * (p.numel() + p.numel() // 64) if p.numel() >= 4096 else 8 * p.numel() for p in trainable)

    def _watch(self, alive: AliveBytes, trainable: list[nn.Parameter]) -> list:
        """Hooks that note where the logits begin, where the last layer's backward is done, and each gradient."""

        def logits(*_):
            alive.kind = ""

        def last(module, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            if x.requires_grad:
                x.register_hook(done)

        def done(_):
            alive.phase = REST

        def gradient(parameter):
            alive.kinds["gradients"] += parameter.grad.nbytes

        return [
            *(p.register_post_accumulate_grad_hook(gradient) for p in trainable),
            self.head.register_forward_pre_hook(logits),
            self.layers[-1].register_forward_pre_hook(last, with_kwargs=True),
        ]


def decoder_layers(model: Any, config: PreTrainedConfig) -> nn.ModuleList:
    """The list of the model's decoder layers.

    Raises:
        ValueError: there is none of the config's length, or no head after it.
    """
    count = config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists or model.get_output_embeddings() is None:
        raise ValueError(
            f"model_or_config must be a decoder's, but a {type(config).__name__} makes no list of layers and a head."
        )
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


class GpuDropout(nn.Dropout):
    """Dropout that keeps its mask in one byte per element, as on a GPU. On a CPU nn.Dropout keeps it in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, True)[0] if self.p and self.training else x


def keep_byte_masks(model: nn.Module) -> None:
    """Make every nn.Dropout of ``model`` a :class:`GpuDropout`."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = GpuDropout


class FlashAttention(torch.autograd.Function):
    """The tensors of FlashAttention-2's forward and backward on a GPU, not their values.

    From (batch, heads, T, head_dim) to (batch, T, heads, head_dim).
    """

    @staticmethod
    def forward(ctx, query, key, value):
        batch, heads, T, _ = query.shape
        out = query.new_empty(batch, T, heads, value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        sums = torch.empty_like(query, dtype=torch.float32)
        # With fewer heads of keys than of queries, each query head writes a dk and dv of its own, which are then added.
        own = [t.new_empty(*query.shape[:-1], t.shape[-1]) for t in (key, value) if t.shape[1] != query.shape[1]]
        gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del sums, own
        return gradients


def _attention(module, query, key, value, attention_mask, **options):
    """transformers' sdpa attention, or what it is on a GPU, of rows without padding. Fake masks are left out: nothing
    could see that they are causal, and they would be kept."""
    if module.config._attn_implementation.endswith("cuda"):
        return FlashAttention.apply(query, key, value), None
    return sdpa_attention_forward(module, query, key, value, None, **options)
