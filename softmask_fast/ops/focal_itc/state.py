"""What the loss is about, in the structures that every implementation takes, and the layout of its row state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SECOND_DERIVATIVE = "focal_itc_loss: second derivatives are not supported"

# What the forward leaves for the backward: the rows of `row_state` (ROW_STATES, B), in the dtype of the sums. The
# layout is also that of csrc/cpu/focal_itc.h and of the Triton kernels.
# log p_ij = (<x_i, y_j> - MAX) / tau - LOG_SUM. The two are kept apart, and the maximum in units of the product, so
# that differences of large logits stay exact and log p near 0 keeps its precision.
ROW_MAX, ROW_LOG_SUM = 0, 1
ROW_TEACHER_MAX, ROW_TEACHER_LOG_SUM = 2, 3
ROW_WEIGHT = 4  # W_i
ROW_HARD = 5  # factor of the hard target: (1 - alpha) / number of positives, or (1 - alpha) w(P_i) for "any"
ROW_POSITIVE_MAX, ROW_POSITIVE_LOG_SUM = 6, 7  # log of the sum of e^s over the positives, in the same two parts
ROW_DOMINANT_GRADIENT = 8  # dloss_i / ds_ij of the most probable key; `streamed` has no use for it
ROW_STATES = 9


def expansion_order(gamma: float) -> int:
    """gamma where (1 - p)^gamma is expanded in powers of p, else -1."""
    return int(gamma) if gamma in (0, 1, 2, 3) else -1


class Options(NamedTuple):
    """What does not change from row to row."""

    alpha: Tensor | None  # () float64; None: no soft targets
    seed: Tensor | None  # () int64, of the hard negatives; None: no statistics
    gamma: float
    any_positive: bool  # positives="any"
    row_offset: int  # the key column of row 0's positive; the global number of row 0
    first_negative: int  # a hard negative comes from the key columns first_negative ... last_negative - 1
    last_negative: int
    direction: int = 0  # 0: image rows, 1: text rows; keeps the two samplers apart
    bias: Tensor | None = None  # () of the dtype of the sums, of the sigmoid's loss; None: softmax

    @property
    def stats(self) -> bool:
        """Whether statistics and hard negatives are wanted."""
        return self.seed is not None

    @property
    def hard(self) -> float | Tensor:
        """The weight of the hard targets."""
        return 1.0 if self.alpha is None else 1 - self.alpha


class Rows(NamedTuple):
    """The rows of one direction."""

    features: Tensor  # (B, d)
    teacher: Tensor | None  # (B, d), with alpha
    ids: Tensor | None  # (B,) int64
    temperature: Tensor  # () float32 or float64
    options: Options


class Keys(NamedTuple):
    """A block of keys, numbered from `first` on."""

    features: Tensor  # (M, d)
    ids: Tensor | None  # (M,) int64
    first: int = 0


class Outputs(NamedTuple):
    """What the forward gives, of one direction, or with a first dimension of 2 of both."""

    loss: Tensor  # (B,) float32, or float64 for float64 inputs
    row_state: Tensor  # (ROW_STATES, B) of the same dtype
    dominant: Tensor  # (B,) int64, the most probable key
    # Without statistics of no rows. Whether the most probable key (the first of equals) is a positive; the entropy of
    # p_i, in nats; p of all positives of the row together.
    statistics: Tensor  # (3, B)
    hard_negative: Tensor  # (B,) int64 key column, -1 where the row has no negative in the range

    @classmethod
    def empty(cls, rows: Rows, *directions: int) -> Outputs:
        """Room for the results, of both directions with 2; the sigmoid's loss leaves no state."""
        batch, new = rows.features.shape[0], rows.temperature.new_empty
        saved = batch if rows.options.bias is None else 0
        counted = batch if rows.options.stats else 0
        return cls(
            new(*directions, batch),
            new(*directions, ROW_STATES, saved),
            new(*directions, saved, dtype=torch.int64),
            new(*directions, 3, counted),
            new(*directions, counted, dtype=torch.int64),
        )

    def directions(self) -> list[Outputs]:
        """Views of the two directions."""
        return [Outputs(*parts) for parts in zip(*(tensor.unbind(0) for tensor in self), strict=True)]


class Problem(NamedTuple):
    """Both directions: the arguments of the operator. The first ones may get gradients."""

    image: Tensor  # (B, d)
    text: Tensor  # (B, d)
    image_keys: Tensor | None  # (M, d); None, as text_keys: the batch is its own keys, by default with its ids
    text_keys: Tensor | None
    temperature: Tensor
    bias: Tensor | None  # () of the same dtype; None: softmax
    teacher_image: Tensor | None
    teacher_text: Tensor | None
    ids: Tensor | None
    key_ids: Tensor | None
    alpha: Tensor | None
    seed: Tensor | None
    gamma: float
    any_positive: bool
    row_offset: int
    first_negative: int
    last_negative: int
    impl: str | None

    @property
    def options(self) -> Options:
        """The options among the arguments."""
        return Options(*self[10:17], bias=self.bias)

    @property
    def own_keys(self) -> bool:
        """Whether one matrix of products is that of both directions."""
        return self.image_keys is None and self.key_ids is None

    def directions(self) -> list[tuple[Rows, Keys]]:
        """Image rows against text keys, text rows against image keys."""
        options, text_keys, image_keys, key_ids = self.options, self.text_keys, self.image_keys, self.key_ids
        if image_keys is None:
            text_keys, image_keys, key_ids = self.text, self.image, self.ids if key_ids is None else key_ids
        return [
            (Rows(self.image, self.teacher_image, self.ids, self.temperature, options), Keys(text_keys, key_ids)),
            (
                Rows(self.text, self.teacher_text, self.ids, self.temperature, options._replace(direction=1)),
                Keys(image_keys, key_ids),
            ),
        ]


TENSORS, DIFFERENTIABLE = 12, 6  # of the fields of `Problem`, the first so many


def check_every_row_has_positive(has_positive: Tensor, ids: Tensor) -> None:
    """Raises ValueError unless `has_positive` (B,) is all True; on a GPU a device-side assertion."""
    if has_positive.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(has_positive.all()):
            row = int((~has_positive).nonzero()[0])
            raise ValueError(
                f"key_ids: expected a key for the id of every row, got none for ids[{row}] = {int(ids[row])}"
            )
    else:
        torch._assert_async(has_positive.all(), "focal_itc_loss: key_ids has no key for the id of a row")
