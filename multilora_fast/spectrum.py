"""Singular values and directions of the update ΔW of each weight.

An adapter's ΔW is B̃ Ã with B̃ (N, R) and Ã (R, K), R = n·r. With the QR factors B̃ = Q_b R_b and Ãᵀ = Q_a R_a, its
singular values are those of the small R_b R_aᵀ, and its singular vectors that matrix's times Q_b and Q_a. No (N, K)
matrix is built. Everything runs in float64 on the CPU.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multilora_fast.adapters.branches import Branches, as_lora, chosen, clean, collect
from multilora_fast.adapters.experts import Factors
from multilora_fast.adapters.files import parse_multilora, read_files
from multilora_fast.adapters.merge import parse_lora
from multilora_fast.console import progress
from multilora_fast.files import atomic_file

Source = nn.Module | str | os.PathLike
Core = tuple[Tensor | None, Tensor, Tensor | None]  # Q_b (N, p), core (p, q), Q_a (K, q): ΔW = Q_b · core · Q_aᵀ


def singular_values(
    source: Source,
    *,
    modules: str | Iterable[str] | None = None,
    base: nn.Module | None = None,
    adapter_name: str | None = None,
) -> dict[str, Tensor]:
    """The singular values of every adapted module's ΔW, by module name: 1-D, float64, descending, min(R, N, K) values.

    Each expert has an entry of its own, such as ``….experts.3.down_proj``.

    Args:
        source: a PEFT model with a MultiLoRA or LoRA adapter, any model with MultiLoRA layers (ours or fused), or the
            directory of a saved MultiLoRA or LoRA adapter. With ``base``, a fully fine-tuned model.
        modules: names of modules or their ends, as in ``target_modules``; all when None.
        base: the model before full fine-tuning. ΔW is the difference of every nn.Linear's weight, with min(N, K) values
            from a dense decomposition.
        adapter_name: which adapter of a PEFT model; the active one when None.

    Raises:
        ValueError: no adapter there, one that is more than B A (DoRA, embeddings, convolutions), ``modules`` that
            match nothing, models of other shapes than ``base``, values that are not finite.
    """
    found = progress(_updates(source, modules, base, adapter_name).items(), "singular values")
    return {name: torch.linalg.svdvals(_core(name, *pair, base is not None)[1]) for name, pair in found}


def directions(
    source: Source,
    *,
    top: int,
    modules: str | Iterable[str] | None = None,
    base: nn.Module | None = None,
    adapter_name: str | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Orthonormal U (N, k) and V (K, k) of each ΔW's ``top`` largest singular values, k fewer where others are zero.

    The other arguments and errors are those of :func:`singular_values`.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, not {top}.")
    found = {}
    for name, pair in progress(_updates(source, modules, base, adapter_name).items(), "directions"):
        Q_b, small, Q_a = _core(name, *pair, base is not None)
        U, S, Vh = torch.linalg.svd(small, full_matrices=False)
        k = min(top, numerical_rank(S))
        U, V = U[:, :k], Vh[:k].T
        found[name] = (U if Q_b is None else Q_b @ U), (V if Q_a is None else Q_a @ V)
    return found


def overlap(first: Tensor, second: Tensor) -> float:
    """The share of the smaller of two subspaces of R^D that lies in the other, from 0 to 1: ‖UᵀU'‖² / min(k, k') of
    orthonormal U (D, k) and U' (D, k'). Random subspaces overlap by max(k, k') / D on average; an empty one by 0.

    Raises:
        ValueError: subspaces of spaces of different dimensions.
    """
    if first.shape[0] != second.shape[0]:
        raise ValueError(f"second must hold vectors of {first.shape[0]} values, not {second.shape[0]}.")
    smaller = min(first.shape[1], second.shape[1])
    return (first.T @ second).square().sum().item() / smaller if smaller else 0.0


def numerical_rank(values: Tensor) -> int:
    """The number of singular values above float32 rounding of the largest."""
    return int((values > 1e-6 * values.max()).sum()) if values.numel() else 0


def effective_rank(values: Tensor) -> float:
    """exp(−Σ p log p) of p = σ / Σσ (Roy and Vetterli, 2007): k for k equal singular values, 0 when all are zero."""
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0


def top_share(values: Tensor) -> float:
    """σ₁ / Σσ, 0 when all are zero."""
    total = values.sum()
    return float(values.max() / total) if total > 0 else 0.0


def by_kind(values: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """The singular values grouped by the last part of the modules' names (q_proj, k_proj, …), in their order."""
    kinds: dict[str, list[Tensor]] = {}
    for name, one in values.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(one)
    return kinds


def _updates(
    source: Source, modules: str | Iterable[str] | None, base: nn.Module | None, adapter_name: str | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """By module name what :func:`_core` decomposes. The arguments and errors are those of :func:`singular_values`."""
    updates: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}  # by the names of the module and of the expert in it
    if base is not None:
        found = _differences(base, source)
    else:
        found = _of_model(source, adapter_name) if isinstance(source, nn.Module) else _of_directory(source)
    for name, (A, B) in found.items():
        if A.dim() == 2:
            updates[name, name] = A, B
            continue
        path, _, projection = name.rpartition(".")
        for e in range(len(A)):
            updates[name, f"{path}.{e}.{projection}"] = A[e], B[e]
    if modules is None:
        return {part: pair for (_, part), pair in updates.items()}
    wanted = [modules] if isinstance(modules, str) else list(modules)
    hits = {end: {ns for ns in updates if any(f".{name}".endswith(f".{end}") for name in ns)} for end in wanted}
    missing = [end for end, names in hits.items() if not names]
    if missing or not wanted:
        kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name, _ in updates))
        raise ValueError(f"modules {missing} match nothing: the adapted modules end in {kinds}.")
    hit = set().union(*hits.values())
    return {names[1]: pair for names, pair in updates.items() if names in hit}


def _core(name: str, first: Tensor, second: Tensor, dense: bool) -> Core:
    """Of ΔW = B A, with A (R, K) first and B (N, R) second, or if ``dense`` of a weight before and after."""
    if dense:
        Q_b, core, Q_a = None, _exact(second) - _exact(first), None
    else:
        Q_b, R_b = torch.linalg.qr(_exact(second))
        Q_a, R_a = torch.linalg.qr(_exact(first).T)
        core = R_b @ R_a.T
    if not core.isfinite().all():
        raise ValueError(f"the update of {name} holds values that are not finite.")
    return Q_b, core, Q_a


def _of_model(model: Any, adapter_name: str | None) -> dict[str, Factors]:
    found = {name: as_lora(Branches.of(module)) for name, module in collect(model, adapter_name).items()}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for path, module in inner.named_modules():
        layer: Any = module
        if not isinstance(getattr(layer, "lora_A", None), nn.ModuleDict):  # no LoRA layer of PEFT
            continue
        name = chosen(layer, {*layer.lora_A, *layer.lora_embedding_A}, adapter_name)
        if name is None:
            continue
        variant = layer.use_dora.get(name) or name in getattr(layer, "lora_variant", ())
        plain = name in layer.lora_A and not variant and not hasattr(layer, "parameter_name")
        if not plain or layer.lora_A[name].weight.dim() != 2:
            raise ValueError(f"the adapter {name!r} on {path} is no plain LoRA of a linear layer.")
        found[clean(path)] = layer.lora_A[name].weight.detach(), _exact(layer.lora_B[name].weight) * layer.scaling[name]
    if not found:
        wanted = "" if adapter_name is None else f" called {adapter_name!r}"
        raise ValueError(f"model holds no MultiLoRA or LoRA adapter{wanted}.")
    return found


def _of_directory(directory: str | os.PathLike) -> dict[str, Factors]:
    config, tensors = read_files(directory, "MultiLoRA or LoRA")
    if config.get("peft_type") == "LORA":
        return parse_lora(directory, config, tensors).modules
    adapter = parse_multilora(directory, config, tensors)
    return {name: as_lora(branches) for name, branches in adapter.modules.items()}


def _differences(base: nn.Module, tuned: Source) -> dict[str, tuple[Tensor, Tensor]]:
    if not isinstance(base, nn.Module) or not isinstance(tuned, nn.Module):
        raise ValueError("base and source must both be models, whose weights differ by full fine-tuning.")
    before, after = (
        {name: m.weight.detach() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        for model in (base, tuned)
    )
    if not before or before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise ValueError(f"base and source must have the same nn.Linear layers, but differ in {odd[:1] or 'none'}.")
    for name, weight in before.items():
        if weight.shape != after[name].shape:
            was, now = tuple(weight.shape), tuple(after[name].shape)
            raise ValueError(f"base and source must have equal shapes, but {name} is {was} and {now}.")
    return {name: (weight, after[name]) for name, weight in before.items()}


def _exact(t: Tensor) -> Tensor:
    if t.is_meta:
        raise ValueError("source holds tensors on the meta device, which have no values.")
    return t.detach().to("cpu", torch.float64)


def save_histograms(path: str | os.PathLike, spectra: Mapping[str, Mapping[str, list[Tensor]]]) -> None:
    """Plot a PNG with a panel per projection and, in each, a histogram per entry of ``spectra``.

    ``spectra`` maps labels to the lists of :func:`by_kind`. Each value is divided by the largest of its module: a
    balanced update spreads over the axis, one of few directions lies near 0. A failed write leaves the earlier file.
    """
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(kind for one in spectra.values() for kind in one))
    figure = Figure(figsize=(5.5 * len(kinds), 4), layout="constrained")
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for label, lists in spectra.items():
            values = [value for v in lists.get(kind, ()) if v.max() > 0 for value in (v / v.max()).tolist()]
            weights = [1 / len(values) for _ in values]
            axis.hist(values, bins=25, range=(0, 1), weights=weights, histtype="step", lw=1.6, label=label)
        axis.set(title=kind, xlabel="singular value / the module's largest", ylabel="share of singular values")
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[-1].legend(frameon=False, fontsize=8)
    with atomic_file(Path(path)) as unfinished:
        figure.savefig(unfinished, format="png", dpi=130)
