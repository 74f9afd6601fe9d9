"""The wheel: one for Python 3.10 and later and torch 2.11 and later, and what happens where nothing can be compiled."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PYTHONS = sorted((Path.home() / ".pyenv" / "versions").glob("3.1[0-9]*/bin/python"))
WITH_NVCC = shutil.which("nvcc") is not None and torch.version.cuda is not None

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="extensions need Linux")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The files of the project without anything that was built."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "softmask_fast"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def run(*command, cwd, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SOFTMASK_FAST_")}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=inherited | environment, capture_output=True, text=True)


def build(source, folder, **environment):
    command = ("-m", "pip", "wheel", "-v", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder)
    result = run(sys.executable, *command, cwd=source, **environment)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    (wheel,) = folder.glob("*.whl")
    return wheel, result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    archs = "90" if WITH_NVCC else "none"
    required = {"SOFTMASK_FAST_REQUIRE_EXTENSION": "1", "SOFTMASK_FAST_CUDA_ARCHS": archs}
    return build(source, tmp_path_factory.mktemp("wheel"), **required)[0]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    command = ("-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel)
    result = run(sys.executable, *command, cwd=folder)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


def test_tag_and_content(wheel):
    assert re.fullmatch(r"softmask_fast-[\d.]+\w*-cp310-abi3-linux_\w+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    libraries = {name for name in names if name.endswith(".so")}
    cuda = {"softmask_fast/_cuda.abi3.so"} if WITH_NVCC else set()
    assert libraries == {"softmask_fast/_C.abi3.so"} | cuda
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "softmask_fast").rglob("*.py")}
    assert sources <= names and "softmask_fast/py.typed" in names


def test_it_runs_from_a_fresh_folder(installed):
    code = """if True:
        import torch
        import softmask_fast
        from softmask_fast.ops import word_soft_mask
        query, grad_output = torch.randn(2, 2, 3, 4, 16)
        key, value = torch.randn(2, 2, 3, 21, 16)
        options = torch.tensor([3, 0]), torch.randn(2, 21, 8)
        for mine, reference in zip(
            word_soft_mask(query, key, value, grad_output, *options, impl="cpp"),
            word_soft_mask(query, key, value, grad_output, *options, impl="reference"),
        ):
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
        print(softmask_fast.__file__)
    """
    result = run(sys.executable, "-c", code, cwd=installed, PYTHONPATH=str(installed))
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.split()[-1] == str(installed / "softmask_fast" / "__init__.py")


@pytest.mark.parametrize("python", PYTHONS, ids=lambda path: path.parents[1].name)
def test_every_python_imports_the_extension(installed, python):
    """The extension and the libraries of this torch, in an interpreter that has no torch."""
    library = next((installed / "softmask_fast").glob("_C.*"))
    code = (
        "import importlib.util as u, sys; assert 'torch' not in sys.modules; "
        f"spec = u.spec_from_file_location('_C', {str(library)!r}); module = u.module_from_spec(spec); "
        "spec.loader.exec_module(module); print(module.__name__, *sys.version_info[:2])"
    )
    libraries = str(Path(torch.__file__).parent / "lib")
    result = run(python, "-I", "-c", code, cwd=installed, LD_LIBRARY_PATH=libraries)
    assert result.returncode == 0 and result.stdout.startswith("_C 3 1"), result.stderr[-4000:]


def test_symbols_of_python_and_torch_are_stable(installed):
    for library in (installed / "softmask_fast").glob("*.so"):
        names = run("nm", "-D", "--undefined-only", library, cwd=installed).stdout.splitlines()
        symbols = {line.split()[-1].split("@")[0] for line in names}
        # in the limited API since Python 3.2
        assert {name for name in symbols if name.startswith(("Py", "_Py"))} <= {"PyModule_Create2"}, library.name
        assert not [name for name in symbols if re.match(r"_ZNK?(2at|3c10|5torch)", name)], library.name
        assert any(name.startswith("aoti_torch_") for name in symbols)


def test_without_a_compiler_it_is_python_and_says_so_once(source, tmp_path):
    pure = shutil.copytree(source, tmp_path / "pure")
    wheel, output = build(pure, tmp_path, CXX="/nonexistent")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    message = r"there is no C\+\+ compiler .*/nonexistent.*several times slower.*impl='cuda' is not there"
    assert len(re.findall(message, output)) == 1, output


@pytest.mark.parametrize(
    ("missing", "message"),
    [({"CXX": "/nonexistent"}, "there is no C++ compiler"), ({"PATH": "", "CUDA_HOME": ""}, "there is no nvcc")],
)
def test_what_is_missing_can_be_made_an_error(source, missing, message):
    if "PATH" in missing:  # a compiler, but no nvcc
        missing["CXX"] = shutil.which("g++") or pytest.skip("no C++ compiler")
    result = run(sys.executable, "setup.py", "--name", cwd=source, SOFTMASK_FAST_REQUIRE_EXTENSION="1", **missing)
    assert result.returncode != 0 and f"SOFTMASK_FAST_REQUIRE_EXTENSION=1: softmask_fast: {message}" in result.stderr
    result = run(sys.executable, "setup.py", "--name", cwd=source, **missing)
    assert result.returncode == 0 and message in result.stderr and "impl='cuda' is not there" in result.stderr
