"""Fused operators: word maps, soft masks, soft-masked attention, focal contrastive loss.

This package needs nothing but torch (and triton or the compiled extension where they are used).
"""

from softmask_fast.ops.focal_itc import FocalITCStats, focal_itc_loss
from softmask_fast.ops.focal_itc.module import FocalITCLoss
from softmask_fast.ops.partial_backward import attention_output_gradient
from softmask_fast.ops.soft_masked_attention import soft_masked_attention
from softmask_fast.ops.word_mask import word_gradcam, word_soft_mask

__all__ = [
    "FocalITCLoss",
    "FocalITCStats",
    "attention_output_gradient",
    "focal_itc_loss",
    "soft_masked_attention",
    "word_gradcam",
    "word_soft_mask",
]
