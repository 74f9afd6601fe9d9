"""Every configuration of the Triton kernels, compiled for real GPUs without one: no spills, it fits, tensor cores.

Products of float32 take none on NVIDIA, whose would round them to parts.

By itself it compiles what a training uses of each kernel; all that the launches can choose with ``make aot``.
"""

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

from compiled_kernels import TARGETS, WITHOUT_PRODUCTS, cases, examine, start_worker  # noqa: E402

from softmask_fast.ops.triton_support import INTERPRETED  # noqa: E402

EVERYTHING = os.environ.get("SOFTMASK_FAST_AOT") == "all"
CASES = [] if INTERPRETED else [case for target in TARGETS for case in cases(target, EVERYTHING)]

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")


@pytest.fixture(scope="module")
def outcomes(request):
    """Outcomes to come of all cases that were selected, compiled by a process per core."""
    chosen = [item.callspec.params["case"] for item in request.session.items if item.fspath == request.fspath]
    with (
        tempfile.TemporaryDirectory(prefix="triton-") as cache,
        ProcessPoolExecutor(
            min(len(os.sched_getaffinity(0)), 16),
            multiprocessing.get_context("spawn"),
            initializer=start_worker,
            initargs=(cache,),
        ) as pool,
    ):
        yield {case: pool.submit(examine, case) for case in chosen}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_compiles(case, outcomes):
    outcome = outcomes[case].result()
    assert not outcome.failure
    assert not outcome.spills
    assert outcome.shared_memory <= TARGETS[case.target].machine.shared_memory
    machine = TARGETS[case.target].machine
    on_tensor_cores = case.kernel not in WITHOUT_PRODUCTS and (case.dtype != torch.float32 or not machine.capability)
    assert (outcome.matrix_instructions > 0) == on_tensor_cores
