"""That no number of images, sequences or heads outgrows a grid: its second and third dimension end at 65,535."""

import pytest
import torch

pytest.importorskip("triton")

from softmask_fast.ops.soft_masked_attention import triton_kernels as attention_kernels  # noqa: E402
from softmask_fast.ops.soft_masked_attention import triton_launch as attention  # noqa: E402
from softmask_fast.ops.soft_masked_attention import triton_plan  # noqa: E402
from softmask_fast.ops.triton_support import Machine  # noqa: E402
from softmask_fast.ops.word_mask import triton_kernels as word_mask_kernels  # noqa: E402
from softmask_fast.ops.word_mask import triton_launch as word_mask  # noqa: E402

KERNELS = {
    word_mask_kernels: ("word_products", "word_map", "mask_features", "all_words_statistics", "all_words_map"),
    attention_kernels: ("forward", "backward_rows", "backward_key_value", "backward_keep"),
    triton_plan: ("plan",),
}


@pytest.fixture
def grids(monkeypatch):
    """Kernel -> the grid of its last launch; nothing runs."""

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            launched[self.name] = grid
            return lambda *arguments, **options: None

    launched = {}
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Kernel(name))
    for module in (word_mask, attention):
        monkeypatch.setattr(module, "machine_of", lambda device: Machine(90, 227 * 1024))
    return launched


@pytest.mark.parametrize("images, heads", [(70_000, 1), (1, 70_000)])
def test_no_number_of_images_outgrows_a_grid(grids, images, heads):
    rows = torch.zeros(images, heads, 1, 16, dtype=torch.bfloat16)
    index, keep = torch.zeros(images, dtype=torch.int64), torch.ones(images, 1)
    word_mask.word_gradcam(rows, rows, rows, rows, None, None, None, None, 1.0)
    word_mask.word_soft_mask(rows, rows, rows, rows, index, rows[:, 0], 1, None, 1.0)
    inputs = (rows, rows, rows, keep, index, None, None, None, keep > 0)  # with padding every kernel runs
    output, statistics = attention.forward(*inputs, 1.0)
    attention.backward(output, *inputs, output, statistics, 1.0, True, True, True)
    assert set(grids) == {name for names in KERNELS.values() for name in names}
    too_large = {name for name, grid in grids.items() if max(grid[1:], default=0) > 65_535}
    assert too_large == ({"backward_key_value"} if heads > 65_535 else set())  # no model has so many heads
