"""Singular values from the factors against dense decompositions, the measures made of them, and the command."""

import math
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import ATTENTION, config, gpt2, llama, two_adapters
from torch import nn

from multilora_fast import MultiLoRALinear, cli, fuse, singular_values
from multilora_fast.adapters import save_adapter
from multilora_fast.spectrum import (
    by_kind,
    directions,
    effective_rank,
    numerical_rank,
    overlap,
    save_histograms,
    top_share,
)

ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def assert_spectra(found, dense):
    """Every module of ``dense``, and its values to 1e-5 of the largest; what ΔW has beyond them is rounding."""
    assert found.keys() == dense.keys()
    for name, values in found.items():
        truth = torch.linalg.svdvals(dense[name].double())
        assert values.dtype == torch.float64
        assert values.dim() == 1
        assert (values.diff() <= 0).all()
        assert (values - truth[: len(values)]).abs().max() <= 1e-5 * truth[0]
        assert (truth[len(values) :] <= 1e-5 * truth[0]).all()


def deltas(model):
    """The dense ΔW of a PEFT model, by the product that PEFT's merge makes."""
    layers = model.get_base_model().named_modules()
    return {n: m.get_delta_weight(m.active_adapters[0]) for n, m in layers if hasattr(m, "get_delta_weight")}


def lora(base=None, **options):
    model = get_peft_model(base or llama(), LoraConfig(**{"r": 6, "lora_alpha": 9, "target_modules": ALL, **options}))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def multilora(base=None, **options):
    return get_peft_model(base or llama(), config(**{"target_modules": ALL, **options}))


def own_layers(scaling="vector"):
    model = llama()
    for path, module in list(model.named_modules()):
        if path.endswith(("k_proj", "down_proj")):
            layer = MultiLoRALinear(module, r=3, lora_num=2, lora_alpha=5, scaling=scaling)
            nn.init.normal_(layer.lora_scaling)
            model.set_submodule(path, layer)
    return model


MODELS = {
    "MultiLoRA": multilora,
    "rank above the width": lambda: multilora(r=20, lora_num=2, scaling="scalar"),
    "MultiLoRA on Conv1D": lambda: multilora(gpt2(), target_modules=["c_attn"]),
    "LoRA with patterns": lambda: lora(rank_pattern={"k_proj": 2}, alpha_pattern={"v_proj": 1}, use_rslora=True),
    "LoRA on Conv1D": lambda: lora(gpt2(), target_modules=["c_attn"], fan_in_fan_out=True),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_and_their_files_have_the_dense_spectrum(kind, tmp_path):
    model = MODELS[kind]()
    dense = deltas(model)
    found = singular_values(model)
    assert_spectra(found, dense)
    model.save_pretrained(tmp_path)
    assert_spectra(singular_values(tmp_path), dense)


@pytest.mark.parametrize("scaling", ["vector", "scalar"])
def test_our_own_layers_fused_or_not(scaling, tmp_path):
    model = own_layers(scaling)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MultiLoRALinear)}
    dense = {
        name: sum(m.scaling_factor * s[:, None] * (B @ A) for A, B, s in zip(m.lora_A, m.lora_B, m.lora_scaling))  # noqa: B905
        for name, m in layers.items()
    }
    assert_spectra(singular_values(model), dense)
    save_adapter(model, tmp_path)
    assert_spectra(singular_values(tmp_path), dense)
    fuse(model)
    assert_spectra(singular_values(model), dense)


def test_full_fine_tuning_is_a_difference_of_weights():
    base, tuned = llama(), llama()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    after = {name: m.weight for name, m in tuned.named_modules() if isinstance(m, nn.Linear)}
    dense = {name: w.double() - base.get_submodule(name).weight for name, w in after.items()}
    assert_spectra(singular_values(tuned, base=base), dense)
    k = singular_values(tuned, base=base, modules="k_proj")
    assert [len(values) for values in k.values()] == [16, 16]


def test_no_dense_product_is_decomposed(monkeypatch):
    shapes = []
    svdvals = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda t: shapes.append(tuple(t.shape)) or svdvals(t))
    singular_values(multilora(r=2, lora_num=2))
    assert set(shapes) == {(4, 4)}


def test_before_the_first_step_a_multilora_update_is_zero():
    for values in singular_values(multilora(init_weights=True)).values():
        assert not values.any()
        assert (numerical_rank(values), effective_rank(values), top_share(values)) == (0, 0.0, 0.0)


def test_modules_are_chosen_by_the_end_of_their_names():
    model = multilora()
    some = singular_values(model, modules=["layers.1.self_attn.k_proj", "v_proj"])
    assert [name.removeprefix("model.layers.") for name in some] == [
        "0.self_attn.v_proj", "1.self_attn.k_proj", "1.self_attn.v_proj"
    ]  # fmt: skip
    assert {kind: len(values) for kind, values in by_kind(some).items()} == {"v_proj": 2, "k_proj": 1}
    with pytest.raises(ValueError, match=r"modules \['proj'\]"):
        singular_values(model, modules=["v_proj", "proj"])


def test_an_adapter_is_chosen_by_name():
    model = two_adapters()
    assert {len(values) for values in singular_values(model, adapter_name="other").values()} == {10}
    assert {len(values) for values in singular_values(model).values()} == {12}
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="default, other: pass adapter_name"):
        singular_values(model)


def test_measures():
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([3.0, 1])) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) + 0.25 * math.log(4))
    )
    assert top_share(torch.tensor([3.0, 1])) == 0.75
    assert numerical_rank(torch.tensor([1.0, 1e-3, 1e-9])) == 2


@pytest.mark.parametrize("make", [multilora, lora])
def test_directions_span_what_the_dense_decomposition_finds(make):
    model = make()
    for name, (U, V) in directions(model, top=4).items():
        dense = deltas(model)[name].double()
        left, _, right = torch.linalg.svd(dense, full_matrices=False)
        torch.testing.assert_close(U.T @ U, torch.eye(4, dtype=U.dtype))
        assert overlap(U, left[:, :4]) == pytest.approx(1, abs=1e-6)
        assert overlap(V, right[:4].T) == pytest.approx(1, abs=1e-6)


def test_overlap_of_known_subspaces():
    axes = torch.eye(6)
    assert overlap(axes[:, :2], axes[:, 1:4]) == 0.5
    assert overlap(axes[:, :2], axes[:, 2:]) == 0
    assert overlap(axes[:, :0], axes) == 0
    with pytest.raises(ValueError, match="second"):
        overlap(axes, axes[:5])


@pytest.mark.parametrize(
    ("source", "options", "named"),
    [
        (llama, {}, "model holds no"),
        (multilora, {"adapter_name": "none"}, "'none'"),
        (lambda: lora(use_dora=True), {}, "'default' on .*q_proj"),
        (lambda: lora(gpt2(), target_modules=["wte"]), {}, "'default' on .*wte"),
        (lambda: llama().to("meta"), {"base": llama()}, "source"),
        (lambda: llama(hidden_size=64), {"base": llama()}, r"q_proj is \(32, 32\) and \(64, 64\)"),
        (gpt2, {"base": llama()}, "base and source must have the same"),
        (lambda: "nowhere", {"base": llama()}, "base and source must both be models"),
        (multilora, {"modules": []}, "modules"),
    ],
)
def test_bad_inputs(source, options, named):
    with pytest.raises(ValueError, match=named):
        singular_values(source(), **options)


def test_directions_are_counted():
    with pytest.raises(ValueError, match="top"):
        directions(multilora(), top=0)


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["multilora-fast", "spectrum", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0, capsys.readouterr()


@pytest.fixture
def adapters(tmp_path):
    multilora().save_pretrained(tmp_path / "branches")
    lora().save_pretrained(tmp_path / "lora")
    return tmp_path / "branches", tmp_path / "lora"


def test_the_command_prints_what_the_functions_say(adapters, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "spectrum.png"
    code, shown = run(monkeypatch, capsys, *adapters, "--plot", plot, "--top", 4)
    assert code == 0
    rows = [line.split() for line in shown.out.splitlines()]
    values = by_kind(singular_values(adapters[0]))["v_proj"]
    mean = sum(map(effective_rank, values)) / len(values)
    assert [row[4] for row in rows if row[:2] == ["branches", "v_proj"]] == [f"{mean:.1f}"]
    U, other = (directions(path, top=4, modules="v_proj") for path in adapters)
    expected = sum(overlap(U[name][0], other[name][0]) for name in U) / 2
    assert [row[4] for row in rows if row[:4] == ["branches", "/", "lora", "v_proj"]] == [f"{expected:.3f}"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_failed_plot_leaves_the_good_one(adapters, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    plot = tmp_path / "spectrum.png"
    plot.write_bytes(b"good")

    def fail(self, path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure.Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save_histograms(plot, {"one": by_kind(singular_values(adapters[0], modules="k_proj"))})
    assert plot.read_bytes() == b"good"
    assert not list(tmp_path.glob(".*"))


def test_a_fine_tuned_model_beside_its_base(tmp_path, monkeypatch, capsys):
    tuned = llama()
    nn.init.normal_(tuned.get_submodule("model.layers.0.self_attn.k_proj").weight)
    for name, model in (("base", llama()), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
    code, shown = run(monkeypatch, capsys, tmp_path / "tuned", "--base", tmp_path / "base", "--modules", "k_proj")
    assert code == 0
    assert [line.split()[:4] for line in shown.out.splitlines()][2] == ["tuned", "k_proj", "2", "8"]  # 16 and 0


def test_a_plot_needs_matplotlib(monkeypatch, capsys):
    monkeypatch.setattr("multilora_fast.files.find_spec", lambda name: None)
    code, shown = run(monkeypatch, capsys, "any", "--plot", "a.png")
    assert code == 2
    assert "matplotlib" in shown.err
