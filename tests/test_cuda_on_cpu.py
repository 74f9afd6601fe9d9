"""The CUDA kernels on a CPU: the source of csrc/cuda over a device in software, see cuda_on_cpu.cpp.

It proves the arithmetic, the indexing and the barriers, not what only hardware can show; on a GPU machine the tests of
test_word_mask.py run the compiled kernels themselves.
"""

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import word_mask_cases as cases
from compare import assert_as_accurate
from word_masks import DTYPES, SIZES, draw, full_maps, keep_from_map, of_word

from softmask_fast.ops import registry, word_gradcam, word_soft_mask
from softmask_fast.ops.word_mask import cpp

CPU = torch.device("cpu")
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
TOOLKITS = [
    os.environ.get("CUDA_HOME", ""),
    Path(shutil.which("nvcc") or "/").resolve().parent.parent,
    "/usr/local/cuda",
]
HEADERS = [f"{folder}/include" for folder in TOOLKITS if Path(folder, "include", "crt", "host_config.h").exists()]

pytestmark = [
    pytest.mark.skipif(not COMPILER, reason="no C++ compiler"),
    pytest.mark.skipif(not HEADERS, reason="no CUDA toolkit: its headers are needed"),
    pytest.mark.usefixtures("nan_filled_empty"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    from torch.utils.cpp_extension import include_paths, library_paths

    built = tmp_path_factory.mktemp("cuda_on_cpu") / "kernels.so"
    command = [
        COMPILER, "-x", "c++", "-O1", "-g0", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", *(f"-I{path}" for path in [*include_paths(), HEADERS[0]]),
        Path(__file__).with_name("helpers") / "cuda_on_cpu.cpp", "-o", built,
        *(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-Wl,-Bsymbolic", "-Wl,--no-undefined",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    torch.ops.load_library(built)
    return torch.ops.softmask_fast_cuda_on_cpu


@pytest.fixture(autouse=True)
def device_in_software(library, monkeypatch):
    """Makes impl="cuda" run the kernels on CPU tensors."""
    monkeypatch.setattr(cpp, "OPERATORS", library)
    functions = {"word_gradcam": cpp.word_gradcam, "word_soft_mask": cpp.word_soft_mask}
    with registry.registered("word_mask", registry.Implementation("cuda", functions)):
        yield


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_map(sizes, dtype, masked):
    cases.map_matches_full_attention_maps("cuda", sizes, dtype, masked, CPU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("prefix", "masked"), [(0, True), (1, False), (2, True)])
def test_soft_mask(dtype, prefix, masked):
    cases.soft_mask("cuda", dtype, prefix, masked, CPU)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.__name__)
def test_case(case):
    case("cuda", CPU)


@pytest.mark.parametrize("every_word", [False, True])
def test_nan(every_word):
    cases.nan_stays_nan_and_padding_is_not_read("cuda", every_word, CPU)


@pytest.mark.parametrize("options", cases.OPTIONS, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_other_models(dtype, options):
    cases.attention_of_other_models("cuda", 1.0, dtype, options, CPU)


# B, H, L, N, D, C: one tile of tokens and many, whole and cut; more heads than warps
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((1, 3, 2, 97, 32, 24), torch.bfloat16),
        ((2, 2, 2, 257, 16, 40), torch.float16),
        ((1, 2, 1, 577, 16, 8), torch.bfloat16),
        ((1, 2, 1, 4096, 8, 8), torch.float16),
        ((1, 130, 1, 390, 4, 4), torch.float32),
        ((1, 1, 1, 193, 128, 7), torch.float32),
    ],
)
def test_many_tokens(sizes, dtype, monkeypatch):
    """Against float64, and the same bits in whichever order the threads run."""
    *sizes, channels = sizes
    inputs, word_index = draw(sizes, dtype, "cpu")
    features = torch.randn(sizes[0], sizes[3], channels).to(dtype)
    key_mask = torch.rand(sizes[0], sizes[3]) > 0.2
    truth = of_word(full_maps(*(tensor.double() for tensor in inputs), key_mask), word_index)
    baseline = of_word(full_maps(*inputs, key_mask), word_index)
    results = []
    for seed in ("0", "1"):
        monkeypatch.setenv("CUDA_ON_CPU_SEED", seed)
        results.append(word_soft_mask(*inputs, word_index, features, key_mask=key_mask, impl="cuda"))
    masked, keep = results[0]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True)), "depends on the order of the threads"
    true_keep, baseline_keep = (keep_from_map(cam, 1, key_mask) for cam in (truth, baseline))
    assert_as_accurate(keep, baseline_keep, true_keep, dtype, "keep")
    assert torch.equal(masked, (features * keep[:, :, None]).to(dtype))
    assert_as_accurate(word_gradcam(*inputs, word_index, key_mask=key_mask, impl="cuda"), baseline, truth, dtype, "map")


def test_a_word_out_of_range_gives_nan():
    inputs, _ = draw((3, 2, 4, 99, 16), torch.float32, "cpu")
    index = torch.tensor([4, 1, -1])
    key_mask = torch.rand(3, 99) > 0.3
    masked, keep = cpp.word_soft_mask(*inputs, index, torch.ones(3, 99, 5), 1, key_mask, 0.25)
    assert keep[[0, 2]].isnan().all() and masked[[0, 2]].isnan().all()
    expected = word_soft_mask(
        *(tensor[1:2] for tensor in inputs), index[1:2], key_mask=key_mask[1:2], scale=0.25, impl="reference"
    )
    torch.testing.assert_close(keep[1:2], expected, rtol=1e-4, atol=1e-5)
    assert cpp.word_gradcam(*inputs, index, key_mask, None, None, 0.25)[[0, 2]].isnan().all()


def test_features_of_any_dtype_and_alignment():
    inputs, word_index = draw((2, 2, 3, 101, 16), torch.bfloat16, "cpu")
    keep = word_soft_mask(*inputs, word_index, impl="cuda")
    for dtype, channels, offset in itertools.product(DTYPES, (48, 21), (0, 1)):
        storage = torch.randn(2 * 101 * channels + offset).to(dtype)
        features = storage[offset:].view(2, 101, channels)
        masked, again = word_soft_mask(*inputs, word_index, features, impl="cuda")
        assert masked.dtype == dtype and torch.equal(again, keep)
        assert torch.equal(masked, (features * keep[:, :, None]).to(dtype))


def test_maps_of_all_words_some_at_a_time():
    """As many words as the scratch memory takes, here two of 198 products each: the last run has one."""
    inputs, _ = draw((2, 3, 5, 33, 8), torch.float32, "cpu")
    every = word_gradcam(*inputs, impl="cuda")
    torch.testing.assert_close(every, word_gradcam(*inputs, impl="reference"), rtol=1e-4, atol=1e-6)
