"""Adapters on experts as LoRAs in both layouts, reloaded by PEFT; and what else reads adapters' files."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_moe import FAMILIES, OTHERS, logits, moe
from typer.testing import CliRunner

from multilora_fast import MultiLoraConfig, cli, export_lora, from_loras, singular_values
from multilora_fast.adapters import load_adapter, save_adapter
from multilora_fast.adapters.files import CONFIG, WEIGHTS
from multilora_fast.peft.experts import MultiLoraProjection

PROJECTIONS = ["experts.gate_up_proj", "experts.up_proj", "experts.down_proj"]
LAYOUTS = ["peft", "per-expert"]


def adapted(family="qwen3_moe", **options):
    """Rank 12 on q_proj, 6 on the experts, with scales as after training and a constant factor that is not one."""
    torch.manual_seed(1)
    options = {
        "r": 6, "lora_num": 2, "lora_alpha": 9, "target_modules": ["q_proj"], "target_parameters": PROJECTIONS,
        "init_weights": False, **options,
    }  # fmt: skip
    return get_peft_model(moe(family), MultiLoraConfig(**options)).eval()


def reloaded(path, family="qwen3_moe", strict=True):
    with warnings.catch_warnings():
        warnings.filterwarnings("error" if strict else "ignore", message=".*missing.*")
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        return PeftModel.from_pretrained(moe(family), path).eval()


def command(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def assert_same(model, lora):
    """The logits, and ΔW of every expert."""
    want = logits(model)
    assert (want - logits(lora)).abs().max() <= 5e-6
    with model.disable_adapter():
        assert (want - logits(model)).abs().max() > 0.05
    projections = [(n, module) for n, module in model.named_modules() if isinstance(module, MultiLoraProjection)]
    assert projections
    for name, projection in projections:
        experts, _, which = name.rpartition(".")
        theirs = lora.get_submodule(experts if which == "down_proj" else f"{experts}.base_layer")
        assert theirs.parameter_name == which
        ours = projection.get_delta_weight("default")
        assert ours.abs().amax((1, 2)).min() > 0.01
        torch.testing.assert_close(ours, theirs.get_delta_weight("default"), rtol=0, atol=1e-6)


@pytest.fixture(scope="module", autouse=True)
def loads(tmp_path_factory):
    """Skips where PEFT cannot load a LoRA of its own, because its version and transformers' do not fit together."""
    folder = tmp_path_factory.mktemp("probe")
    get_peft_model(moe(), LoraConfig(target_modules=["o_proj"])).save_pretrained(folder)
    try:
        PeftModel.from_pretrained(moe(), folder)
    except TypeError as error:
        pytest.skip(f"PEFT cannot load its own LoRA on a MoE model: {error}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_peft_reloads_the_same_model(family, layout, tmp_path):
    model = adapted(family)
    if layout == "per-expert" and family in ("gpt_oss", "nemotron_h"):
        with pytest.raises(ValueError, match=f"layout=\"per-expert\" .*'{family}'"):
            export_lora(model, tmp_path / "out", layout=layout)
        assert not (tmp_path / "out").exists()
        return
    report = export_lora(model, tmp_path / "out", layout=layout)
    assert (report.rank, report.expert_rank, report.layout, report.padding) == (12, 6, layout, 0)
    assert report.max_lora_rank == 16
    assert_same(model, reloaded(tmp_path / "out", family))
    model.save_pretrained(tmp_path / "source")
    export_lora(tmp_path / "source", tmp_path / "again", layout=layout)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [
    {"target_modules": []},  # experts alone: one rank for all, and no patterns
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}},
    {"rank_pattern": {"gate_up_proj": 2, r"layers\.1.*down_proj": 7}},
    {"target_parameters": ["experts.gate_up_proj"]},
    {"target_parameters": ["experts.down_proj"]},
    {"target_parameters": [f"model.layers.1.mlp.{name}" for name in PROJECTIONS]},
    {"target_modules": [], "rank_pattern": {"experts.*": 6}, "lora_num_pattern": {"down_proj": 1}, "scaling": "scalar"},
])  # fmt: skip
def test_other_ranks_and_some_projections_or_layers(layout, options, tmp_path):
    model = adapted("mixtral", **options)
    export_lora(model, tmp_path, layout=layout)
    one_layer = "layers.1" in str(options.get("target_parameters"))
    if (
        layout == "per-expert" and one_layer
    ):  # PEFT puts LoRAs on those of all layers, and those it finds no tensors for
        with warnings.catch_warnings():  # add nothing
            warnings.simplefilter("ignore")
            lora = PeftModel.from_pretrained(moe("mixtral"), tmp_path).eval()
    else:
        lora = reloaded(tmp_path, "mixtral")
    assert_same(model, lora)
    written = json.loads((tmp_path / CONFIG).read_text())
    if options == {"target_modules": []}:
        assert (written["r"], written["rank_pattern"], written["alpha_pattern"]) == (6, {}, {})


def test_the_projection_that_is_missing_where_there_is_no_gate(tmp_path):
    for name in ("experts.up_proj", "experts.down_proj"):
        model = adapted("nemotron_h", target_parameters=[name])
        model.save_pretrained(tmp_path / "source")
        export_lora(tmp_path / "source", tmp_path / "out", overwrite=True)
        lora = reloaded(tmp_path / "out", "nemotron_h")
        assert_same(model, lora)
        assert lora.get_submodule("model.model.layers.0.mixer.experts.base_layer").parameter_name == "up_proj"


def test_gate_and_up_are_joined_where_peft_rewrites_no_names(tmp_path):
    model = adapted("qwen2_moe", target_modules=[])
    export_lora(model, tmp_path, layout="per-expert")
    assert_same(model, reloaded(tmp_path, "qwen2_moe"))


def test_what_servers_read_in_the_files(tmp_path):
    model = adapted("mixtral", target_parameters=["experts.down_proj"])
    reports = [export_lora(model, tmp_path / layout, layout=layout) for layout in LAYOUTS]
    parameters, experts = (load_file(tmp_path / layout / WEIGHTS) for layout in LAYOUTS)
    start = "base_model.model.model.layers.1."
    assert {key.removeprefix(start): tuple(t.shape) for key, t in parameters.items() if ".1.mlp" in key} == {
        "mlp.experts.base_layer.lora_A.weight": (4 * 6, 32),
        "mlp.experts.base_layer.lora_B.weight": (96, 6 * 4),
        "mlp.experts.lora_A.weight": (4 * 6, 48),
        "mlp.experts.lora_B.weight": (32, 6 * 4),
    }
    one = f"{start}block_sparse_moe.experts.3."
    assert {key.removeprefix(one): tuple(t.shape) for key, t in experts.items() if key.startswith(one)} == {
        "w1.lora_A.weight": (6, 32), "w1.lora_B.weight": (48, 6), "w3.lora_A.weight": (6, 32),
        "w3.lora_B.weight": (48, 6), "w2.lora_A.weight": (6, 48), "w2.lora_B.weight": (32, 6),
    }  # fmt: skip
    for tensors, ends, report in zip((parameters, experts), (("base_layer",), ("w1", "w3")), reports, strict=True):
        zeros = [tensor for key, tensor in tensors.items() if any(f".{end}." in key for end in ends)]
        assert not any(tensor.any() for tensor in zeros)
        assert report.padding == sum(tensor.nbytes for tensor in zeros) > 0
    configs = [json.loads((tmp_path / layout / CONFIG).read_text()) for layout in LAYOUTS]
    assert [config["r"] for config in configs] == [12, 12]
    names = [f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("down_proj", "gate_up_proj")]
    assert configs[0]["target_parameters"] == names
    assert set(configs[0]["rank_pattern"].values()) == {6}
    assert configs[0]["alpha_pattern"] == configs[0]["rank_pattern"]
    assert configs[1]["target_modules"][-3:] == ["w1", "w2", "w3"]
    lines = [str(report).splitlines() for report in reports]
    assert "--max-lora-rank 16" in lines[0][0]
    assert "rank 6, layout peft" in lines[0][1]
    assert "rank 6, layout per-expert" in lines[1][1]
    assert "SGLang" in lines[0][2]
    assert f"{reports[0].padding / 2**20:.3g} MiB" in lines[0][3]


def test_the_highest_rank_is_what_vllm_needs(tmp_path):
    report = export_lora(adapted(rank_pattern={"experts.*": 20}), tmp_path)
    assert (report.rank, report.expert_rank, report.max_lora_rank) == (12, 40, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_command_compares_and_says_which_layout(dtype, tmp_path):
    moe().save_pretrained(tmp_path / "base")
    model = adapted()
    for name, parameter in model.named_parameters():
        if "multilora" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(tmp_path / "source")
    for layout in LAYOUTS:
        result = command(
            "export", tmp_path / "source", tmp_path / layout, "--model", tmp_path / "base", "--layout", layout, "--json"
        )
        assert result.exit_code == 0, result.exception
        found = json.loads(result.stdout)
        assert found["logits_differ_by"] <= 5e-6 * found["largest_logit"]
        assert (found["layout"], found["rank"], found["expert_rank"], found["padding"]) == (layout, 12, 6, 0)
        assert {t.dtype for t in load_file(tmp_path / layout / WEIGHTS).values()} == {dtype}


def test_refusals(tmp_path):
    model = adapted(target_parameters=["experts.down_proj"])
    with pytest.raises(ValueError, match="layout"):
        export_lora(model, tmp_path / "out", layout="3d")
    model.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / CONFIG
    saved = json.loads(path.read_text()) | {"base_model_type": None, "base_model_name_or_path": None}
    path.write_text(json.dumps(saved))
    for layout in LAYOUTS:
        with pytest.raises(ValueError, match=r"whether the experts \S+layers\.0\.mlp\.experts .*base_model_type"):
            export_lora(tmp_path / "source", tmp_path / "out", layout=layout)
    adapted().save_pretrained(tmp_path / "both")
    path = tmp_path / "both" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_type": None}))
    with pytest.raises(ValueError, match="what checkpoints call the experts"):
        export_lora(tmp_path / "both", tmp_path / "out", layout="per-expert")
    assert not (tmp_path / "out").exists()
    export_lora(tmp_path / "both", tmp_path / "out")  # which needs no type


def test_layouts_of_an_adapter_without_experts_are_one(tmp_path):
    model = adapted(target_parameters=None)
    reports = [export_lora(model, tmp_path / layout, layout=layout) for layout in LAYOUTS]
    assert reports[0] == reports[1]
    assert reports[0].layout is reports[0].expert_rank is None
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / LAYOUTS[0] / name).read_bytes() == (tmp_path / LAYOUTS[1] / name).read_bytes()


# What else reads these files


def test_loras_of_experts_cannot_be_merged(tmp_path):
    moe().save_pretrained(tmp_path / "base")
    for layout, match in (
        ("peft", "has target_parameters="),
        ("per-expert", r"experts\.0\.\w+, which qwen3_moe models"),
    ):
        export_lora(adapted(), tmp_path / layout, layout=layout)
        path = tmp_path / layout / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
        with pytest.raises(ValueError, match=match):
            from_loras([tmp_path / layout], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_singular_values_of_every_expert(tmp_path):
    model = adapted("gpt_oss")
    model.save_pretrained(tmp_path)
    found = singular_values(tmp_path)
    assert found.keys() == singular_values(model).keys()
    for name, projection in model.named_modules():
        if isinstance(projection, MultiLoraProjection):
            path, _, which = name.removeprefix("base_model.model.").rpartition(".")
            for e, delta in enumerate(projection.get_delta_weight("default")):
                truth = torch.linalg.svdvals(delta.double())
                torch.testing.assert_close(found[f"{path}.{e}.{which}"], truth[:6], rtol=0, atol=1e-5 * truth[0].item())
    for modules in ("down_proj", "experts.down_proj"):
        assert {name.rpartition("experts.")[2] for name in singular_values(tmp_path, modules=modules)} == {
            f"{e}.down_proj" for e in range(4)
        }
    assert len(singular_values(tmp_path, modules="layers.1.mlp.experts.2.down_proj")) == 1


def test_the_spectrum_of_an_adapter_and_of_its_export_per_expert(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "source")
    export_lora(model, tmp_path / "peft")
    export_lora(model, tmp_path / "apart", layout="per-expert")
    result = command("spectrum", tmp_path / "source", tmp_path / "apart")
    assert result.exit_code == 0, result.exception
    assert "gate_up_proj" in result.stdout
    assert "source / apart" in result.stdout
    exported, source = singular_values(tmp_path / "apart"), singular_values(tmp_path / "source")
    for name, values in exported.items():
        if name.endswith("down_proj"):
            torch.testing.assert_close(values, source[name], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="has target_parameters="):
        singular_values(tmp_path / "peft")
    with pytest.raises(ValueError, match="is no plain LoRA of a linear layer"):
        singular_values(reloaded(tmp_path / "peft"))


def test_plain_modules_refuse_experts(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adapts experts"):
        load_adapter(moe(), tmp_path)
    with pytest.raises(ValueError, match="model holds no"):
        save_adapter(model, tmp_path / "out")


def test_an_expert_axis_of_another_length_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if "experts" in key and key.endswith("lora_B"))
    save_file({**tensors, key: tensors[key][:-1].contiguous()}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"holds lora_B of shape \(4, 2, \d+, 3\) for \S+, which needs \(5, "):
        export_lora(tmp_path, tmp_path / "out")
