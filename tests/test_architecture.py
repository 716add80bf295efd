"""The layout: light imports, the place of kernels/, the direction of dependencies."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "multilora_fast"
# Folders and the files beside them, from the ground up: each imports from itself and from lower floors. Those on the
# ground may import one another.
FLOORS = [
    ("validation", "files", "devices", "models", "console", "reference", "testing"),
    ("kernels",), ("ops",), ("layers",), ("adapters",), ("peft",), ("spectrum", "memory"), ("benchmark",),
    ("training", "demo", "integrations"), ("cli",), ("startup",),
]  # fmt: skip
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"}
MODULES |= {f"kernels.{path.stem}": path for path in sorted((ROOT / "kernels").glob("*.py"))}


def imported(path: Path) -> set[str]:
    """All names that a file imports, at its top or later: modules, and possible submodules."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module if node.level == 0 else f"multilora_fast.{path.parent.name}.{node.module or ''}"
            assert node.level < 2, f"{path.name} imports from above its folder by a relative name"
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def own(path: Path) -> set[str]:
    """The modules of this package that a file imports."""
    mine = (name for name in imported(path) if name.startswith("multilora_fast."))
    found = {name.removeprefix("multilora_fast.") for name in mine} & set(MODULES)
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def modules_after(*statements: str) -> list[set[str]]:
    """The top-level modules loaded after each of the statements, which one process runs."""
    code = "import sys; before = set(sys.modules)"
    code += "".join(f"; {statement}; print(*(set(sys.modules) - before))" for statement in statements)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return [{name.split(".")[0] for name in line.split()} for line in done.stdout.splitlines()]


def test_imports_are_light_and_kernels_is_no_top_level_package():
    assert (ROOT / "multilora_fast/kernels").is_symlink()
    assert not (ROOT / "kernels/__init__.py").exists()
    light, kernels, both = modules_after(
        "import multilora_fast, multilora_fast.models",
        "from multilora_fast.kernels import shrink",
        "from transformers import LlamaForCausalLM",
    )
    assert "torch" in light
    assert not light & {"kernels", "triton", "transformers", "peft", "matplotlib", "datasets", "typer"}
    assert "triton" in kernels
    assert "kernels" not in kernels
    assert "transformers" in both


def test_kernels_import_torch_and_triton_only():
    for path in (ROOT / "kernels").glob("*.py"):
        others = {name for name in imported(path) if not name.startswith("multilora_fast.kernels.")}
        tops = {name.split(".")[0] for name in others}
        assert tops <= {"torch", "triton", *sys.stdlib_module_names}, f"{path.name} imports {sorted(others)}"


def room(name: str) -> str:
    return name.split(".")[0]


def test_every_room_has_a_floor():
    assert {room(name) for name in MODULES} == set(FLOOR)


def test_imports_go_down():
    upward = [
        f"{name} imports {other}"
        for name, path in MODULES.items()
        for other in own(path)
        if room(other) != room(name) and not (FLOOR[room(other)] < FLOOR[room(name)] or FLOOR[room(name)] == 0)
    ]
    assert not upward


def test_imports_have_no_cycle():
    TopologicalSorter({name: own(path) - {name} for name, path in MODULES.items()}).prepare()


def test_the_layout_stays_flat():
    assert len(list(PACKAGE.glob("*.py"))) <= 10
    assert all(len(path.relative_to(PACKAGE).parts) <= 2 for path in PACKAGE.rglob("*.py"))


def test_the_library_imports_nothing_that_stays_in_the_repository():
    for name, path in MODULES.items():
        assert not {top.split(".")[0] for top in imported(path)} & {"bench", "tests", "examples", "kernels"}, name


def test_integrations_load_when_their_trainer_asks_and_stay_short():
    paths = list((PACKAGE / "integrations").glob("*.py"))
    assert not [name for name, path in MODULES.items() if room(name) != "integrations" and
                any(room(other) == "integrations" for other in own(path))]  # fmt: skip
    assert sum(len(path.read_text().splitlines()) for path in paths) < 150


def test_the_demo_is_a_leaf():
    users = {name for name, path in MODULES.items() if any(room(other) == "demo" for other in own(path))}
    assert {name for name in users if room(name) != "demo"} == {"cli.demo"}


def test_benches_import_no_test_file():
    for path in (ROOT / "bench").glob("*.py"):
        assert not [name for name in imported(path) if name.startswith("bench.test_")], path.name


def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    wanted = re.search(r"^\.PHONY: (.+)$", text, re.M)[1].split()
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in shown.stdout.splitlines()] == wanted
    assert sorted(re.findall(r"^([a-z0-9-]+):", text, re.M)) == sorted(wanted)
