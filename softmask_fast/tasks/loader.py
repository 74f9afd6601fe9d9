"""Training batches of the tasks' examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from softmask_fast.data.loader import SampleLoader
from softmask_fast.data.preparing import padded
from softmask_fast.tasks.datasets import ExamplePreparer, TaskBatch


class ExampleLoader(SampleLoader[TaskBatch]):
    """Training batches of examples."""

    preparer = ExamplePreparer

    def _arrays(self, selection: Any) -> dict[str, np.ndarray]:
        texts = selection.column("input_ids")
        mask = texts.mask()
        return {"input_ids": padded(texts.values, mask, self._padding), "attention_mask": mask}

    def _batch(self, selection: Any, pixels: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> TaskBatch:
        return TaskBatch(
            pixels=pixels,
            **tensors,
            targets=selection.column("targets"),
            keys=selection.keys,
            token_count=int(selection.column("input_ids").lengths.sum()),
        )
