"""The commands that install more of this package or rebuild it, from the source that this copy came from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

SOURCES = Path(__file__).absolute().parents[1]  # of a clone, where they are
TRAINING = {"deepspeed", "nvidia", "tensorboard"}  # modules of the extra `train`; `look` brings the others


def install_command(extra: str | None = None) -> str:
    """The line that installs this copy with an extra: of a clone, a folder, a repository, an archive or the index."""
    return f"pip install {_requirement(extra)[0]}"


def build_command() -> str:
    """The line that compiles and installs the extensions. If that fails, it says why."""
    requirement, url = _requirement(None)
    if url is not None and url.endswith(".whl"):
        return "pip install of a clone or of the sdist: the wheel that is installed holds no extension"
    nvcc = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin:{os.environ.get('PATH', '')}")
    variables = "SOFTMASK_FAST_REQUIRE_EXTENSION=1 " + ("" if nvcc else "SOFTMASK_FAST_CUDA_ARCHS=none ")
    from_index = "--no-binary softmask_fast " if url is None else ""
    return f"{variables}pip install --force-reinstall --no-deps --no-cache-dir {from_index}{requirement}"


def explain_missing(error: ModuleNotFoundError) -> str:
    """One line: which module is missing, and the command that installs it."""
    extra = "train" if (error.name or "").split(".")[0] in TRAINING else "look"
    return f"{error}; install it with: {install_command(extra)}"


def _requirement(extra: str | None) -> tuple[str, str | None]:
    """What pip installs this copy from, and its URL; None for the index."""
    suffix = f"[{extra}]" if extra else ""
    if (SOURCES / "pyproject.toml").exists():  # installed as editable, or only imported from there
        return f"-e {shlex.quote(f'{SOURCES}{suffix}')}", SOURCES.as_uri()
    try:
        recorded = importlib.metadata.distribution("softmask_fast").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        recorded = None
    origin = json.loads(recorded or "{}")
    url = origin.get("url")
    if url is None:
        return shlex.quote(f"softmask_fast{suffix}"), None
    if "dir_info" in origin:
        return shlex.quote(unquote(urlsplit(url).path) + suffix), url
    if "vcs_info" in origin:
        version = origin["vcs_info"]
        url = f"{version['vcs']}+{url}@{version.get('requested_revision') or version['commit_id']}"
    return shlex.quote(f"softmask_fast{suffix} @ {url}"), url
