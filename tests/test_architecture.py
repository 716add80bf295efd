"""What the house promises: light imports, the kernels' place, the direction of dependencies."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def modules_after(statement: str) -> set[str]:
    code = f"import sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_importing_the_library_loads_torch_and_nothing_heavier():
    loaded = modules_after("import multilora_fast")
    assert "torch" in loaded
    assert not loaded & {"kernels", "triton", "transformers", "peft", "matplotlib", "datasets", "typer"}


def test_kernels_never_become_a_top_level_package():
    assert (ROOT / "multilora_fast/kernels").is_symlink()
    assert not (ROOT / "kernels/__init__.py").exists()
    assert "kernels" not in modules_after("import multilora_fast; from multilora_fast.kernels import shrink")
    both = "import multilora_fast.kernels.shrink; from transformers import LlamaForCausalLM"
    assert "transformers" in modules_after(both)


def test_kernels_import_torch_and_triton_only():
    standard = sys.stdlib_module_names
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                assert top in {"torch", "triton"} or top in standard, f"{path.name} imports {name}"
