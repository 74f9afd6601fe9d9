"""Decides whether a run compiles its layers."""

from __future__ import annotations

import logging
import os
import shutil
from typing import Any

from deepspeed.accelerator import get_accelerator

from softmask_fast.evaluation.common import gather_objects

logger = logging.getLogger("softmask_fast")

DURATION = "which takes up to a minute at the first step; later runs reuse it (TORCHINDUCTOR_CACHE_DIR)"


def decide_compilation(chosen: bool | None, deepspeed_config: dict[str, Any]) -> bool:
    """The option `compile`; where it is None, whether every rank can compile. Logs the reason. A collective."""
    reasons = [reason for reason in gather_objects(reason_against(deepspeed_config)) if reason]
    compiles = not reasons if chosen is None else chosen
    if compiles:
        logger.debug("compile: on, %s", DURATION)
    else:
        logger.debug("compile: off%s", "" if chosen is False else f", as {reasons[0]}")
    return compiles


def reason_against(deepspeed_config: dict[str, Any]) -> str | None:
    """Why this rank does not compile by default; None if it does."""
    if deepspeed_config.get("zero_optimization", {}).get("stage", 0) == 3:
        return "ZeRO stage 3 gathers weights layer by layer"
    if get_accelerator().device_name() != "cuda":
        return "the device is not a GPU"
    from torch.utils._triton import has_triton

    if not has_triton():
        return "Triton is unavailable"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):  # Triton compiles its launchers
        return "there is no C compiler"
    return None
