"""Fixtures that every test may use."""

import os
import random
from unittest.mock import patch

# cuBLAS is deterministic only with a fixed workspace, which it reads when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from compare import DEVICES

pytest.register_assert_rewrite("runs", "spellings", "word_mask_cases")  # they assert what tests test

# What takes longest: these files start first, so that at the end no process is left alone with one of them.
LONGEST = (
    "test_train.py", "test_interpreted.py", "test_zero.py", "test_finetune.py", "test_compilation.py",
    "test_benchmarks.py", "test_docs.py", "test_launcher.py", "test_aot.py", "test_wheel.py", "test_ablation.py",
    "test_stored.py", "test_focal_itc_streaming.py", "test_cuda_on_cpu.py",
)  # fmt: skip
# In the name of a test, or of its parameters or file: it uses the GPU where there is one.
GPU_WORDS = ("cuda", "triton", "on_a_gpu", "xformers", "varlen", "dali")


def pytest_collection_modifyitems(items):
    """Orders the files, and marks what touches a GPU, beside the tests that are marked where they stand."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        if any(word in item.nodeid.lower() for word in GPU_WORDS):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Every test draws the same numbers, whichever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=DEVICES, ids=str)
def device(request):
    """Each device of this machine."""
    return request.param


@pytest.fixture
def nan_filled_empty():
    """torch.empty returns NaN, so that a value nobody wrote is seen; operations that are not deterministic raise."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def _environment_of_one_rank():
    """A process group of this process alone. It stays to the end: DeepSpeed remembers the first one that it sees."""
    from softmask_fast.options import LaunchOptions
    from softmask_fast.training.launch import start_distributed

    with patch.dict(os.environ):
        start_distributed(LaunchOptions("ds.json", local_rank=-1))
        environment = dict(os.environ)
    yield environment
    torch.distributed.destroy_process_group()


@pytest.fixture
def one_rank(_environment_of_one_rank):
    """The process is the only rank of a run, as DeepSpeed's engine wants it."""
    with patch.dict(os.environ, _environment_of_one_rank):
        yield
