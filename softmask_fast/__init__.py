"""Text-driven soft masks and focal contrastive learning for vision-language pretraining (SoftMask++), fast.

The public operators, `load_model` and `draw` are here, and are loaded when first used. The operators need only torch,
the others the extra `look`. `import softmask_fast` itself loads nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softmask_fast.evaluation.heatmaps import draw
    from softmask_fast.model.pretrained import load_model
    from softmask_fast.ops import (
        FeatureQueue,
        FocalITCLoss,
        FocalITCStats,
        ImagePlan,
        attention_output_gradient,
        focal_itc_loss,
        plan_image_index,
        soft_masked_attention,
        word_gradcam,
        word_soft_mask,
    )

__version__ = "0.1.0"

__all__ = [
    "FeatureQueue", "FocalITCLoss", "FocalITCStats", "ImagePlan", "__version__", "attention_output_gradient", "draw",
    "focal_itc_loss", "load_model", "plan_image_index", "soft_masked_attention", "word_gradcam", "word_soft_mask",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    trained = {"draw": "softmask_fast.evaluation.heatmaps", "load_model": "softmask_fast.model.pretrained"}
    module = trained.get(name, "softmask_fast.ops")
    try:
        value = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if name not in trained:
            raise
        from softmask_fast.installation import explain_missing

        raise ImportError(f"{name}: {explain_missing(error)}") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
