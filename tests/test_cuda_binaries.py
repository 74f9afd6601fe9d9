"""The compiled CUDA kernels, read without a GPU: every generation, no spills, 16-byte loads, no atomics."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

import softmask_fast
from softmask_fast.ops import word_gradcam
from softmask_fast.ops.extension import cuda_missing

triton = pytest.importorskip("triton", reason="the tools that read the binaries come with triton")

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LIBRARY = Path(softmask_fast.__file__).with_name("_cuda.abi3.so")
ARCHS = os.environ.get("SOFTMASK_FAST_CUDA_ARCHS", "80 90 100").split()
KERNELS = 2 * 6 + 1  # products and features of three dtypes, with 16-byte loads and without; the map

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason=f"{LIBRARY.name} was not built: there was no nvcc")


def tool(name, *arguments, cwd=None):
    run = subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True, cwd=cwd)
    return run.stdout


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """arch -> name of a kernel -> its machine code."""
    folder = tmp_path_factory.mktemp("cubins")
    tool("cuobjdump", "-xelf", "all", LIBRARY, cwd=folder)
    found = {}
    for cubin in folder.glob("*.cubin"):
        arch = re.search(r"sm_(\d+)", cubin.name).group(1)
        parts = re.split(r"^\.text\.(\w+):$", tool("nvdisasm", "-c", cubin), flags=re.MULTILINE)
        found.setdefault(arch, {}).update(zip(parts[1::2], parts[2::2], strict=True))
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_machine_code(functions, arch):
    kernels = functions[arch]
    assert len(kernels) == KERNELS
    for name, code in kernels.items():
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name} spills"
        assert not re.search(r"\b(ATOM\w*|RED)\b", code), f"{name} has atomics"
        loads = len(re.findall(r"\bLDG\.E\.\w*\.?128\b", code))
        stores = len(re.findall(r"\bSTG\.E\.\w*\.?128\b", code))
        # four of K, four of V, query and gradient; four of the features
        at_least = {"word_products": (10, 0), "mask_features": (4, 4), "word_map": (0, 0)}
        if "Lb1E" in name:
            kind = next(kind for kind in at_least if kind in name)
            assert (loads, stores) >= at_least[kind] and stores >= at_least[kind][1], (name, loads, stores)


def test_resources():
    usage = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", tool("cuobjdump", "--dump-resource-usage", LIBRARY))
    assert len(usage) == KERNELS * len(ARCHS)
    for registers, stack, shared in usage:
        # at least four blocks of 128 threads fit a multiprocessor
        assert int(registers) <= 128 and stack == "0" and int(shared) <= 1024


def test_later_generations_compile_from_ptx():
    assert f"sm_{ARCHS[-1]}.ptx" in tool("cuobjdump", "-lptx", LIBRARY)


def test_it_loads_without_a_gpu_and_says_that_it_needs_one():
    if torch.version.cuda is None:
        pytest.skip("this torch was built without CUDA")
    assert cuda_missing() is None
    query, key = torch.randn(1, 1, 2, 16), torch.randn(1, 1, 3, 16)
    with pytest.raises(ValueError, match="cannot run 'cuda' here: it runs on an NVIDIA GPU, the tensors are on cpu"):
        word_gradcam(query, key, key, query, impl="cuda")


def test_nothing_of_python_and_only_stable_symbols_of_torch():
    names = subprocess.run(["nm", "-D", "--undefined-only", LIBRARY], check=True, capture_output=True, text=True).stdout
    symbols = {line.split()[-1].split("@")[0] for line in names.splitlines()}
    assert not [name for name in symbols if name.startswith(("Py", "_Py"))]
    assert not [name for name in symbols if re.match(r"_ZN?K?(2at|3c10|5torch)", name)], "not the stable ABI"
    assert "aoti_torch_get_current_cuda_stream" in symbols
