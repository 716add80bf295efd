"""Registers MultiLoRA as soon as PEFT is imported. Python imports this module at its start in the processes of
``python -m multilora_fast.peft``, which puts this folder on PYTHONPATH. It runs the sitecustomize that it shadows."""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any


class _Registering:
    """Imports multilora_fast.peft after PEFT."""

    @classmethod
    def find_spec(cls, name: str, path=None, target=None):
        if name != "peft":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not cls)
        found = next((spec for spec in others if spec is not None), None)
        if found is not None:
            loader: Any = found.loader
            execute = loader.exec_module

            def exec_module(module):
                execute(module)
                import multilora_fast.peft  # noqa: F401

            loader.exec_module = exec_module
        return found


sys.meta_path.insert(0, _Registering)
_here = Path(__file__).parent
_shadowed: Any = PathFinder.find_spec("sitecustomize", [path for path in sys.path if Path(path) != _here])
if _shadowed is not None:
    _shadowed.loader.exec_module(module_from_spec(_shadowed))
