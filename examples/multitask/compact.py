"""A model's weights in few bytes, exactly, and in files below a size.

Weights that come from a quantized file, such as GGUF's Q4_1 and Q8_0, take few values in each block of 32. Such a
matrix (N, K) is kept as integer codes and, per block, a float16 scale and, with 4 bits, the least value:
code · scale + least. A matrix of which this does not restore every bit stays as it is.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

BLOCK = 32
CODES, SCALE, LEAST = ".codes", ".scale", ".least"


def write(model: Path, folder: Path, shard_size: int) -> dict[str, int]:
    """Write config and weights of the directory ``model`` to ``folder``, in files of at most ``shard_size``
    bytes, if no single tensor is larger. Returns the counts of matrices that are kept as codes and of other tensors."""
    folder.mkdir()
    (folder / "config.json").write_text((model / "config.json").read_text())
    weights = _weights(model)
    small = {name: compacted(weight) for name, weight in weights.items()}
    kept = {name: weight for name, weight in weights.items() if small[name] is None}
    parts = {name + end: tensor for name, one in small.items() if one for end, tensor in one.items()}
    save_torch_state_dict(kept | parts, folder, max_shard_size=int(0.99 * shard_size))  # headers are extra
    return {"as codes": len(weights) - len(kept), "others": len(kept)}


def load(folder: Path) -> nn.Module:
    """The causal LM that :func:`write` wrote, in float32 and eval mode.

    Raises:
        ValueError: a file of the weights is missing.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    found = _weights(folder)
    weights = {name: tensor for name, tensor in found.items() if not name.endswith((CODES, SCALE, LEAST))}
    for name in (key.removesuffix(CODES) for key in found if key.endswith(CODES)):
        weights[name] = restored(found[name + CODES], found[name + SCALE], found.get(name + LEAST))
    config = AutoConfig.from_pretrained(folder)
    options: dict[str, Any] = {"config": config, "state_dict": weights, "output_loading_info": True}
    loads = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained
    model, info = loads(None, dtype=torch.float32, **options)
    if info["missing_keys"]:
        some = min(info["missing_keys"])
        raise ValueError(f"--prepared: {folder} lacks {len(info['missing_keys'])} weights, the first of them {some}.")
    model.config.use_cache = False
    return model.eval()


def compacted(weight: Tensor) -> dict[str, Tensor] | None:
    """Codes, scale and least value of ``weight``, or None if they do not restore it exactly."""
    if weight.dim() != 2 or weight.shape[1] % BLOCK or weight.dtype != torch.float32:
        return None
    blocks = weight.view(len(weight), -1, BLOCK)
    largest, least = blocks.amax(-1), blocks.amin(-1)
    for scale, start in ((blocks.abs().amax(-1) / 127, None), ((largest - least) / 15, least.half())):
        scale = scale.half()
        above = blocks if start is None else blocks - start.float()[..., None]
        codes = (above / scale.float().clamp(min=1e-30)[..., None]).round().view(weight.shape)
        if start is None:
            found = {CODES: codes.clamp(-128, 127).to(torch.int8), SCALE: scale}
        else:
            codes = codes.clamp(0, 15).to(torch.uint8)
            found = {CODES: codes[:, ::2] | codes[:, 1::2] << 4, SCALE: scale, LEAST: start}
        if torch.equal(restored(found[CODES], scale, start), weight):
            return found
    return None


def restored(codes: Tensor, scale: Tensor, least: Tensor | None) -> Tensor:
    """The float32 matrix (N, K) of int8 codes (N, K), or with ``least`` (N, K / 32) of two 4-bit codes a byte."""
    if least is not None:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    blocks = codes.float().view(len(codes), -1, BLOCK) * scale.float()[..., None]
    return (blocks if least is None else blocks + least.float()[..., None]).view(codes.shape)


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
