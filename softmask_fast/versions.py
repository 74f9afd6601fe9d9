"""The versions that decide what a run or a report means."""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = ("softmask_fast", "torch", "triton", "transformers", "timm", "deepspeed", "nvidia-dali-cuda130", "xformers")


def installed_versions() -> dict[str, str]:
    """Python and the packages above -> version, or "not installed"."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
