"""The Triton kernels on the CPU: their cases of the other tests, in a process where Triton interprets."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

FILES = {
    "word_mask": ("test_word_mask.py", "test_word_gradcam.py"),
    "soft_masked_attention": ("test_soft_masked_attention.py", "test_packed_attention.py"),
    "focal_itc": (
        "test_focal_itc_streaming.py",
        "test_focal_itc_symmetric.py",
        "test_focal_itc_module.py",
        "test_focal_itc_sigmoid.py",
        "test_triton_symmetric.py",
    ),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are tested on the GPU")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets")
@pytest.mark.parametrize("operator", FILES)
def test_kernels_in_the_interpreter(operator):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-rA", "-x", "-k", "triton or on_a_gpu", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *FILES[operator]], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert set(re.findall(r"^PASSED (test_\w+\.py)::", run.stdout, re.MULTILINE)) == set(FILES[operator])
