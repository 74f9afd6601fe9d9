"""Captions without padding: all tokens in one list of rows, and self-attention within each sequence.

Embeddings, projections, norms and feed-forward run on (T, C) rows of real tokens; for captions T is about half of
S * L. Self-attention has three implementations:

- "padded": pads queries, keys and values for `scaled_dot_product_attention` with a mask; any device, any dtype.
- "varlen": packed, PyTorch's `torch.nn.attention.varlen` (FlashAttention); GPU, half precision.
- "xformers": packed, `memory_efficient_attention` with a `BlockDiagonalMask`; GPU. Its mask needs the lengths on the
  host, which has to wait for the device.

"auto" is "varlen" where it runs, else "padded". Cross-attention always takes packed rows.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from softmask_fast.errors import UsageError
from softmask_fast.installation import install_command

if TYPE_CHECKING:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask


@dataclass(frozen=True)
class Packing:
    """Where the tokens of S padded sequences of length L are in T rows.

    On the CPU T is the number of tokens. On a GPU the host does not wait for that number. There T is an upper bound, a
    multiple of 64 so that few sizes occur. The rows after the last token are padding, in extra sequences that are never
    read.
    """

    mask: Tensor  # (S, L) bool, True = token
    positions: Tensor  # (T,) int64, position of each row among the S * L padded ones
    boundaries: Tensor  # (S + spare + 1,) int32, sequence i is rows boundaries[i] ... boundaries[i + 1] - 1

    @classmethod
    def of(cls, mask: Tensor, fewest: int = 0, most: int | None = None) -> Packing:
        """The packing of a mask.

        Args:
            mask: (S, L) bool, True = token.
            fewest: lower bound on its number of tokens. The bounds only matter on a GPU.
            most: upper bound on it.
        """
        length = mask.shape[1]
        if mask.device.type == "cpu" and not is_fake(mask):
            positions = mask.flatten().nonzero()[:, 0]
            fewest = most = len(positions)
        else:
            most = mask.numel() if most is None else min(-(-most // 64) * 64, mask.numel())
            positions = (~mask.flatten()).to(torch.uint8).argsort(stable=True)[:most]  # tokens first, in order
        ends = F.pad(mask.sum(1).cumsum(0), (1, 0))
        spare = torch.arange(1, math.ceil((most - fewest) / length) + 1, device=mask.device) * length
        ends = torch.cat([ends, (ends[-1:] + spare).clamp(max=most)])
        return cls(mask, positions, ends.to(torch.int32))

    def pack(self, padded: Tensor) -> Tensor:
        """(S, L, ...) -> (T, ...)."""
        return padded.flatten(0, 1).index_select(0, self.positions)

    def pad(self, rows: Tensor) -> Tensor:
        """(T, ...) -> (S, L, ...), zero at padding."""
        padded = rows.new_zeros(self.mask.numel(), *rows.shape[1:]).index_copy(0, self.positions, rows)
        return padded.unflatten(0, self.mask.shape)

    def rows_of(self, positions: Tensor) -> Tensor:
        """Positions of tokens among the S * L padded ones (R,) int64 -> their rows (R,) int64."""
        rows = torch.arange(len(self.positions), device=positions.device)
        row_of = torch.zeros(self.mask.numel(), dtype=torch.int64, device=positions.device)
        return row_of.index_copy(0, self.positions, rows)[positions]

    @functools.cached_property
    def ends(self) -> Tensor:
        """(T,) bool: True for the first and the last token of each sequence, [CLS] and [SEP]."""
        boundaries = self.boundaries[: len(self.mask) + 1].long()
        first_and_last = torch.cat([boundaries[:-1], boundaries[1:] - 1])
        return self.positions.new_zeros(len(self.positions), dtype=torch.bool).index_fill(0, first_and_last, True)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """(S, 1, 1, L), what "padded" attention adds to the logits: 0 at tokens, minus infinity at padding."""
        if dtype not in self._biases:
            bias = torch.zeros_like(self.mask, dtype=dtype).masked_fill_(~self.mask, -math.inf)
            self._biases[dtype] = bias[:, None, None, :]
        return self._biases[dtype]

    @functools.cached_property
    def _biases(self) -> dict[torch.dtype, Tensor]:
        return {}

    @functools.cached_property
    def block_diagonal(self) -> BlockDiagonalMask:
        """The mask for xformers."""
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        return BlockDiagonalMask.from_seqlens(self.boundaries.diff().tolist(), device=self.mask.device)


def unavailable_reason(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why self-attention `name` cannot run with this device and dtype; None if it can."""
    if name not in ("auto", *_IMPLEMENTATIONS):
        return f"expected 'auto' or one of {sorted(_IMPLEMENTATIONS)}"
    if name in ("auto", "padded"):
        return None
    if device.type != "cuda":
        return f"it has no kernel for {device.type} tensors, only for GPUs"
    if name == "varlen" and dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, got {dtype} (use --bf16 true)"
    if name == "varlen" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 (Ampere) or newer"
    return _xformers_unavailable_reason(device, dtype) if name == "xformers" else None


@functools.cache
def _xformers_unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """As `unavailable_reason`. A wheel of xformers that imports may still lack kernels for this torch or GPU."""
    try:
        from xformers.ops import memory_efficient_attention

        token = torch.zeros(1, 1, 1, 64, device=device, dtype=dtype)
        memory_efficient_attention(token, token, token)
    except ImportError as error:
        return f"xformers cannot be imported ({error}); {install_command('gpu')}"
    except NotImplementedError:
        return f"xformers has no kernel for {dtype} on {device}; python -m xformers.info shows what it has"
    return None


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolves "auto". Raises UsageError if the implementation cannot run here."""
    if reason := unavailable_reason(name, device, dtype):
        raise UsageError(f"attention: {name!r} cannot run here: {reason}")
    if name != "auto":
        return name
    return "padded" if unavailable_reason("varlen", device, dtype) else "varlen"


def self_attention(joined: Tensor, packing: Packing, name: str = "auto") -> Tensor:
    """Attention within each sequence: joined (T, 3, H, D), query, key and value -> (T, H, D)."""
    return _IMPLEMENTATIONS[choose_attention(name, joined.device, joined.dtype)](joined, packing)


def _padded(joined: Tensor, packing: Packing) -> Tensor:
    query, key, value = packing.pad(joined).permute(2, 0, 3, 1, 4).unbind()
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=packing.bias(joined.dtype))
    return packing.pack(output.transpose(1, 2))


def _varlen(joined: Tensor, packing: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    length = packing.mask.shape[1]
    return varlen_attn(*joined.unbind(1), packing.boundaries, packing.boundaries, length, length)


def _xformers(joined: Tensor, packing: Packing) -> Tensor:
    from xformers.ops import memory_efficient_attention

    query, key, value = joined[None].unbind(2)
    return memory_efficient_attention(query, key, value, attn_bias=packing.block_diagonal)[0]


_IMPLEMENTATIONS = {"padded": _padded, "varlen": _varlen, "xformers": _xformers}
