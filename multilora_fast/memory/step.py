"""Count what one training step holds. The real modules run forward and backward under torch's FakeTensorMode, where
tensors have shapes, dtypes and storage sizes, but no bytes."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedConfig

from multilora_fast.memory import cuda, fsdp
from multilora_fast.memory.measure import AliveBytes
from multilora_fast.memory.methods import LORA, OURS, CannotPlan, adapt

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
    """The causal LM as ``method`` trains it, on the meta device. Attention and experts are transformers' defaults,
    unless ``config`` asks for eager attention or batched_mm experts.

    Raises:
        CannotPlan: it cannot be built.
        ValueError: as :func:`adapt`.
    """
    config = copy.deepcopy(config)
    if config._attn_implementation != "eager":  # chosen on another machine, or needs packages that may be missing
        config._attn_implementation_internal = None
    if getattr(config.get_text_config(), "_experts_implementation", None) != "batched_mm":
        config._experts_implementation = None
    with _quiet(), torch.device("meta"):
        with explained(config, "of which no model can be built"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=s.dtype)
            model.config.use_cache = False
            if s.checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        return adapt(
            model, method, s.target_modules, r=s.r, lora_num=s.lora_num, lora_dropout=s.lora_dropout, **s.options
        ).train()


# Raised by a model's code if its config contradicts itself, or if it reads the values of a tensor.
OF_MODELS = (RuntimeError, AttributeError, TypeError, ValueError, LookupError, ArithmeticError, ImportError)
UNCOUNTED = "whose step cannot be counted without its values"


@contextmanager
def explained(config: PreTrainedConfig, what: str) -> Iterator[None]:
    """Turn an error of the model's code into a CannotPlan that names the model and ``what`` cannot be done."""
    try:
        yield
    except OF_MODELS as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CannotPlan(f"model_or_config is a {type(config).__name__}, {what}: {reason}") from error


@contextmanager
def _quiet():
    """Silence warnings that do not matter here, and the tracebacks that torch logs of errors of :func:`explained`."""
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
                for module in (*self.layers, self.model):
                    fully_shard(module, mesh=mesh)

    def _quantized(self) -> tuple[dict[str, int], int]:
        """Bytes of the packed weights by name, and of the largest dense one, which is alive while it is used.

        Everything else counts as in a dense base: bitsandbytes' layers save what nn.Linear saves.
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
        """Replace every parameter and buffer by a fake one on the CPU; tied ones stay tied."""
        made: dict[Tensor, Any] = {}
        for module in self.model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, old in tensors.items():
                    if old is not None and old not in made:
                        new = torch.empty(old.shape, dtype=trainable if old.requires_grad else old.dtype)
                        made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                    tensors[name] = old if old is None else made[old]

    def fixed(self) -> dict[str, int]:
        """Bytes of the base's weights, the adapter and cuBLAS's workspaces."""
        sizes = {name: self.packed.get(name, fsdp.local(p).nbytes) for name, p in self.model.named_parameters()}
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        adapter = sum(sizes[name] for name in trained) if len(trained) < len(sizes) else 0
        return {
            "weights": sum(sizes.values()) - adapter + sum(b.nbytes for b in self.model.buffers()),
            "adapter": adapter,
            "workspace": cuda.cublas_workspaces() if self.settings.device == "cuda" else 0,
        }

    def count(self, batch: int) -> dict[str, int]:
        """Bytes by kind; under a name of PHASES the most alive in that phase, and under "PHASE: gradients" and
        "PHASE: activations" their parts of it."""
        s, found = self.settings, self.fixed()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        held = [fsdp.local(t) for t in (*self.model.parameters(), *self.model.buffers())]
        # Fake tensors count as traced ones for transformers, and are on the CPU.
        masks = patch("transformers.masking_utils.is_tracing", lambda *_: False)
        run = cuda.kernels() if s.device == "cuda" else nullcontext()
        with self.mode, masks, run, explained(self.config, UNCOUNTED), _quiet():
            ids = torch.zeros(batch, s.seq_len, dtype=torch.long)
            if s.fsdp is not None:  # the first step allocates the storages for gathered weights, and keeps them
                with AliveBytes(held):
                    self.model(input_ids=ids, labels=ids).loss.backward()
                self.model.zero_grad()
            alive = AliveBytes([*held, ids], on_cpu=s.device == "cpu")
            handles = self._watch(alive, trainable)
            with alive:
                # More backwards repeat the last but one. Until the last, the Trainer keeps FSDP2's gradients whole.
                for left in reversed(range(min(s.gradient_accumulation, 2 if s.fsdp is None else 3))):
                    if s.fsdp is not None:
                        self.model.set_requires_gradient_sync(left == 0)
                    found = self._forward_and_backward(ids, alive) | found
                found["gradients"] = alive.kinds["gradients"]
                own = trainable if s.fsdp is None else _shards(trainable)
                alive.phase = STEP
                cls: Any = OPTIMIZERS[s.optimizer]
                # Fused is the Trainer's default on a GPU. Torch's default there copies all second moments at once.
                fused = cls is torch.optim.AdamW and s.device == "cuda"
                optimizer = cls and cls(own, lr=1e-4, **({"fused": True} if fused else {"foreach": False}))
                if optimizer:
                    optimizer.step()
            for handle in handles:
                handle.remove()
            # Two moments of a byte with a float32 per block of 256; small tensors keep float32 moments.
            moments = (2 * (p.numel() + p.numel() // 64) if p.numel() >= 4096 else 8 * p.numel() for p in own)
            formula = 0 if optimizer else sum(moments)
            states = optimizer.state.values() if optimizer else ()
            found["optimizer"] = formula + sum(t.nbytes for state in states for t in state.values())
            self.model.zero_grad()
        always = found["weights"] + found["adapter"] + found["workspace"]
        for phase in (FORWARD, TOP, REST):
            found[phase] = always + found["optimizer"] + self.dense + alive.peaks[phase]
        found[STEP] = always + formula + max(alive.peaks[STEP], found["gradients"])
        alive.at_peak[STEP]["gradients"] = found["gradients"]
        kinds = ("gradients", "activations")
        return found | {f"{phase}: {kind}": alive.at_peak[phase][kind] for phase in PHASES for kind in kinds}

    def _forward_and_backward(self, ids: Tensor, alive: AliveBytes) -> dict[str, int]:
        """Run both; returns the bytes kept in between."""
        before = alive.live
        alive.phase, alive.kind = FORWARD, "activations"
        loss = self.model(input_ids=ids, labels=ids).loss
        kept = {"activations": alive.kinds["activations"]}
        kept["logits"] = alive.live - before - kept["activations"]
        alive.phase = TOP
        loss.backward()
        return kept

    def _watch(self, alive: AliveBytes, trainable: list[nn.Parameter]) -> list:
        """Register hooks that note the start of the logits, the end of the last layer's backward, and each gradient."""

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


def _shards(trainable: list[nn.Parameter]) -> list[nn.Parameter]:
    """The local shards, which this rank's optimizer steps."""
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
