"""Attention over soft-masked image features in plain PyTorch: the definition of the operator and of its gradients.

Soft-masked features `keep_n x_n` have the keys `keep_n K_n` and values `keep_n V_n` (K, V without bias: a key
bias adds the same to every logit of a query, and the value bias passes through because the weights sum to one). So with
`s_ln = scale <q_l, K_n>` and `z_ln = keep_n s_ln`:

    A = softmax_n(z),   O_l = sum_n A_ln keep_n V_n + b_v

and, with `P_ln = <dO_l, V_n>` and `delta_l = <dO_l, O_l - b_v> = sum_n A_ln keep_n P_ln`:

    dz_ln = A_ln (keep_n P_ln - delta_l)
    dq_l = scale sum_n dz_ln keep_n K_n        dK_n = scale sum_l dz_ln keep_n q_l
    dV_n = sum_l A_ln keep_n dO_l              dkeep_n = sum_l,h dz_ln s_ln + A_ln P_ln
    db_v = sum_l dO_l

All sequences of one image share its K and V: their rows are stacked into one matrix per image and head, each block of
rows with its own keep. K and V are never gathered, and every dK_n, dV_n is one sum with one owner.

Of every row the forward pass saves the maximum of z and the inverse of sum_n exp(z_n - maximum): A comes back from them
without the rounding of a log-sum-exp, which costs digits where logits are large. Rows without any attended key have
maximum 0 and inverse sum 0, hence A = 0: their output is b_v alone and no gradient flows.

Packed rows (1, H, T, D), where rows `boundaries[s]` to `boundaries[s + 1] - 1` are sequence s, are the same as
sequences padded to one length, whose padding is dropped. Rows of no sequence attend to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from softmask_fast.ops.checks import compute_dtype, without_autocast


@dataclass(frozen=True)
class _Block:
    """A run of images and their sequences, stacked: `sequences[i]` is in slot `slots[i]` of image `owners[i]`.

    The images count from the start of the run. `sequences` is None when sequence i is simply the only one of image i.
    """

    images: slice
    sequences: Tensor | None
    owners: Tensor | None
    slots: Tensor | None
    n_slots: int

    def stack(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """(S, H, L, D) of all sequences -> (b, H, n_slots, L, D) of this block, zeros in unused slots."""
        if self.sequences is None:
            return rows[:, :, None].to(dtype)
        _, heads, length, width = rows.shape
        images = self.images.stop - self.images.start
        stacked = rows.new_zeros((images, self.n_slots, heads, length, width), dtype=dtype)
        stacked[self.owners, self.slots] = rows[self.sequences].to(dtype)
        return stacked.transpose(1, 2)

    def stack_keep(self, keep: Tensor, dtype: torch.dtype) -> Tensor:
        """(S, N) -> (b, 1, n_slots, 1, N), ready to scale logits."""
        if self.sequences is None:
            return keep[:, None, None, None].to(dtype)
        images = self.images.stop - self.images.start
        stacked = keep.new_zeros((images, self.n_slots, keep.shape[1]), dtype=dtype)
        stacked[self.owners, self.slots] = keep[self.sequences].to(dtype)
        return stacked[:, None, :, None]

    def unstack(self, stacked: Tensor, rows: Tensor) -> None:
        """Writes (b, H, n_slots, L, D), or (b, n_slots, N), into its sequences' places of `rows`."""
        if self.sequences is None:
            rows.copy_(stacked.squeeze(-3 if stacked.dim() == 5 else 1))
            return
        by_slot = stacked.transpose(1, 2) if stacked.dim() == 5 else stacked
        rows[self.sequences] = by_slot[self.owners, self.slots].to(rows.dtype)


def _blocks(image_index: Tensor | None, images: int) -> Iterator[_Block]:
    """One block of all images where stacking wastes at most half of the rows, else one block per image.

    Images without a sequence appear in a block too: their gradients are zero.
    """
    if image_index is None:
        yield _Block(slice(0, images), None, None, None, 1)
        return
    counts = torch.bincount(image_index, minlength=images)
    order = image_index.argsort(stable=True)
    owners = image_index[order]
    slots = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[owners]
    n_slots = int(counts.max()) if images else 0
    if n_slots * images <= 2 * len(order):
        yield _Block(slice(0, images), order, owners, slots, n_slots)
        return
    start = 0
    for image, count in enumerate(counts.tolist()):
        run = slice(start, start + count)
        yield _Block(slice(image, image + 1), order[run], owners[run] - image, slots[run], count)
        start += count


@dataclass(frozen=True)
class _Packing:
    """Rows of all sequences, one after the other, and their places among S sequences of length L."""

    sequences: int
    length: int
    places: Tensor  # (rows of any sequence,) int64

    @classmethod
    def of(cls, boundaries: Tensor) -> _Packing:
        lengths = boundaries.diff().long()
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        token = torch.arange(len(sequence), device=lengths.device) - boundaries[sequence]
        length = int(lengths.max()) if len(lengths) else 0
        return cls(len(lengths), length, sequence * length + token)

    def pad(self, rows: Tensor) -> Tensor:
        """(1, H, T, D) -> (S, H, L, D), zeros at padding."""
        _, heads, _, width = rows.shape
        padded = rows.new_zeros((self.sequences * self.length, heads, width))
        padded[self.places] = rows[0].transpose(0, 1)[: len(self.places)]
        return padded.view(self.sequences, self.length, heads, width).transpose(1, 2)

    def pack(self, padded: Tensor, rows: Tensor) -> Tensor:
        """(S, H, L, D) written into the places of `rows` (1, H, T, D), which it returns."""
        rows[0].transpose(0, 1)[: len(self.places)] = padded.transpose(1, 2).flatten(0, 1)[self.places]
        return rows


def plan(image_index: Tensor, images: int, boundaries: Tensor | None, rows: int) -> Tensor:
    """The table of an `ImagePlan`: (B + 2 + S,) packed (B + 2 + 2 T,), int32, see `triton_plan.plan`."""
    owner = torch.where((image_index < 0) | (image_index >= images), images, image_index)
    if boundaries is not None:
        row = torch.arange(rows, dtype=torch.int32, device=boundaries.device)
        sequence = torch.searchsorted(boundaries[1:].contiguous(), row, right=True)
        owner = F.pad(owner, (0, 1), value=images + 1)[sequence]  # rows of no sequence come last
    order = owner.argsort(stable=True)
    starts = torch.searchsorted(owner[order], torch.arange(images + 2, device=owner.device))
    return torch.cat((starts, order) if boundaries is None else (starts, order, sequence[order])).to(torch.int32)


def _logits(queries: Tensor, key: Tensor, keep: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    """z (b, H, n_slots, L, N) of stacked queries (b, H, n_slots, L, D)."""
    logits = queries.flatten(2, 3).mul(scale) @ key.mT
    logits = logits.unflatten(2, queries.shape[2:4])
    if keep is not None:
        logits *= keep
    if mask is not None:
        logits.masked_fill_(~mask[:, None, None, None], float("-inf"))
    return logits


@without_autocast
def forward(
    query: Tensor,  # (S, H, L, D)
    key: Tensor,  # (B, H, N, D)
    value: Tensor,  # (B, H, N, D)
    keep: Tensor | None,  # (S, N)
    image_index: Tensor | None,  # (S,)
    boundaries: Tensor | None,  # (S + 1,)
    table: Tensor | None,  # of an `ImagePlan`, which only kernels need
    value_bias: Tensor | None,  # (H, D)
    key_mask: Tensor | None,  # (B, N), True = attend
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (S, H, L, D) and the softmax statistics (S, H, L, 2): maximum and inverse sum."""
    dtype = compute_dtype(query.dtype)
    if boundaries is not None:
        packing = _Packing.of(boundaries)
        padded = forward(packing.pad(query), key, value, keep, image_index, None, None, value_bias, key_mask, scale)
        rooms = torch.zeros_like(query), query.new_zeros((*query.shape[:3], 2), dtype=dtype)
        if value_bias is not None:
            rooms[0].copy_(value_bias[None, :, None])
        return tuple(packing.pack(rows, room) for rows, room in zip(padded, rooms, strict=True))
    output = torch.empty_like(query)  # of the same strides, like every result
    statistics = query.new_empty((*query.shape[:3], 2), dtype=dtype)
    for block in _blocks(image_index, key.shape[0]):
        queries = block.stack(query, dtype)
        kept = None if keep is None else block.stack_keep(keep, dtype)
        mask = None if key_mask is None else key_mask[block.images]
        logits = _logits(queries, key[block.images].to(dtype), kept, mask, scale)
        maximum = logits.amax(-1, keepdim=True)
        maximum.masked_fill_(maximum == float("-inf"), 0.0)
        weights = logits.sub_(maximum).exp_()
        inverse_sum = weights.sum(-1, keepdim=True).reciprocal_()
        inverse_sum.masked_fill_(inverse_sum == float("inf"), 0.0)
        weights *= inverse_sum
        if kept is not None:
            weights *= kept
        rows = weights.flatten(2, 3) @ value[block.images].to(dtype)
        rows = rows.unflatten(2, queries.shape[2:4])
        if value_bias is not None:
            rows += value_bias[None, :, None, None].to(dtype)
        block.unstack(rows, output)
        block.unstack(torch.cat((maximum, inverse_sum), -1), statistics)
    return output, statistics


@without_autocast
def backward(
    grad_output: Tensor,  # (S, H, L, D)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    image_index: Tensor | None,
    boundaries: Tensor | None,
    table: Tensor | None,
    value_bias: Tensor | None,
    key_mask: Tensor | None,
    output: Tensor,  # (S, H, L, D)
    statistics: Tensor,  # (S, H, L, 2)
    scale: float,
    query_gradient: bool,
    key_value_gradient: bool,
    keep_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to query, key, value and keep; a gradient that is not asked for is an empty tensor.

    delta is summed from the maps here; kernels that hold no row of them take it from `output`.
    """
    if boundaries is not None:
        packing = _Packing.of(boundaries)
        d_query, *others = backward(
            packing.pad(grad_output), packing.pad(query), key, value, keep, image_index, None, None, value_bias,
            key_mask, packing.pad(output), packing.pad(statistics), scale, query_gradient, key_value_gradient,
            keep_gradient,
        )  # fmt: skip
        return packing.pack(d_query, torch.zeros_like(query)) if query_gradient else d_query, *others
    dtype = compute_dtype(query.dtype)
    d_query = torch.empty_like(query) if query_gradient else query.new_empty(0)
    d_key = torch.empty_like(key) if key_value_gradient else query.new_empty(0)
    d_value = torch.empty_like(value) if key_value_gradient else query.new_empty(0)
    d_keep = keep.new_empty(keep.shape) if keep_gradient else query.new_empty(0)
    for block in _blocks(image_index, key.shape[0]):
        queries = block.stack(query, dtype)
        grads = block.stack(grad_output, dtype)
        kept = None if keep is None else block.stack_keep(keep, dtype)
        mask = None if key_mask is None else key_mask[block.images]
        keys, values = key[block.images].to(dtype), value[block.images].to(dtype)
        logits = _logits(queries, keys, kept, mask, scale)
        maximum, inverse_sum = block.stack(statistics, dtype).split(1, -1)
        weights = (logits - maximum).exp_().mul_(inverse_sum)
        weights_gradient = (grads.flatten(2, 3) @ values.mT).unflatten(2, queries.shape[2:4])  # P
        kept_gradient = weights_gradient if kept is None else weights_gradient * kept
        delta = (weights * kept_gradient).sum(-1, keepdim=True)
        logits_gradient = weights * (kept_gradient - delta)  # dz
        if keep_gradient:
            scores = _logits(queries, keys, None, None, scale)
            by_row = logits_gradient * scores + weights * weights_gradient
            block.unstack(by_row.sum((1, 3)), d_keep)
        if kept is not None:
            logits_gradient *= kept
            weights *= kept
        logits_gradient *= scale
        if query_gradient:
            rows = logits_gradient.flatten(2, 3) @ keys
            block.unstack(rows.unflatten(2, queries.shape[2:4]), d_query)
        if key_value_gradient:
            d_key[block.images] = logits_gradient.flatten(2, 3).mT @ queries.flatten(2, 3)
            d_value[block.images] = weights.flatten(2, 3).mT @ grads.flatten(2, 3)
    if key_value_gradient and image_index is not None:  # zero, whatever an image that no sequence sees holds
        unseen = torch.bincount(image_index, minlength=key.shape[0]) == 0
        d_key[unseen], d_value[unseen] = 0.0, 0.0
    return d_query, d_key, d_value, d_keep
