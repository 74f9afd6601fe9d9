"""The loader's state: visits being prepared, the position in the stream, and the samples of the next batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from softmask_fast.data.preparing import Column, Prepared, cut, join
from softmask_fast.data.transfer import Transfer
from softmask_fast.data.types import BadSample, UnreachableFile


@dataclass
class Chunk:
    """Consecutive visits of the stream, prepared together."""

    epochs: list[int]
    positions: list[int]  # in this rank's order of the epoch
    indices: list[int]
    keys: list[str]
    prepared: Prepared | None = None
    problems: dict[int, BadSample | UnreachableFile] = field(default_factory=dict)  # by number of the visit, ascending
    visit: int = 0  # number of the next visit
    row: int = 0  # its position among the prepared samples


@dataclass
class Progress:
    """Position in the stream after a batch; part of `state_dict`."""

    epoch: int = 0
    position: int = 0  # in this rank's order of the epoch
    truncated_captions: int = 0
    skipped_captions: int = 0


@dataclass
class Selection:
    """The samples of the next batch, and the position in the stream after them."""

    progress: Progress
    bad: dict[str, str] = field(default_factory=dict)  # new bad samples among them: key -> reason
    keys: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    pieces: list[tuple[Prepared, int, int]] = field(default_factory=list)  # first prepared sample, and the end
    last: str = ""  # key of the sample visited last
    finished: int = 0  # chunks that end in this batch
    transfer: Transfer | None = None

    def column(self, name: str) -> Column:
        """A prepared column, one entry per sample."""
        return join([cut(prepared.columns[name], *part) for prepared, *part in self.pieces])

    def images(self, each: int) -> Sequence[bytes | np.ndarray]:
        """The images, `each` per sample."""
        parts = [prepared.images[each * start : each * stop] for prepared, start, stop in self.pieces]
        return parts[0] if len(parts) == 1 else list(chain(*parts))

    def parameters(self, each: int) -> np.ndarray:
        """(images, width) float32, see `augment.pack`; `each` images per sample."""
        return join([prepared.parameters[each * start : each * stop] for prepared, start, stop in self.pieces])
