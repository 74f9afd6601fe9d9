"""The package imports one way, without circles, and its light modules load no heavy library."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "softmask_fast"
# Each room (a folder, or some modules of the root) imports itself and the rooms before it; `ops` imports only itself.
ROOMS = ("ground", "data", "ops", "model", "evaluation", "tasks", "training", "entry")
GROUND = ("config", "errors", "hub", "installation", "options", "utils")
ENTRY = ("train", "finetune", "launcher", "cli", "doctor", "word_maps")
ADAPTERS = {"ops", "ground", "model", "adapters"}
# Modules, lightest first, and the libraries that they must not load.
LIGHT = {
    "softmask_fast": ("torch", "numpy"),
    "softmask_fast.data.workers": ("torch", "transformers", "fsspec", "nvidia.dali"),  # what workers start with
    "softmask_fast.tasks.datasets": ("torch", "transformers", "fsspec", "nvidia.dali"),
    "softmask_fast.ops": ("triton", "transformers", "timm", "nvidia.dali", "deepspeed", "matplotlib"),
    "softmask_fast.evaluation": ("transformers", "timm", "nvidia.dali", "deepspeed", "matplotlib"),
    "softmask_fast.model.pretraining": ("nvidia.dali", "deepspeed", "matplotlib"),
    "softmask_fast.model.export": ("nvidia.dali", "deepspeed", "matplotlib"),
    "softmask_fast.evaluation.heatmaps": ("nvidia.dali", "deepspeed"),
    "softmask_fast.tasks.recipes": ("deepspeed",),
}
# What training starts with, in a process of its own: the rest comes when it is used.
START = {"softmask_fast.train": ("nvidia.dali", "matplotlib", "tensorboard", "torch._inductor.compile_fx", "xformers")}
IMPORT_ALL = """
import importlib, sys
for module, absent in modules.items():
    importlib.import_module(module)
    print(module, *[name for name in absent if name in sys.modules])
"""


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    first = module.split(".")[1]
    return "ground" if first in GROUND else "entry" if first in ENTRY else first


def imports_of(module: str) -> set[str]:
    """The package's modules that a module imports, at its top or in a function, but not under TYPE_CHECKING."""
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            below = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            # `from package import submodule` needs the submodule, other names need the package
            found |= below | ({node.module} if len(below) < len(node.names) else set())
    return {name for name in found & MODULES.keys() if name not in ("softmask_fast", module)}


IMPORTS = {module: imports_of(module) for module in MODULES}


@pytest.mark.parametrize("module", [module for module in MODULES if module != "softmask_fast"])
def test_rooms_import_one_way(module):
    room = room_of(module)
    if room == "adapters":
        allowed = ADAPTERS
    elif room == "entry":
        allowed = {*ROOMS, "adapters"}
    elif room == "ops":
        allowed = {"ops"}
    else:
        allowed = set(ROOMS[: ROOMS.index(room) + 1])
    wrong = {name for name in IMPORTS[module] if room_of(name) not in allowed}
    assert not wrong, f"{module} ({room}) imports {sorted(wrong)}"


def test_no_module_imports_itself_through_others():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_every_room_has_its_place():
    assert {room_of(module) for module in MODULES if module != "softmask_fast"} == {*ROOMS, "adapters"}


def test_no_test_file_imports_another():
    """What they share stands in tests/helpers."""
    files = Path(__file__).parent.rglob("*.py")
    found = [path.name for path in files if re.search(r"^ *(?:from|import) test_", path.read_text(), re.MULTILINE)]
    assert not found


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("modules", [LIGHT, START], ids=["light", "start"])
def test_light_modules_load_no_heavy_library(modules):
    """One new process imports all of them in turn, so that a library shows up at the first module that loads it."""
    lines = run_python(f"modules = {modules!r}\n{IMPORT_ALL}").splitlines()
    assert [line for line in lines if line.startswith("softmask_fast")] == list(modules)  # DeepSpeed warns there, too
