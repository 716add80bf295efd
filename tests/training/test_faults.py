"""A run that is killed, meets a full disk or loses a process resumes to the same result. ``make test`` kills it 3
times, ``make soak`` 20 times."""

import json
import math
import random
import shutil
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from disk import disk_of
from peft import PeftModel
from processes import FORKS, TIMEOUT, finished, pair, start, work
from soak import SOAK, amount
from tiny import llama
from tiny_training import CHATS, PROMPTS, write

from multilora_fast.adapters.files import WEIGHTS
from multilora_fast.training.checkpoint import STATE, last_checkpoint
from multilora_fast.training.config import RECORD, TrainSettings

KILLS = amount(3, 20)
STEPS = amount(12, 40)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="trains in processes on a CPU")


@pytest.fixture
def settings(model, tmp_path):
    """Makes settings with the output directory ``name``, which they resume if it holds a run."""
    return lambda name, **options: settings_of(model, tmp_path, name, **options)


def settings_of(model: str, parent: Path, name: str, **options) -> TrainSettings:
    files = (write(parent / "sky.jsonl", PROMPTS), write(parent / "grass.jsonl", CHATS))
    small = {"dtype": "float32", "r": 4, "learning_rate": 3e-2, "lora_dropout": 0.1, "eval_fraction": 0.2}
    sizes = {"max_steps": STEPS, "save_steps": 2, "resume": (parent / name / RECORD).exists()}
    return TrainSettings(model, parent / name, files, **{**small, **sizes, **options})


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """The output of an unbroken run."""
    one = settings_of(model, tmp_path_factory.mktemp("whole"), "whole")
    assert finished(start(one)) == 0
    return one.output


def outcome(folder: Path) -> tuple[list[dict], bytes]:
    """The last losses and accuracies, by task, and the adapter's file."""
    log = json.loads((folder / STATE).read_text())["log_history"]
    named = [{k: v for k, v in entry.items() if k.endswith(("loss", "accuracy"))} for entry in log]
    final = [entry for entry in named if entry and "train_loss" not in entry][-2:]
    return final, (folder / WEIGHTS).read_bytes()


def assert_loads(folder: Path) -> Path | None:
    last = last_checkpoint(folder)
    if last is not None:
        PeftModel.from_pretrained(llama(), last)
    return last


def is_being_written(folder: Path, since: float) -> bool:
    """Whether a checkpoint or the final adapter was begun after ``since`` and is incomplete."""
    begun = [path for path in folder.glob("checkpoint-*") if not (path / STATE).exists()]
    files = [file for path in (*begun, *folder.glob(".unfinished*")) for file in (path, *path.glob("*"))]
    with suppress(FileNotFoundError):  # moved meanwhile
        return any(file.stat().st_mtime > since for file in files)
    return False


def kill(process, folder: Path, rng: random.Random, seconds: float | None) -> tuple[bool, bool]:
    """Kill the process within some seconds or at one of its next checkpoints. Returns whether it was killed, and
    whether it was writing."""
    began = time.time()
    wait = rng.uniform(0, seconds) if seconds else math.inf
    whole = rng.randint(0, 3)  # checkpoints to let pass
    while process.is_alive() and time.time() < began + wait:
        if not seconds and is_being_written(folder, began):
            if whole == 0:
                time.sleep(rng.uniform(0, 0.004))
                break
            whole -= 1
            while process.is_alive() and is_being_written(folder, began):
                pass
    process.kill()
    process.join()
    return process.exitcode < 0, is_being_written(folder, began)


def test_killed_at_random_moments_it_reaches_what_an_unbroken_run_reaches(settings, whole):
    rng = random.Random(None if SOAK else 0)
    seconds = (whole / STATE).stat().st_mtime - (whole / RECORD).stat().st_mtime  # of the training itself
    kills = midwrite = runs = 0
    while kills < KILLS or not midwrite:
        assert runs < 10 * KILLS, "no kill hit while a file was written"
        one = settings(f"broken-{runs}")
        killed, writing = kill(start(one), one.output, rng, None if kills % 2 else seconds)
        if killed:
            kills += 1
            midwrite += writing
            assert_loads(one.output)
        else:
            assert outcome(one.output) == outcome(whole)
            runs += 1
    one = settings(f"broken-{runs}")
    assert finished(start(one)) == 0
    assert outcome(one.output) == outcome(whole)
    print(f"{kills} kills, {midwrite} of them while a checkpoint or the adapter was written")
    print(f"{runs + 1} runs of {STEPS} steps ended with the losses and the adapter of an unbroken one, to the bit")


def test_killed_before_the_adapter_is_in_its_place_it_is_put_there(settings, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    one = settings("out")
    for name in (WEIGHTS, STATE, "tokenizer.json"):
        (one.output / name).unlink()
    (one.output / ".unfinished").mkdir()
    (one.output / ".unfinished" / WEIGHTS).write_bytes(b"half")
    assert finished(start(one)) == 0
    assert outcome(one.output) == outcome(whole)
    assert (one.output / "tokenizer.json").exists()
    assert not (one.output / ".unfinished").exists()


def test_a_checkpoint_that_is_half_written_is_passed_over(settings, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    one = settings("out")
    (one.output / WEIGHTS).unlink()
    state = one.output / f"checkpoint-{STEPS}" / STATE
    state.write_bytes(state.read_bytes()[:-9])
    assert assert_loads(one.output).name == f"checkpoint-{STEPS - 2}"
    assert finished(start(one)) == 0
    assert outcome(one.output) == outcome(whole)


def on_a_full_disk(settings: TrainSettings, environment: dict[str, str]) -> None:
    with disk_of(20_000):  # a checkpoint's optimizer state does not fit
        work(settings, environment)


def test_a_full_disk_ends_it_and_it_goes_on_once_there_is_space(settings, whole):
    one = settings("out")
    process = FORKS.Process(target=on_a_full_disk, args=(one, {}))
    process.start()
    assert finished(process) == 1
    assert not (one.output / WEIGHTS).exists()
    assert assert_loads(one.output) is None
    assert finished(start(settings("out"))) == 0
    assert outcome(one.output) == outcome(whole)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.skipif(
    version("transformers").startswith("5.17."), reason="transformers 5.17 cannot resume on several CPU processes"
)
def test_a_process_that_dies_ends_the_other_with_an_error(settings):
    one = settings("out", batch_size=2)
    for dies in (1, 0):  # one dies in the first run, the other in its resumption
        before = last_checkpoint(one.output)
        processes = pair(settings("out", batch_size=2))
        deadline = time.monotonic() + TIMEOUT
        while last_checkpoint(one.output) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        processes[dies].kill()
        began = time.monotonic()
        assert finished(processes[1 - dies]) > 0
        print(f"process {dies} of 2 was killed; the other ended with an error after {time.monotonic() - began:.1f} s")
        assert assert_loads(one.output) not in (None, before)
    assert [finished(process) for process in pair(settings("out", batch_size=2))] == [0, 0]
    whole = settings("whole", batch_size=2)
    assert [finished(process) for process in pair(whole)] == [0, 0]
    assert outcome(one.output) == outcome(whole.output)
