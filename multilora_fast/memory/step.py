"""What one training step holds, counted on a model without storage: the real modules, forward and backward, run under
torch's FakeTensorMode, where a tensor has a shape, a dtype and the size of a storage, but no bytes."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, PreTrainedConfig

from multilora_fast.memory import cuda, fsdp
from multilora_fast.memory.measure import AliveBytes
from multilora_fast.memory.methods import LORA, OURS, adapt

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
    gradient_accumulation: int = 1
    fsdp: int | None = None
    options: dict = field(default_factory=dict)  # further fields of MultiLoraConfig


def build(config: PreTrainedConfig, method: str, s: StepSettings) -> Any:
    """The causal LM as ``method`` trains it, on the meta device.

    Raises:
        CannotCount: it cannot be built.
        CannotAdapt: the method cannot adapt its modules.
        ValueError: targets that match nothing.
    """
    with _quiet(), torch.device("meta"):
        with explained(config, "of which no model can be built"):
            model = causal_lm(config, s.dtype)
            model.config.use_cache = False
            if s.checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        return adapt(
            model, method, s.target_modules, r=s.r, lora_num=s.lora_num, lora_dropout=s.lora_dropout, **s.options
        ).train()


def causal_lm(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """A model of ``config`` with the attention that transformers chooses for it, or its own where it asks for eager,
    and with its choice of experts, where they are not batched_mm's."""
    config = copy.deepcopy(config)
    if config._attn_implementation != "eager":  # the choice of another machine, or of packages that may not be here
        config._attn_implementation_internal = None
    if getattr(config.get_text_config(), "_experts_implementation", None) != "batched_mm":
        config._experts_implementation = None
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


# What the code of a model raises where its config contradicts itself, or where it asks a tensor for its values.
OF_MODELS = (RuntimeError, AttributeError, TypeError, ValueError, LookupError, ArithmeticError, ImportError)
UNCOUNTED = "whose step cannot be counted without its values"


class CannotCount(ValueError):
    """A model that cannot be built from its config, or whose step depends on the values of its tensors."""


@contextmanager
def explained(config: PreTrainedConfig, what: str) -> Iterator[None]:
    """Turns what a model raises inside into a CannotCount that names it, and says ``what`` cannot be done."""
    try:
        yield
    except OF_MODELS as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CannotCount(f"model_or_config is a {type(config).__name__}, {what}: {reason}") from error


@contextmanager
def _quiet():
    """Without the warnings of libraries about each other, and of scales in half precision, which nobody trains here,
    and without the tracebacks that torch logs of errors that :func:`explained` explains."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    with warnings.catch_warnings(), patch.object(log, "disabled", True):
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="lora_scaling is trained in")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        yield


class Step:
    """A training step of one model by one method, counted at any batch size."""

    def __init__(self, config: PreTrainedConfig, method: str, s: StepSettings):
        self.config, self.settings, self.mode = config, s, FakeTensorMode()
        self.model = build(config, method, s)
        self.layers: Any = decoder_layers(self.model, config)
        self.head = self.model.get_output_embeddings()
        self.packed, self.dense = self._quantized() if method in (LORA, OURS) else ({}, 0)
        own = s.adapter_dtype if method in (LORA, OURS) else s.dtype
        mesh = None if s.fsdp is None else init_device_mesh("cpu", (s.fsdp,))
        with self.mode:
            self._fake(own)
            if mesh is not None:
                fsdp.shard(self.model, self.layers, mesh)

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
        parameters = {name: (p, fsdp.local(p).nbytes) for name, p in self.model.named_parameters()}
        adapter = 0
        if not all(p.requires_grad for p, _ in parameters.values()):
            adapter = sum(size for p, size in parameters.values() if p.requires_grad)
        weights = sum(self.packed.get(name, size) for name, (_, size) in parameters.items()) - adapter
        return {"weights": weights + sum(b.nbytes for b in self.model.buffers()), "adapter": adapter}

    def count(self, batch: int) -> dict[str, int]:
        """Bytes by kind; under a name of PHASES the most that is alive in it, and under "PHASE: gradients" and
        "PHASE: activations" how much of that they are."""
        s, found = self.settings, self.fixed()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        held = [fsdp.local(t) for t in (*self.model.parameters(), *self.model.buffers())]
        with self.mode, self._as_run(), explained(self.config, UNCOUNTED), _quiet():
            ids = torch.zeros(batch, s.seq_len, dtype=torch.long)
            if s.fsdp is not None:  # a first step makes the storages that it gathers weights into, and keeps
                with AliveBytes(held):
                    self.model(input_ids=ids, labels=ids).loss.backward()
                _forget(trainable)
            alive = AliveBytes([*held, ids], on_cpu=s.device == "cpu")
            handles = self._watch(alive, trainable)
            try:
                with alive:
                    for last in self._backwards():
                        if s.fsdp is not None:
                            self.model.set_requires_gradient_sync(last)
                        found = self._forward_and_backward(ids, alive) | found
                    found["gradients"] = alive.kinds["gradients"]
                    own = trainable if s.fsdp is None else _shards(trainable)
                    alive.phase = STEP
                    optimizer = self._optimizer(own)
                    if optimizer is not None:
                        optimizer.step()
            finally:
                for handle in handles:
                    handle.remove()
            found["optimizer"] = self._state(optimizer, own)
            _forget(trainable)
        always = found["weights"] + found["adapter"]
        for phase in (FORWARD, TOP, REST):
            found[phase] = always + found["optimizer"] + self.dense + alive.peaks[phase]
        formula = found["optimizer"] if optimizer is None else 0
        found[STEP] = always + formula + max(alive.peaks[STEP], found["gradients"])
        alive.at_peak[STEP]["gradients"] = found["gradients"]
        kinds = ("gradients", "activations")
        return found | {f"{phase}: {kind}": alive.at_peak[phase][kind] for phase in PHASES for kind in kinds}

    def _backwards(self) -> list[bool]:
        """Whether each backward that is counted is the last one, before which the Trainer keeps FSDP2's gradients
        whole on every GPU. What is left out is as the one before it."""
        apart = 2 if self.settings.fsdp is None else 3
        few = min(self.settings.gradient_accumulation, apart)
        return [False] * (few - 1) + [True]

    def _forward_and_backward(self, ids: Tensor, alive: AliveBytes) -> dict[str, int]:
        """A forward and its backward; returns what is kept in between."""
        before = alive.live
        alive.phase, alive.kind = FORWARD, "activations"
        loss = self.model(input_ids=ids, labels=ids).loss
        kept = {"activations": alive.kinds["activations"]}
        kept["logits"] = alive.live - before - kept["activations"]
        alive.phase = TOP
        loss.backward()
        return kept

    @contextmanager
    def _as_run(self) -> Iterator[None]:
        """Fake tensors are neither those of a graph being traced, nor on a GPU where they stand for its tensors."""
        with ExitStack() as stack:
            stack.enter_context(patch("transformers.masking_utils.is_tracing", lambda *_: False))
            if self.settings.device == "cuda":
                stack.enter_context(cuda.cuda_operations())
                stack.enter_context(cuda.kernels())
            yield

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

        seen = set()

        def gradient(parameter):
            if parameter not in seen:
                seen.add(parameter)
                alive.kinds["gradients"] += fsdp.local(parameter.grad).nbytes

        return [
            *(p.register_post_accumulate_grad_hook(gradient) for p in trainable),
            self.head.register_forward_pre_hook(logits),
            self.layers[-1].register_forward_pre_hook(last, with_kwargs=True),
        ]


def _forget(trainable: list[nn.Parameter]) -> None:
    for p in trainable:
        p.grad = None


def _shards(trainable: list[nn.Parameter]) -> list[nn.Parameter]:
    """What this rank's optimizer works on."""
    own = [nn.Parameter(fsdp.local(p.detach())) for p in trainable]
    for shard, p in zip(own, trainable, strict=True):
        shard.grad = None if p.grad is None else fsdp.local(p.grad)
    return own


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
