"""The commands of each stage of bench/gpu.sh, with a stub in place of Python."""

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from bench import junit

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench/gpu.sh"
STAGES = ("tests", "layers", "tune", "steps", "memory", "experts")
LIMIT = 180  # seconds of a stage


def gpu(*arguments, python="false") -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHON": str(python)}
    return subprocess.run(["bash", str(SCRIPT), *map(str, arguments)], env=env, capture_output=True, text=True)


@pytest.fixture
def stub(tmp_path) -> Path:
    """A Python that prints its parent's command line, which holds the time limit, and its own arguments."""
    path = tmp_path / "python"
    parent = '$(tr "\\0" " " < /proc/$PPID/cmdline)'
    path.write_text(f'#!/bin/bash\ncase "$2" in "import xdist") exit 0;; esac\necho "{parent} | $@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_it_is_a_shell_script():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


@pytest.mark.parametrize("arguments", [(), ("bench",), ("test", "out")])
def test_an_unknown_stage_is_named_and_nothing_runs(arguments, tmp_path):
    done = gpu(*arguments)
    assert done.returncode == 2
    assert "must be tests, layers, tune, steps, memory, experts, study or all" in done.stderr
    assert f"'{(*arguments, '')[0]}'" in done.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_its_limit_and_what_it_runs_exists(stage, stub, tmp_path):
    out = tmp_path / "out"
    done = gpu(stage, out, python=stub)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ") for line in done.stdout.splitlines()]
    limits = [int(parent.split("--kill-after=15 ")[1].split()[0]) for parent, _ in lines if "timeout" in parent]
    assert 0 < sum(limits) < LIMIT
    for _, command in lines:
        words = command.split()
        assert words[0] == "-m"
        assert words[1] == "pytest" or (ROOT / f"{words[1].replace('.', '/')}.py").exists()
        files = [word.split("::")[0] for word in words if word.startswith(("tests/", "bench/"))]
        assert all((ROOT / file).exists() for file in files), files
        assert str(out) in command
    if stage == "tests":
        assert "-n 6" in lines[0][1]


def test_all_runs_every_stage_in_order_and_goes_on_after_a_failure(tmp_path, stub):
    done = gpu("all", tmp_path / "out", python=stub)
    assert done.returncode == 0
    first = [line.split(" | ")[1] for line in done.stdout.splitlines()]
    starts = ("tests/test_gpu.py", "bench/test_layer.py", "bench.tune", "bench/test_step.py", "bench.plan_check",
              "bench/test_experts.py")  # fmt: skip
    at = [next(i for i, command in enumerate(first) if start in command) for start in starts]
    assert at == sorted(at)
    assert gpu("all", tmp_path / "out", python="false").returncode == 1


def test_the_study_takes_a_prepared_folder(tmp_path):
    done = gpu("study", tmp_path / "out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "examples.multitask.prepare" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("status", [0, 2, 3])
def test_the_study_stops_in_time_packs_its_records_and_steps_back_from_captures(status, tmp_path, stub, monkeypatch):
    (tmp_path / "prepared.json").touch()
    stub.write_text(f'{stub.read_text()}case "$*" in *--eager* | *--report-only*) ;; *) exit {status};; esac\n')
    monkeypatch.setenv("LIMIT", "200")
    done = gpu("study", tmp_path / "out", tmp_path, python=stub)
    assert done.returncode == (2 if status == 2 else 0), done.stderr
    lines = [line.split(" | ") for line in done.stdout.splitlines() if " | " in line]
    assert ["--eager" in command for _, command in lines] == ([False, True, False] if status == 3 else [False, False])
    limits = [int(parent.split("--kill-after=1")[1].split()[1]) for parent, _ in lines]
    assert limits[0] + limits[-1] == 200 - 5
    assert "--minutes 2.41" in lines[0][1]  # 145 s, then 15 s to end what was begun, and 35 s for the page
    assert "--report-only" in lines[-1][1]
    assert (tmp_path / "out/study.tar.gz").stat().st_size > 0


def test_the_page_of_the_study_can_wait(tmp_path, stub, monkeypatch):
    (tmp_path / "prepared.json").touch()
    monkeypatch.setenv("PAGE", "0")
    (command,) = (
        line for line in gpu("study", tmp_path / "out", tmp_path, python=stub).stdout.splitlines() if " | " in line
    )
    assert "--minutes 3.66" in command  # of the 240 s
    assert "--report-only" not in command


def test_a_run_of_tests_is_kept_as_json(tmp_path):
    cases = (
        '<testcase classname="tests.a" name="b"><failure message="assert 1 == 2&#10;more">x</failure></testcase>'
        '<testcase classname="tests.a" name="c"/>'
    )
    suite = f'<testsuite tests="3" failures="1" errors="0" skipped="1" time="2.5">{cases}</testsuite>'
    source, target = tmp_path / "tests.xml", tmp_path / "tests.json"
    source.write_text(f'<?xml version="1.0"?><testsuites>{suite}</testsuites>')
    junit.main([str(source), str(target)])
    found = json.loads(target.read_text())
    assert {key: found[key] for key in ("tests", "failures", "skipped", "seconds")} == {
        "tests": 3, "failures": 1, "skipped": 1, "seconds": 2.5,
    }  # fmt: skip
    assert found["failed"] == {"tests.a::b": ["assert 1 == 2"]}
    assert found["conditions"]["versions"]["torch"]
    assert not source.exists()
