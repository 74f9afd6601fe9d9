"""The sdist, the wheel made of it (one for Python 3.10 and later, torch 2.11 and later), both installed into empty
environments; and what happens where nothing can be compiled."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from code_blocks import blocks_of
from small_models import tutorial_folder

import softmask_fast

ROOT = Path(__file__).parents[1]
PYTHONS = sorted((Path.home() / ".pyenv" / "versions").glob("3.1[0-9]*/bin/python"))
BUILD = ("setup.py", "build_backend.py")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="extensions need Linux")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The files of the project without anything that was built."""
    folder = tmp_path_factory.mktemp("source")
    for name in (*BUILD, "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "softmask_fast", "examples", "tests", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def run(*command, cwd, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SOFTMASK_FAST_")}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=inherited | environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    """Made without a compiler: what goes into it does not depend on the machine."""
    folder = tmp_path_factory.mktemp("sdist")
    code = f"import build_backend; build_backend.build_sdist({str(folder)!r})"
    result = run(sys.executable, "-c", code, cwd=source, CXX="/nonexistent")
    assert result.returncode == 0, result.stderr[-4000:]
    (archive,) = folder.glob("*.tar.gz")
    return archive


def run_backend(source, folder, code, with_torch, **environment):
    """What Python prints where pip would build: it hides the packages of the environment that the build is for, so that
    torch cannot be imported, and brings setuptools alone."""
    outer, made = Path(torch.__file__).parents[1], Environment(folder / "environment")
    (made.packages / "outer.pth").unlink()
    if with_torch:
        (made.packages / "torch").symlink_to(outer / "torch")
    tools = folder / "tools"
    tools.mkdir()
    for path in (*outer.glob("setuptools*"), outer / "_distutils_hack"):
        (tools / path.name).symlink_to(path)
    hide = f"""if True:
        import importlib.util, site, sys
        hidden = site.getsitepackages()
        sys.path[:] = ["", {str(tools)!r}] + [path for path in sys.path if path not in hidden]
        assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("numpy") is None
        import build_backend
    """
    result = run(made.python, "-I", "-c", f"{hide}\n{code}", cwd=source, **environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("wheel")
    shutil.unpack_archive(sdist, folder)
    (unpacked,) = folder.glob("softmask_fast-*")
    required = {"SOFTMASK_FAST_REQUIRE_EXTENSION": "1", "SOFTMASK_FAST_CUDA_ARCHS": "none"}  # as the released one is
    run_backend(unpacked, folder, f"build_backend.build_wheel({str(folder)!r})", with_torch=True, **required)
    (wheel,) = folder.glob("*.whl")
    return wheel


class Environment:
    """An environment with nothing in it but, by a path file, the packages of this one (torch, setuptools), and what is
    installed then. An editable install of this project does not come through a path file."""

    def __init__(self, folder):
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        (self.packages,) = folder.glob("lib/python3*/site-packages")
        (self.packages / "outer.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")

    def install(self, path, **environment):
        # -vv: with one v, pip 26.3 keeps the warnings of a source archive's build to itself
        command = ("-m", "pip", "--python", self.python, "install", "-vv", "--no-deps", "--no-index")
        result = run(sys.executable, *command, "--no-build-isolation", path, cwd=self.packages, **environment)
        assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
        return result.stdout + result.stderr

    def run(self, code, cwd=None):
        """What isolated Python prints: no PYTHONPATH, no modules from the working folder."""
        result = run(self.python, "-I", "-c", code, cwd=cwd or self.packages)
        assert result.returncode == 0, result.stderr[-4000:]
        return result.stdout


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    made = Environment(tmp_path_factory.mktemp("environment"))
    made.install(wheel)
    return made


@pytest.fixture(scope="module")
def installed(environment):
    return environment.packages


def test_content_of_the_sdist(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames() if archive.getmember(name).isfile()}
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in ("csrc", "softmask_fast", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    metadata = {name for name in names if name.startswith("softmask_fast.egg-info/")}
    rest = {"README.md", "LICENSE", *BUILD, "pyproject.toml", "MANIFEST.in", "constraints.txt"}
    assert names - metadata == sources | rest | {"PKG-INFO", "setup.cfg"}  # no tests, no data


@pytest.mark.parametrize(
    ("with_torch", "compiler", "asked"), [(True, "g++", []), (False, "g++", ["torch>=2.11"]), (False, "/none", [])]
)
def test_torch_is_asked_for_where_there_is_a_compiler_and_no_torch(source, tmp_path, with_torch, compiler, asked):
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    code = "print([name for name in build_backend.get_requires_for_build_wheel() if 'torch' in name])"
    assert run_backend(source, tmp_path, code, with_torch, CXX=compiler).splitlines()[-1] == str(asked)


def test_tag_and_content(wheel):
    assert re.fullmatch(r"softmask_fast-[\d.]+\w*-cp310-abi3-linux_\w+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".so")} == {"softmask_fast/_C.abi3.so"}
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"softmask_fast"}  # no examples
    files = (
        path for path in (ROOT / "softmask_fast").rglob("*") if path.is_file()
    )  # with py.typed and the demo's model
    assert {path.relative_to(ROOT).as_posix() for path in files if path.suffix not in (".so", ".pyc")} <= names
    [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
    needed = re.findall(r"^Requires-Dist: ([^;\n]+)$", zipfile.ZipFile(wheel).read(metadata).decode(), re.MULTILINE)
    assert sorted(needed) == ["numpy", "torch>=2.11"]  # torch warns where numpy is missing


def test_it_runs_in_an_empty_environment(environment):
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
        from softmask_fast import doctor
        print(doctor._library("_C")["built_with"])
        print(softmask_fast.__file__)
    """
    *_, built_with, path = environment.run(code).splitlines()
    assert re.fullmatch(rf"\S.* [\d.]+.*, torch {torch.__version__.split('+')[0]}", built_with)
    assert path == str(environment.packages / "softmask_fast" / "__init__.py")
    command = run(environment.python.with_name("softmask-fast"), "--version", cwd=environment.packages)
    assert command.stdout.strip() == softmask_fast.__version__


def test_the_nine_lines_of_the_readme_draw_a_heat_map(environment, tmp_path):
    """From the installed wheel and an image, with a small random BLIP in place of the released one."""
    tutorial_folder(tmp_path)
    [block] = [block for block in blocks_of(ROOT / "README.md", "python") if "nine lines" in block.heading]
    assert len([line for line in block.code.splitlines() if line]) == 9
    code = f"{block.code}\nprint(maps.dtype, *maps.shape, maps.max().item() > 0)"
    dtype, images, words, rows, columns, somewhere = environment.run(code, cwd=tmp_path).split()
    assert (dtype, images, rows, columns, somewhere) == ("torch.float32", "1", "24", "24", "True") and int(words) > 5


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


def test_without_a_compiler_the_sdist_installs_as_python_and_says_so_once(sdist, tmp_path):
    made = Environment(tmp_path)
    output = made.install(sdist, CXX="/nonexistent")
    message = r"there is no C\+\+ compiler .*/nonexistent.*several times slower.*impl='cuda' is not there"
    assert len(re.findall(message, output)) == 1, output
    (metadata,) = made.packages.glob("softmask_fast-*.dist-info")
    assert "Tag: py3-none-any" in (metadata / "WHEEL").read_text()
    code = (
        "import torch, softmask_fast; from softmask_fast.ops import registry, word_gradcam; "
        "from softmask_fast import doctor; print(doctor.render(doctor.examine(0))); x = torch.ones(1, 1, 2, 8); "
        "print(softmask_fast.__file__, registry.describe()['word_mask'], word_gradcam(x, x, x, x).sum().item())"
    )
    printed = made.run(code)
    assert printed.split()[-4:] == [f"{made.packages}/softmask_fast/__init__.py", "{'cpu':", "'reference'}", "16.0"]
    [line] = re.findall(r"^ +build it with: (.*)$", printed, re.MULTILINE)
    assert line.endswith(f"--no-cache-dir 'softmask_fast @ {sdist.as_uri()}'")


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
