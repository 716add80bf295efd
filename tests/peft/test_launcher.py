"""``python -m multilora_fast.peft PROGRAM``: as Python runs it, but that PEFT knows the method, there and below.

Most runs are of the launcher beside stand-ins for PEFT and this package, which take seconds to import.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "multilora_fast"
REPORT = """
import json, sys
print(json.dumps([sys.argv, sys.path[0], __name__, __file__, sys.modules["__main__"].__dict__ is globals()]))
"""


def run(*words, cwd, launched, path):
    prefix = [sys.executable, *(["-m", "multilora_fast.peft"] if launched else [])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([*prefix, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True)


def both(*words, cwd):
    ours, pythons = (run(*words, cwd=cwd, launched=launched, path=[cwd / "light"]) for launched in (True, False))
    assert (ours.returncode, ours.stdout) == (pythons.returncode, pythons.stdout), ours.stderr
    return ours, pythons


@pytest.fixture
def folder(tmp_path) -> Path:
    light = tmp_path / "light"
    (light / "multilora_fast/peft").mkdir(parents=True)
    (light / "multilora_fast/peft/__main__.py").symlink_to(PACKAGE / "peft/__main__.py")
    (light / "multilora_fast/startup").symlink_to(PACKAGE / "startup")
    (light / "multilora_fast/__init__.py").touch()
    (light / "multilora_fast/peft/__init__.py").write_text("import peft\npeft.methods.append('MULTILORA')\n")
    (light / "peft.py").write_text("methods = ['LORA']\n")
    programs = tmp_path / "programs"
    (programs / "app").mkdir(parents=True)
    (programs / "report.py").write_text(REPORT)
    (programs / "app/__main__.py").write_text(REPORT)
    (programs / "beside.py").write_text("name = 'beside'")
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ["programs/report.py", "a", "--b", "-m", "c d"],
        ["-m", "programs.report", "-x"],
        ["-m", "programs.app", "-x"],
    ],
    ids=str,
)
def test_argv_path_and_main_are_those_of_python(words, folder):
    both(*words, cwd=folder)


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(3)",
        "import sys; sys.exit('words')",
        "import beside\ndef f():\n    raise KeyError(beside.name)\nf()",
        "import sys\nsys.excepthook = lambda *x: print('mine', x[0])\n1 / 0",
        "def broken(:",
        "raise KeyboardInterrupt",
        "raise RuntimeError from ValueError('first')",
    ],
)
def test_exit_codes_and_tracebacks_are_those_of_python(code, folder):
    (folder / "programs/program.py").write_text(code)
    ours, pythons = both("programs/program.py", cwd=folder)
    shown = ours.stderr.replace(str(folder) + "/", "")
    assert shown == pythons.stderr.replace(str(folder) + "/", "")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "usage: python -m multilora_fast.peft (PROGRAM | -m MODULE) [ARGUMENTS ...]"),
        (["-m"], "usage: "),
        (["--lora-num", "3"], "usage: "),
        (["nowhere.py"], "nowhere.py is no file, and no command of that name is installed."),
        (["env"], "env is no Python program."),
    ],
)
def test_what_is_no_program(words, says, folder):
    done = run(*words, cwd=folder, launched=True, path=[folder / "light"])
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_processes_below_know_the_method_and_their_own_sitecustomize(folder):
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text("print('theirs', flush=True)")
    (folder / "programs/child.py").write_text(
        "import importlib.util, sys\nassert importlib.util.find_spec('peft')\n"
        "assert 'multilora_fast' not in sys.modules\nimport peft\nprint(*peft.methods, flush=True)\n"
        "import multilora_fast.peft\n"
    )
    (folder / "programs/parent.py").write_text(
        "import subprocess, sys\nimport peft\nprint(*peft.methods, flush=True)\n"
        "sys.exit(subprocess.run([sys.executable, 'programs/child.py']).returncode)\n"
    )
    done = run("programs/parent.py", cwd=folder, launched=True, path=[folder / "light", folder / "site"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["theirs", "LORA MULTILORA"] * 2


def test_a_process_below_that_imports_this_package_first(folder):
    path = [PACKAGE / "startup", folder / "light"]
    done = run("-c", "import multilora_fast.peft, peft; print(peft.methods)", cwd=folder, launched=False, path=path)
    assert (done.stdout, done.stderr) == ("['LORA', 'MULTILORA']\n", "")


def test_a_console_script(folder):
    script = folder / "programs/tool"
    script.write_text(f"#!{sys.executable}\n{REPORT}")
    script.chmod(0o755)
    path = os.environ["PATH"]
    try:
        os.environ["PATH"] = f"{script.parent}{os.pathsep}{path}"
        ours = run("tool", "-x", cwd=folder, launched=True, path=[folder / "light"])
    finally:
        os.environ["PATH"] = path
    pythons = run(script, "-x", cwd=folder, launched=False, path=[folder / "light"])
    assert ours.stdout == pythons.stdout


def test_a_process_below_with_peft_itself(tmp_path):
    methods = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as methods; print(*(m.value for m in methods))"
    done = run("-c", methods, cwd=tmp_path, launched=False, path=[PACKAGE / "startup", ROOT])
    assert "MULTILORA" in done.stdout.split(), done.stderr
