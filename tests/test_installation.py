"""The lines that install extras and build the extensions fit the way in which this copy was installed."""

import importlib.metadata
import json
import re
import shlex

import pytest

from softmask_fast import installation

HERE = installation.SOURCES


@pytest.fixture
def installed_from(monkeypatch, tmp_path):
    """A copy outside of its sources that pip installed, with that record of where from."""

    def set_record(record):
        class Distribution:
            def read_text(self, name):
                return None if record is None else json.dumps(record)

        monkeypatch.setattr(installation, "SOURCES", tmp_path)
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())

    return set_record


COMMIT = {"vcs": "git", "commit_id": "0123abc"}


@pytest.mark.parametrize(
    ("record", "requirement"),
    [
        (None, "softmask_fast[look]"),
        ({"url": "file:///home/a%20b/clone", "dir_info": {}}, "/home/a b/clone[look]"),
        ({"url": "https://host/s.git", "vcs_info": COMMIT}, "softmask_fast[look] @ git+https://host/s.git@0123abc"),
        (
            {"url": "ssh://host/s.git", "vcs_info": COMMIT | {"requested_revision": "v0.1"}},
            "softmask_fast[look] @ git+ssh://host/s.git@v0.1",
        ),
        ({"url": "file:///dist/s.whl", "archive_info": {}}, "softmask_fast[look] @ file:///dist/s.whl"),
    ],
)
def test_an_extra_comes_from_where_the_package_came(installed_from, record, requirement):
    installed_from(record)
    assert shlex.split(installation.install_command("look")) == ["pip", "install", requirement]


def test_an_extra_of_a_clone():
    assert shlex.split(installation.install_command("train")) == ["pip", "install", "-e", f"{HERE}[train]"]


@pytest.mark.parametrize("nvcc", [False, True])
def test_the_line_that_builds_asks_for_cuda_where_there_is_nvcc(monkeypatch, nvcc):
    monkeypatch.setattr(installation.shutil, "which", lambda *_, **__: "/usr/local/bin/nvcc" if nvcc else None)
    words = shlex.split(installation.build_command())
    assert words[0] == "SOFTMASK_FAST_REQUIRE_EXTENSION=1" and words[-2:] == ["-e", str(HERE)]
    assert ("SOFTMASK_FAST_CUDA_ARCHS=none" in words) is not nvcc


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (None, "--no-deps --no-cache-dir --no-binary softmask_fast softmask_fast"),
        (
            {"url": "file:///s.tar.gz", "archive_info": {}},
            "--no-deps --no-cache-dir 'softmask_fast @ file:///s.tar.gz'",
        ),
        ({"url": "file:///s.whl", "archive_info": {}}, "the wheel that is installed holds no extension"),
    ],
)
def test_the_line_that_builds_builds_from_sources(installed_from, record, words):
    installed_from(record)
    assert installation.build_command().endswith(words)


def requirements(extra):
    """The names in an extra of pyproject.toml."""
    listed = re.search(rf"^{extra} = \[(.*?)\]\n", (HERE / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    return set(re.findall(r'"([\w-]+)', listed))


@pytest.mark.parametrize("extra", ["look", "train"])
def test_a_missing_module_is_in_the_extra_that_is_named(extra):
    modules = {"nvidia-dali-cuda130": "nvidia.dali", "pillow": "PIL", "pyyaml": "yaml"}
    names = requirements(extra) - {"softmask_fast"}
    assert len(names) > 2
    for module in (modules.get(name, name) for name in names):
        message = installation.explain_missing(ModuleNotFoundError(f"No module named {module!r}", name=module))
        assert message == f"No module named {module!r}; install it with: {installation.install_command(extra)}"
