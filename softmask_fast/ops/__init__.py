"""Fused operators: word maps, soft masks, soft-masked attention, focal contrastive loss.

They need only torch, plus triton or the compiled extension where those run.
"""

from softmask_fast.ops.focal_itc import FocalITCStats, focal_itc_loss
from softmask_fast.ops.focal_itc.feature_queue import FeatureQueue
from softmask_fast.ops.focal_itc.module import FocalITCLoss
from softmask_fast.ops.partial_backward import attention_output_gradient
from softmask_fast.ops.soft_masked_attention import ImagePlan, plan_image_index, soft_masked_attention
from softmask_fast.ops.word_mask import word_gradcam, word_soft_mask

__all__ = [
    "FeatureQueue",
    "FocalITCLoss",
    "FocalITCStats",
    "ImagePlan",
    "attention_output_gradient",
    "focal_itc_loss",
    "plan_image_index",
    "soft_masked_attention",
    "word_gradcam",
    "word_soft_mask",
]
