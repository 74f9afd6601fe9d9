"""The rooms of the package import one way, no module imports itself through others, and what is light stays light."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "softmask_fast"
# Each room imports itself and the rooms before it. Beside them stand the modules of the root: the ground floor, which
# all but `ops` may use, and the entry points on top.
ROOMS = ("ops", "ground", "data", "model", "evaluation", "tasks", "training", "entry")
GROUND = ("config", "errors", "options", "utils")
ENTRY = ("train", "finetune", "cli", "doctor")
ADAPTERS = {"ops", "ground", "model", "adapters"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    first = module.split(".")[1]
    return "ground" if first in GROUND else "entry" if first in ENTRY else first


def imports_of(module: str) -> set[str]:
    """The package's modules that a module imports, at its head or in a function; not those for type checkers alone."""
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


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("softmask_fast", ("torch", "numpy")),
        ("softmask_fast.ops", ("triton", "transformers", "timm", "nvidia.dali", "deepspeed", "matplotlib")),
        ("softmask_fast.model.pretraining", ("nvidia.dali", "deepspeed", "matplotlib")),
        ("softmask_fast.model.export", ("nvidia.dali", "deepspeed", "matplotlib")),
        ("softmask_fast.evaluation", ("nvidia.dali", "deepspeed", "matplotlib")),
        ("softmask_fast.evaluation.heatmaps", ("nvidia.dali", "deepspeed")),
        ("softmask_fast.tasks.recipes", ("deepspeed",)),
    ],
)
def test_what_is_light_stays_light(module, absent):
    """In a new process, as another test may have loaded everything."""
    code = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
