"""The build backend: setuptools', but it asks for torch only if the target environment has none.

pip builds in isolation, where torch cannot be imported. The extensions need only the headers and libraries of a torch.
Those of any version from 2.11 on will do, as the extensions use its stable ABI. `find_torch` finds what pip hides.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

OLDEST = (2, 11)
CXX = os.environ.get("CXX", "g++").split()[0]


def find_torch() -> Path | None:
    """The folder of a torch that can be imported, or else is in the environment that pip builds for; None without."""
    for folder in (*sys.path, *site.getsitepackages(), site.getusersitepackages()):
        path = Path(folder, "torch", "version.py")
        found = path.is_file() and re.search(r"__version__ = '(\d+)\.(\d+)", path.read_text())
        if found and tuple(map(int, found.groups())) >= OLDEST:
            return path.parent
    return None


def can_compile() -> bool:
    """Whether there is a C++ compiler, on a system that the extensions are for."""
    return sys.platform == "linux" and shutil.which(CXX) is not None


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    torch = [f"torch>={OLDEST[0]}.{OLDEST[1]}"] if can_compile() and find_torch() is None else []
    return build_meta.get_requires_for_build_wheel(config_settings) + torch


get_requires_for_build_editable = get_requires_for_build_wheel
