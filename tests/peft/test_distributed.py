"""Data-parallel and sharded training on two gloo processes: the gradients and losses of one process."""

import json
import re
from pathlib import Path

import pytest
import torch
from distributed_worker import BATCH, CASES, WORLD, gradients, model, stepped, work
from processes import FORKS, finished
from safetensors.torch import load_file
from tiny import llama
from tiny_training import CHATS, PROMPTS, make_tokenizer, write

from multilora_fast.training.config import TrainSettings
from multilora_fast.training.run import run

ROOT = Path(__file__).parents[2]

FLOAT32 = [case for case in CASES if "bf16" not in case]


def options(case: str) -> dict:
    return {
        "lora_num": 1 if "n=1" in case or "scalar" in case else 3,
        "scaling": "scalar" if "scalar" in case else "vector",
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each process found."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("needs torch.distributed with gloo")
    folder = tmp_path_factory.mktemp("distributed")
    processes = [FORKS.Process(target=work, args=(rank, str(folder))) for rank in range(WORLD)]
    for process in processes:
        process.start()
    assert [finished(process) for process in processes] == [0] * WORLD
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(WORLD)]


def error(ours: dict, wanted: dict) -> dict[str, float]:
    assert ours.keys() == wanted.keys()
    return {name: ((ours[name].double() - t.double()).norm() / t.norm()).item() for name, t in wanted.items()}


@pytest.mark.parametrize("case", FLOAT32)
def test_gradients_are_those_of_one_process(case, found):
    wanted = gradients(model(**options(case)), BATCH)
    for rank in found:
        errors = error(rank[case], wanted)
        print(f"{case}: largest relative error {max(errors.values()):.2g}")
        assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if case not in FLOAT32])
def test_gradients_in_bfloat16_are_as_exact_as_those_of_one_process(case, found):
    """By the 2x rule, against float64."""
    dtype = "bfloat16" if "base" in case else "float32"
    one = model(dtype)
    truth = gradients(model(dtype).double(), BATCH)
    alone = error(gradients(one.bfloat16() if "policy" in case else one, BATCH), truth)
    ours = error(found[0][case], truth)
    print(f"{case}: error of one process {max(alone.values()):.3g}, of two {max(ours.values()):.3g}")
    assert all(found[0][case][name].dtype == torch.float32 for name in truth)
    eps = torch.finfo(torch.bfloat16).eps
    assert not {name: (ours[name], alone[name]) for name in truth if not ours[name] <= 2 * alone[name] + eps}


@pytest.mark.parametrize(("n", "shares"), [(1, ({1}, {0})), (3, ({2}, {1}))])
def test_fsdp_trains_as_one_process_and_saves_whole_tensors(n, shares, found):
    """Also with fewer branches than processes: the second then holds none."""
    assert tuple(rank[f"share n={n}"] for rank in found) == shares
    wanted = torch.stack(stepped(model(lora_num=n), BATCH))
    assert wanted[-1] < wanted[0]
    torch.testing.assert_close(found[0][f"losses n={n}"], wanted, rtol=1e-4, atol=0)
    for rank in found:
        torch.testing.assert_close(rank[f"logits again n={n}"], rank[f"logits n={n}"], rtol=1e-6, atol=1e-6)


def test_restore_float32_says_when_it_comes_too_late(found):
    assert found[0]["refused"].startswith("model is sharded by FSDP2")


def test_train_under_accelerate_with_fsdp2_is_train_in_one_process(tmp_path):
    """The command of docs/training.md, with accelerate taking the CPUs for GPUs."""
    pytest.importorskip("accelerate", reason="needs accelerate")
    from fsdp_on_cpu import launch

    llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    files = write(tmp_path / "sky.jsonl", PROMPTS), write(tmp_path / "grass.jsonl", CHATS)
    words = ["train", *files, "--model", tmp_path / "model", "--output", tmp_path / "two"]
    words += ["--batch-size", 2, "--max-steps", 4, "--save-steps", 2, "--lora-num", 1, "--r", 4]
    words += ["--learning-rate", 3e-2, "--eval-fraction", 0.2, "--dtype", "float32", "--gradient-checkpointing"]
    processes = launch(str(ROOT / "examples/fsdp2.yaml"), WORLD, words, tmp_path / "said")
    codes = [finished(process) for process in processes]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(WORLD)]
    assert codes == [0] * WORLD, said
    for text in said:  # the model itself, its embeddings, two decoder layers, and the norm and head together
        assert "5 modules sharded in 2 processes" in text
    assert "".join(said).count("sky: 16 rows to train on, 4 held out") == 1

    sizes = {"batch_size": 4, "max_steps": 4, "save_steps": 2, "lora_num": 1, "r": 4}
    one = run(TrainSettings(str(tmp_path / "model"), tmp_path / "one", files, dtype="float32", learning_rate=3e-2,
                       eval_fraction=0.2, **sizes))  # fmt: skip
    log = json.loads((tmp_path / "two/trainer_state.json").read_text())["log_history"]
    for mine, wanted in zip(log, one.state.log_history, strict=True):
        same = [key for key in wanted if key == "loss" or re.fullmatch(r"eval_.+_(loss|accuracy)", key)]
        assert all(mine[key] == pytest.approx(wanted[key], rel=1e-4) for key in same)
    for path in ("", "checkpoint-2"):
        ours, theirs = (load_file(tmp_path / name / path / "adapter_model.safetensors") for name in ("two", "one"))
        assert ours.keys() == theirs.keys()
        errors = [((ours[name] - t).norm() / t.norm()).item() for name, t in theirs.items()]
        print(f"adapter {path or 'at the end'}: largest relative error {max(errors):.2g}")
        assert max(errors) < 1e-4
