"""A kernel that writes what ``load_scales`` of the focal loss returns, for a test."""

import triton
import triton.language as tl

from softmask_fast.ops.focal_itc.triton_kernels import load_scales


@triton.jit
def write_scales(p_temperature, p_scales):
    scales = load_scales(p_temperature, tl.float32)
    tl.store(p_scales, scales[0])
    tl.store(p_scales + 1, scales[1])
