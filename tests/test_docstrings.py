"""Public modules, classes and functions have docstrings in one dialect, and functions say what they return."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "softmask_fast"
TREES = {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def public(node, inside):
    """(qualified name, node) of the public classes, methods and functions below a node, and of `__init__`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not child.name.startswith("_") or child.name == "__init__":
                yield f"{inside}{child.name}", child
                if isinstance(child, ast.ClassDef):
                    yield from public(child, f"{inside}{child.name}.")


PUBLIC = [found for file, tree in TREES.items() for found in public(tree, f"{file}: ")]


def test_public_names_are_documented():
    """Once is enough for a name: overrides and stand-ins do what the first one says. torch documents a few as well."""
    documented = {node.name for _, node in PUBLIC if ast.get_docstring(node)} | {"__init__", "extra_repr"}
    assert [name for name, node in PUBLIC if node.name not in documented] == []
    assert [name for name, node in PUBLIC if isinstance(node, ast.ClassDef) and not ast.get_docstring(node)] == []
    assert [file for file, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_public_functions_say_what_they_return():
    """All but Triton's kernels, whose results have no types."""
    functions = [(name, node) for name, node in PUBLIC if not isinstance(node, ast.ClassDef)]
    kernels = {name for name, node in functions if any("jit" in ast.unparse(mark) for mark in node.decorator_list)}
    assert [name for name, node in functions if node.returns is None and name not in kernels] == []


def test_docstrings_have_one_dialect():
    """Google's sections, each on lines of its own, and Markdown's single backticks."""
    texts = {name: ast.get_docstring(node) or "" for name, node in [*PUBLIC, *TREES.items()]}
    other = re.compile(r"(?<!`)``(?!`)|^ *:(param|return|raises)|^ *(Args|Attributes|Returns|Raises): *\S", re.M)
    assert [name for name, text in texts.items() if other.search(text)] == []


SECTION = re.compile(r"^(?:Args|Attributes|Raises):\n((?:    .*\n|\n)+)", re.M)


def test_items_of_a_section_have_names():
    """A line at their level without one is a broken continuation."""
    texts = {name: ast.get_docstring(node) or "" for name, node in [*PUBLIC, *TREES.items()]}
    lines = [
        (name, line)
        for name, text in texts.items()
        for part in SECTION.findall(text + "\n")
        for line in part.splitlines()
    ]
    assert len(lines) > 100
    item = re.compile(r"    (?: |\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*(?: \([^)]*\))?:)")
    assert [found for found in lines if found[1] and not item.match(found[1])] == []
