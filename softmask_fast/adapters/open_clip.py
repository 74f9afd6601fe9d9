"""The loss of open_clip's training code, with focal weights and without the matrix of logits.

`FocalClipLoss` replaces `open_clip.loss.ClipLoss`: the constructor and the call are the same, and for gamma = 0 the
loss and gradients too, on one or several processes. open_clip is not imported.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from softmask_fast.ops import FocalITCLoss, focal_itc_loss
from softmask_fast.ops.checks import check_gamma, check_number
from softmask_fast.ops.collectives import world_size as ranks_here


class FocalClipLoss(nn.Module):
    """Drop-in replacement for open_clip's `ClipLoss`, with each term weighted by `(1 - p)^gamma`.

    Whatever the options, each rank compares its own rows with the features of all ranks. As in `ClipLoss`, the options
    decide what is returned and which gradients flow:

    - `local_loss`: a rank returns the loss of its own rows. Otherwise it returns that of all rows, the same number on
      every rank.
    - `gather_with_grad`: the gradient of a feature includes its effect on the rows of all ranks. Otherwise a rank
      treats the features of other ranks as constants. Then, with `local_loss`, its own features get gradients as rows
      only. Without it, they get those of the loss of all rows, which DistributedDataParallel averages to
      1 / world_size of the whole gradient.

    Without `local_loss`, all ranks must scale the loss equally before the backward pass, as a gradient scaler does.

    Args:
        local_loss, gather_with_grad: see above; no effect on one process.
        cache_labels: accepted for compatibility; it has no effect, as there are no labels.
        rank, world_size: those of the default process group, which must be initialized for `world_size > 1`. As in
            `ClipLoss`, a `world_size` of at most 1 means one process, whatever the rank.
        use_horovod: not supported on several processes.
        gamma: focal exponent, from 0 to 1000; 0 gives `ClipLoss`.
        impl: implementation of `focal_itc_loss`; None: the best one that runs here.

    Raises:
        TypeError, ValueError: for `use_horovod`, or a rank or gamma out of range.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        gamma: float = 2.0,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        if use_horovod and world_size > 1:
            raise ValueError("use_horovod: expected False, as FocalClipLoss only uses torch.distributed; got True")
        if world_size > 1 and not 0 <= rank < world_size:
            raise ValueError(f"rank: expected a number from 0 to world_size - 1 = {world_size - 1}, got {rank}")
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.rank, self.world_size = rank, world_size
        self.gamma, self.impl = check_gamma(gamma), impl
        # constant keys, with gradients as rows only, are what FocalITCLoss gathers as "momentum"
        self.constant_keys = local_loss and not gather_with_grad
        gather = "momentum" if self.constant_keys else "with_grad"
        self.joined_loss = FocalITCLoss(gamma=gamma, gather=gather, impl=impl) if world_size > 1 else None

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, local_loss={self.local_loss}, gather_with_grad={self.gather_with_grad}"

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The contrastive loss of this rank's B pairs. A collective if there are several ranks.

        Args:
            image_features, text_features: (B, d) unit vectors of one dtype.
            logit_scale: 1 / temperature, a positive number or a tensor with one element.
            logit_bias: a number, or a tensor with one element, added to every logit. The softmax does not depend on it,
                so its gradient is exactly 0 (in `ClipLoss`, rounding noise).
            output_dict: return `{"contrastive_loss": loss}` instead of the loss.

        Returns:
            The loss, 0-dim, float32 (float64 for float64 features), also under autocast.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        temperature = _temperature(logit_scale)
        if self.joined_loss is None:
            loss = focal_itc_loss(
                image_features, text_features, temperature=temperature, gamma=self.gamma, impl=self.impl
            )
        else:
            loss = self._joined(image_features, text_features, temperature)
        if logit_bias is not None:
            bias = _one_number("logit_bias", logit_bias)
            # add 0 times the bias: DistributedDataParallel waits for the gradient of every parameter
            loss = loss + 0 * (bias.to(loss.dtype) if isinstance(bias, Tensor) else bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _joined(self, image: Tensor, text: Tensor, temperature: Tensor | float) -> Tensor:
        """The loss on several ranks."""
        if ranks_here() != self.world_size or dist.get_rank() != self.rank:
            here = f"rank {dist.get_rank()} of {ranks_here()}" if ranks_here() > 1 else "a single process"
            raise ValueError(
                f"world_size: expected the process group's, got rank {self.rank} of {self.world_size} in {here}"
            )
        if self.local_loss:
            keys = dict(teacher_image=image.detach(), teacher_text=text.detach()) if self.constant_keys else {}
            return self.joined_loss(image, text, temperature=temperature, **keys)
        # The factor of a rank's own loss in backward. 1 gives the features the sum over the ranks, as a gather with
        # gradient does. The temperature gets the mean over the ranks then, and else the sum.
        factor = 1.0 if self.gather_with_grad else 1 / self.world_size
        if isinstance(temperature, Tensor):
            temperature = _SumOfGradients.apply(temperature, 1 / (factor * self.world_size))
        return _MeanOverRanks.apply(self.joined_loss(image, text, temperature=temperature), self.world_size, factor)


class _MeanOverRanks(torch.autograd.Function):
    """The mean over the ranks; backward multiplies the gradient by `factor` on each of them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, world_size: int, factor: float) -> Tensor:
        ctx.factor = factor
        total = loss.clone()
        dist.all_reduce(total)
        return total / world_size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.factor, None, None


class _SumOfGradients(torch.autograd.Function):
    """The number itself; its gradient is `factor` times the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, number: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return number.view_as(number)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad * ctx.factor
        dist.all_reduce(grad)
        return grad, None


def _one_number(name: str, value: object) -> Tensor | float:
    """A number, or a tensor with one element as a scalar in float32 or better; raises for anything else."""
    if not isinstance(value, Tensor):
        return check_number(name, value)
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"{name}: expected a number, or a floating-point tensor with one element, got {value.dtype} of size "
            f"{tuple(value.shape)}"
        )
    return value.reshape(()).to(torch.promote_types(value.dtype, torch.float32))


def _temperature(logit_scale: Tensor | float) -> Tensor | float:
    """The reciprocal of open_clip's scale."""
    scale = _one_number("logit_scale", logit_scale)
    if isinstance(scale, Tensor):
        return scale.reciprocal()
    return 1 / check_number("logit_scale", scale, above=0)
