"""The recipes of docs/trainers.md as users run them: three steps, a resume after the second, and a merge."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import logits
from tiny_training import make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import multilora_fast.peft  # noqa: F401

DOCS = Path(__file__).parents[2] / "docs/trainers.md"
PACKAGES = ("torch", "transformers", "peft", "trl")


class Recipe(NamedTuple):
    """What a test adds to a section of the docs: to its first file, and to its commands that begin so."""

    package: str
    config: str = ""
    options: dict[str, str] = {}  # noqa: RUF012
    resume: tuple[str, str] = ("", "")  # added to the file and to the command that trains
    last: str = "out"  # the adapter of the third step


LLAMAFACTORY = (
    "max_steps: 3\nsave_steps: 2\nlogging_steps: 1\nper_device_train_batch_size: 2\nlearning_rate: 0.05\n"
    "lr_scheduler_type: constant\nreport_to: none\nuse_cpu: true\nseed: 1\ncutoff_len: 64\n"
)
SWIFT = (
    " --model_type llama --template dummy --torch_dtype float32 --max_length 64 --max_steps 3 --save_steps 2 --use_hf "
    "true --logging_steps 1 --learning_rate 0.05 --lr_scheduler_type constant --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 1 --warmup_ratio 0 --split_dataset_ratio 0 --report_to none --seed 1 "
    "--dataloader_num_workers 0 --save_strategy steps"
)
AXOLOTL = (
    'special_tokens: {pad_token: "[EOS]"}\nsequence_len: 64\ndataset_prepared_path: prepared\nmax_steps: 3\n'
    "save_steps: 2\nmicro_batch_size: 2\ngradient_accumulation_steps: 1\nlearning_rate: 0.05\nlr_scheduler: constant\n"
    "optimizer: adamw_torch\nbf16: false\nfp16: false\ntf32: false\nuse_cpu: true\nseed: 1\n"
)
RECIPES = {
    "LLaMA-Factory": Recipe("llamafactory", LLAMAFACTORY, resume=("resume_from_checkpoint: out/checkpoint-2\n", "")),
    "ms-swift": Recipe(
        "ms-swift",
        options={"swift sft": SWIFT, "swift export": " --use_hf true --model_type llama --template dummy"},
        resume=("", " --resume_from_checkpoint out/checkpoint-2"),
        last="out/checkpoint-3",
    ),
    "axolotl": Recipe(
        "axolotl",
        AXOLOTL,
        options={"axolotl train": " --launcher python"},
        resume=("resume_from_checkpoint: out/checkpoint-2\n", ""),
    ),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """With a model in float32 and rows, in the formats that the recipes name."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    asked = [(f"the sky is w{i} ?", "blue green red") for i in range(16)]
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in asked]
    (tmp_path / "sky.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (tmp_path / "data").mkdir()
    rows = [{"instruction": q, "input": "", "output": a} for q, a in asked]
    (tmp_path / "data/sky.json").write_text(json.dumps(rows))
    (tmp_path / "data/dataset_info.json").write_text(json.dumps({"sky": {"file_name": "sky.json"}}))
    return tmp_path


def section(name: str) -> tuple[dict[str, str], list[str]]:
    """Files and commands of a section of the docs, but for those that install."""
    text = re.search(rf"^## {re.escape(name)}$(.*?)(?=^## |\Z)", DOCS.read_text(), re.M | re.S)[1]
    files, commands = {}, []
    for kind, body in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S):
        if kind == "sh":
            commands += [line for line in body.splitlines() if not line.startswith("pip install")]
        else:
            first, _, rest = body.partition("\n")
            files[first.removeprefix("# ")] = rest
    return files, commands


def run(command: str, python: Path, folder: Path, **env: str) -> str:
    env = {
        **{key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")},
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "AXOLOTL_DATASET_NUM_PROC": "1", **env,
    }  # fmt: skip
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout + done.stderr


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "adapter_model.safetensors")
    assert any("multilora_branches.lora_scaling" in name for name in found)
    return found


def largest_difference(a, b) -> float:
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_trains_resumes_and_merges(name, folder, environment, report):
    recipe = RECIPES[name]
    python = environment(recipe.package)
    files, commands = section(name)
    for path, text in files.items():
        (folder / path).write_text(text + recipe.config)
    trains = ""
    for command in commands:
        added = next((more for start, more in recipe.options.items() if start in command), "")
        run(command + added, python, folder)
        trains = command + added if " train " in command or " sft " in command else trains
    base, tuned, merged = (AutoModelForCausalLM.from_pretrained(folder / "model") for _ in range(3))
    tuned = PeftModel.from_pretrained(base, folder / recipe.last)
    kinds = {type(module).__name__ for module in tuned.modules()}
    assert "MultiLoraLinear" in kinds
    assert {shape.shape[0] for key, shape in adapter(folder / recipe.last).items() if "lora_A" in key} == {3}
    merged = AutoModelForCausalLM.from_pretrained(next(folder.glob("**/merged")))
    with tuned.disable_adapter():
        bare = logits(tuned)
    trained, off = ((logits(tuned) - other).abs().max().item() for other in (bare, logits(merged)))

    files_more, command_more = recipe.resume
    for path in files:
        text = (folder / path).read_text().replace("output_dir: out\n", "output_dir: again\n")
        (folder / path).write_text(text + files_more)
    run(trains.replace("--output_dir out", "--output_dir again") + command_more, python, folder)
    again = folder / recipe.last.replace("out", "again")
    resumed = largest_difference(adapter(folder / recipe.last), adapter(again))
    moved = largest_difference(adapter(folder / recipe.last), adapter(folder / "out/checkpoint-2"))
    report(name, python, recipe.package, trained=trained, resumed=resumed, merged=off)
    assert trained > 1e-2
    assert off < 1e-5
    assert resumed < 1e-6 < 1e-3 < moved


def test_llamafactory_starts_processes_that_know_the_method(folder, environment):
    python, (files, commands) = environment("llamafactory"), section("LLaMA-Factory")
    (folder / "train.yaml").write_text(files["train.yaml"] + RECIPES["LLaMA-Factory"].config)
    run(commands[0], python, folder)
    said = run(commands[1], python, folder, FORCE_TORCHRUN="1", NPROC_PER_NODE="2", USE_LIBUV="0")
    assert "Initializing 2 distributed tasks" in said
    assert largest_difference(adapter(folder / "out"), adapter(folder / "start")) > 1e-3


def test_ms_swift_goes_on_from_an_adapter(folder, environment):
    python = environment("ms-swift")
    run("multilora-fast init model start --lora-num 3 --r 4 --target-modules all-linear", python, folder)
    train = (
        "python -m multilora_fast.peft swift sft --adapters start --model model --dataset sky.jsonl --output_dir out"
    )
    run(f"{train} --load_args false --add_version false{SWIFT}", python, folder)
    assert largest_difference(adapter(folder / "out/checkpoint-3"), adapter(folder / "start")) > 1e-3


def axolotl_config(folder: Path, **changed: str) -> None:
    lines = section("axolotl")[0]["train.yaml"] + AXOLOTL
    for key, value in changed.items():
        lines = re.sub(rf"^{key}: .*\n", "", lines, flags=re.M) + f"{key}: {value}\n"
    (folder / "train.yaml").write_text(lines)


def test_axolotl_refuses_what_it_would_do_wrong(folder, environment):
    python = environment("axolotl")
    for changed, says in (
        (
            {"load_in_4bit": "true"},
            "ValueError: adapter: multilora has an unquantized base: to train on 4 bits, make an",
        ),
        ({"merge_method": "memory_efficient"}, "ValueError: adapter: multilora needs merge_method: legacy"),
    ):
        axolotl_config(folder, **changed)
        with pytest.raises(AssertionError, match=re.escape(says)):
            run("axolotl train train.yaml --launcher python", python, folder)
        assert not (folder / "out").exists()


def test_axolotl_goes_on_from_an_adapter_on_a_base_in_4_bits(folder, environment):
    python = environment("axolotl")
    run("multilora-fast init model start --lora-num 3 --r 4 --dtype float32", python, folder)
    axolotl_config(folder, adapter="qlora", load_in_4bit="true", lora_model_dir="start", plugins="[]", multilora="{}")
    said = run("python -m multilora_fast.peft axolotl train train.yaml --launcher python", python, folder)
    assert "prepare_model_for_kbit_training" in said
    assert largest_difference(adapter(folder / "out"), adapter(folder / "start")) > 1e-3
