"""Builds the compiled extension where a compiler and torch are at hand, else installs pure Python with a warning.

The metadata is in pyproject.toml. SOFTMASK_FAST_REQUIRE_EXTENSION=1 turns the warning into an error.
"""

import glob
import os
import shutil
import sys
import warnings

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

REQUIRED = os.environ.get("SOFTMASK_FAST_REQUIRE_EXTENSION") == "1"
ABI = "0x030a0000"  # Python 3.10 and later


def give_up(reason: object) -> None:
    message = (
        f"softmask_fast: installing without the compiled extension, because {reason}. Everything works, but on the CPU "
        "the operators run in plain PyTorch, which is several times slower."
    )
    if REQUIRED:
        raise SystemExit(f"SOFTMASK_FAST_REQUIRE_EXTENSION=1: {message}")
    warnings.warn(message, stacklevel=2)


class Build(build_ext):
    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # no compiler, or one that fails: setuptools has no common class for these
            give_up(error)


def extensions() -> list[Extension]:
    if sys.platform != "linux":
        give_up(f"it is built on Linux only, not on {sys.platform}")
        return []
    if not shutil.which(os.environ.get("CXX", "g++").split()[0]):
        give_up("there is no C++ compiler (g++, or $CXX)")
        return []
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        give_up(
            f"torch cannot be imported while building ({error}): install torch, then this with --no-build-isolation"
        )
        return []
    return [
        Extension(
            "softmask_fast._C",
            sources=["csrc/library.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))],
            depends=glob.glob("csrc/**/*.h", recursive=True),
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["c10", "torch", "torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", ABI)],
            extra_compile_args=[
                "-O3",
                "-g0",
                "-std=c++17",
                "-fopenmp-simd",
                "-ffp-contract=fast",
                "-fvisibility=hidden",
                "-Wno-psabi",
            ],
            py_limited_api=True,
            language="c++",
        )
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
