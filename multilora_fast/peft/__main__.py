"""``python -m multilora_fast.peft PROGRAM ARGUMENTS…`` runs a Python program with MultiLoRA registered in PEFT.

PROGRAM is a file, ``-m MODULE``, or a console script such as ``llamafactory-cli``. Processes that it starts register
MultiLoRA too, through ``startup/`` on PYTHONPATH.
"""

import os
import runpy
import shutil
import sys
from pathlib import Path
from types import ModuleType, TracebackType
from typing import NoReturn

STARTUP = str(Path(__file__).parents[1] / "startup")
USAGE = "usage: python -m multilora_fast.peft (PROGRAM | -m MODULE) [ARGUMENTS ...]"


def main() -> None:
    words = sys.argv[1:]
    as_module = words[:1] == ["-m"]
    if words[:1] in (["-h"], ["--help"]):
        print(f"{USAGE}\n\n{__doc__}", end="")
        return
    if len(words) < 1 + as_module or (words[0].startswith("-") and not as_module):
        _fail(USAGE)
    given = os.environ.get("PYTHONPATH")
    others = [path for path in given.split(os.pathsep) if path != STARTUP] if given else []
    os.environ["PYTHONPATH"] = os.pathsep.join([STARTUP, *others])
    hook = sys.excepthook
    sys.excepthook = lambda kind, error, trace: hook(kind, error.with_traceback(_own(trace)), _own(trace))
    if as_module:
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    program = words[0] if os.path.isfile(words[0]) else _script(words[0])
    sys.argv = [program, *words[1:]]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(program))
    _run_file(os.path.abspath(program))


def _run_file(path: str) -> None:
    """Like runpy.run_path, which clears the module's globals before atexit handlers run."""
    main = ModuleType("__main__")
    main.__file__ = path
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


def _script(name: str) -> str:
    """The path of the console script ``name``, of this Python if it has one."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        _fail(f"multilora_fast.peft: {name} is no file, and no command of that name is installed.")
    with open(found, "rb") as file:
        if not (file.read(2) == b"#!" and b"python" in file.readline() + file.readline()):
            _fail(f"multilora_fast.peft: {found} is no Python program.")
    return found


def _own(trace: TracebackType | None) -> TracebackType | None:
    """The part of a traceback that is the program's."""
    while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        trace = trace.tb_next
    return trace


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
