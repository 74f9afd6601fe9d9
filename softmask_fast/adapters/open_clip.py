"""The loss of open_clip's training code, focal and without the matrix of logits.

`FocalClipLoss` takes the place of `open_clip.loss.ClipLoss`: same constructor, same call, and with gamma = 0 the same
loss and the same gradients, in one process and in several. open_clip itself is not imported.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from softmask_fast.ops import FocalITCLoss, focal_itc_loss
from softmask_fast.ops.checks import check_gamma, check_number
from softmask_fast.ops.collectives import world_size as ranks_here


class FocalClipLoss(nn.Module):
    """Drop-in for open_clip's ``ClipLoss``, its terms weighted by ``(1 - p)^gamma``.

    Every rank computes its own rows against the features of all ranks, whichever settings are chosen. They decide, as
    in ``ClipLoss``, what is returned and which gradients flow:

    - ``local_loss``: a rank's loss is that of its own rows; else the loss of all rows, the same number on every rank.
    - ``gather_with_grad``: the gradient of a feature has what it did to the rows of all ranks. Without it, a rank sees
      the features of other ranks as constants: with ``local_loss`` its own features have a gradient as rows only, else
      that of the loss of all rows with respect to them (which DistributedDataParallel, averaging, then makes ``1 /
      world_size`` of the whole gradient).

    Where ``local_loss`` is off, all ranks have to scale the loss alike before backward (a gradient scaler does).

    Args:
        local_loss, gather_with_grad: see above; without effect in one process.
        cache_labels: accepted and without effect, there are no labels.
        rank, world_size: of the default process group, which has to be initialised for ``world_size > 1``.
        use_horovod: refused.
        gamma: focal exponent, >= 0; 0 is ``ClipLoss``.
        impl: implementation of ``focal_itc_loss``; None takes the best one that runs here.
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
    ):
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod: expected False, FocalClipLoss gathers by torch.distributed alone, got True")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected one from 0 to world_size - 1 = {world_size - 1}, got {rank}")
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.rank, self.world_size = rank, world_size
        self.gamma, self.impl = check_gamma(gamma), impl
        # constant keys, where a feature counts as a row alone, are what this module calls momentum features
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
        """The contrastive loss of B pairs.

        Args:
            image_features, text_features: (B, d) unit vectors of one dtype.
            logit_scale: 1 / temperature, a positive number or a tensor with one element.
            logit_bias: a number, or a tensor with one element. It is added to every logit, which softmax ignores: the
                loss does not depend on it, and its gradient is exactly 0 (that of ``ClipLoss`` is rounding noise).
            output_dict: return ``{"contrastive_loss": loss}``.

        Returns:
            A scalar, float32 (float64 for float64 features) also under autocast.

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
            # a term of 0 rather than nothing: DistributedDataParallel waits for the gradient of every parameter
            loss = loss + 0 * (bias.to(loss.dtype) if isinstance(bias, Tensor) else bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _joined(self, image: Tensor, text: Tensor, temperature: Tensor | float) -> Tensor:
        if ranks_here() != self.world_size or dist.get_rank() != self.rank:
            here = f"rank {dist.get_rank()} of {ranks_here()}" if ranks_here() > 1 else "a single process"
            raise ValueError(
                f"world_size: expected the process group's, got rank {self.rank} of {self.world_size} in {here}"
            )
        if self.local_loss:
            keys = dict(teacher_image=image.detach(), teacher_text=text.detach()) if self.constant_keys else {}
            return self.joined_loss(image, text, temperature=temperature, **keys)
        # What a rank's own loss is multiplied by in backward. With 1 the features get the sum over the ranks, which is
        # what a gather with gradient gives; the temperature wants their mean, or the whole one without it.
        share = 1.0 if self.gather_with_grad else 1 / self.world_size
        if isinstance(temperature, Tensor):
            temperature = _SumOfGradients.apply(temperature, 1 / (share * self.world_size))
        return _MeanOverRanks.apply(self.joined_loss(image, text, temperature=temperature), self.world_size, share)


class _MeanOverRanks(torch.autograd.Function):
    """The mean over the ranks; backward gives each of them ``share`` of the gradient."""

    @staticmethod
    def forward(ctx, loss: Tensor, world_size: int, share: float) -> Tensor:
        ctx.share = share
        total = loss.clone()
        dist.all_reduce(total)
        return total / world_size

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad * ctx.share, None, None


class _SumOfGradients(torch.autograd.Function):
    """The number itself; its gradient is ``share`` of the sum over the ranks."""

    @staticmethod
    def forward(ctx, number: Tensor, share: float) -> Tensor:
        ctx.share = share
        return number.view_as(number)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad = grad * ctx.share
        dist.all_reduce(grad)
        return grad, None


def _one_number(name: str, value: object) -> Tensor | float:
    """A number as it is; a tensor with one element as a scalar, in float32 or better."""
    if not isinstance(value, Tensor):
        return check_number(name, value)
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"{name}: expected a number, or a floating-point tensor with one element, got {value.dtype} of size "
            f"{tuple(value.shape)}"
        )
    return value.reshape(()).to(torch.promote_types(value.dtype, torch.float32))


def _temperature(logit_scale: Tensor | float) -> Tensor | float:
    scale = _one_number("logit_scale", logit_scale)
    if isinstance(scale, Tensor):
        return scale.reciprocal()
    return 1 / check_number("logit_scale", scale, above=0)
