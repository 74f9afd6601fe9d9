"""Builds the compiled extensions if there is a compiler. Otherwise installs without them and warns.

softmask_fast/_C.abi3.so needs a C++ compiler ($CXX, g++), softmask_fast/_cuda.abi3.so also nvcc ($CUDA_HOME/bin, PATH)
and a torch that was built with CUDA. build_backend.py finds torch, pyproject.toml has the metadata. In the environment:
SOFTMASK_FAST_REQUIRE_EXTENSION=1   an extension that cannot be built is an error, not a warning
SOFTMASK_FAST_CUDA_ARCHS="80 90 100"   GPU generations to compile for, PTX of the last for later ones; "none": no CUDA
"""

import glob
import os
import shutil
import sys
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

from build_backend import CXX, can_compile, find_torch

REQUIRED = os.environ.get("SOFTMASK_FAST_REQUIRE_EXTENSION") == "1"
ARCHS = os.environ.get("SOFTMASK_FAST_CUDA_ARCHS", "80 90 100").split()
PYTHON_ABI, TORCH_ABI = "0x030a0000", "0x020b000000000000"  # Python 3.10 and later, torch 2.11 and later
ON_CPU = "on the CPU the operators run in plain PyTorch, which is several times slower"
ON_GPU = "on NVIDIA GPUs the operators run as Triton kernels only, impl='cuda' is not there"


def give_up(reason: object, *costs: str) -> None:
    message = f"softmask_fast: {reason}. Everything works, but {', and '.join(costs)}."
    if REQUIRED:
        raise SystemExit(f"SOFTMASK_FAST_REQUIRE_EXTENSION=1: {message}")
    if not {"egg_info", "dist_info"} & set(sys.argv):  # pip first asks for the metadata; warn only once
        warnings.warn(message, stacklevel=2)


class Build(build_ext):
    def build_extension(self, extension: Extension) -> None:
        cuda = extension.language == "cuda"
        try:
            self.build_cuda(extension) if cuda else super().build_extension(extension)
        except Exception as error:  # a compiler that fails: setuptools has no common class for these
            give_up(f"{extension.name} was not built, because {error}", ON_GPU if cuda else ON_CPU)

    def build_cuda(self, extension: Extension) -> None:
        target = self.get_ext_fullpath(extension.name)
        if not self.force and not newer_group([*extension.sources, *extension.depends], target):
            return
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
        codes.append(f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}")
        options = ["-Xcompiler=-fPIC,-fvisibility=hidden"]
        options += [f"-D{name}={value}" for name, value in extension.define_macros]
        options += [f"-I{path}" for path in extension.include_dirs] + [f"-L{path}" for path in extension.library_dirs]
        libraries = [f"-l{name}" for name in extension.libraries]  # and the CUDA runtime, statically: any torch will do
        compiler = [extension.nvcc, "-O3", "-std=c++17", "-shared", "-ccbin", CXX, "--threads", "0"]
        self.spawn([*compiler, *codes, *options, *extension.sources, "-o", target, *libraries])


def extensions() -> list[Extension]:
    torch = find_torch()
    if not can_compile():
        give_up(f"there is no C++ compiler for Linux (g++, or $CXX, which is {CXX!r})", ON_CPU, ON_GPU)
        return []
    if torch is None:
        give_up("there is no torch of 2.11 or later to compile against: install it first", ON_CPU, ON_GPU)
        return []
    common = {
        "depends": glob.glob("csrc/**/*.*h", recursive=True),
        "include_dirs": [str(torch / "include"), str(torch / "include/torch/csrc/api/include")],
        "library_dirs": [str(torch / "lib")],
        "py_limited_api": True,
        "optional": True,  # an extension that was not built is not copied; Build says why
    }
    found = [
        Extension(
            "softmask_fast._C",
            sources=["csrc/library.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))],
            libraries=["c10", "torch", "torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_ABI), ("Py_LIMITED_API", PYTHON_ABI)],
            extra_compile_args=["-O3", "-g0", "-std=c++17", "-fopenmp-simd", "-ffp-contract=fast"]
            + ["-fvisibility=hidden", "-Wno-psabi"],
            language="c++",
            **common,
        )
    ]
    nvcc = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin:{os.environ.get('PATH', '')}")
    if ARCHS == ["none"]:
        return found
    if nvcc is None or not Path(torch, "lib/libtorch_cuda.so").exists():
        missing = "there is no nvcc (in $CUDA_HOME/bin or PATH)" if nvcc is None else "torch was built without CUDA"
        give_up(missing, ON_GPU)
        return found
    cuda = Extension(
        "softmask_fast._cuda",
        sources=sorted(glob.glob("csrc/cuda/*.cu")),
        libraries=["c10", "torch_cpu", "torch_cuda"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_ABI), ("USE_CUDA", "1")],
        language="cuda",
        **common,
    )
    cuda.nvcc = nvcc
    return [*found, cuda]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}, "build_ext": {"parallel": 2}},
)
