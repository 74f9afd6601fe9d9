"""The definition of the focal image-text contrastive loss, in plain PyTorch. It holds the (B, M) logits.

For one direction, rows x_i against keys y_j, with s_ij = <x_i, y_j> / tau and p_i = softmax_j(s_ij):

    f(p)   = -(1 - p)^gamma log p                                             the focal cross-entropy of one key
    t_ij   = softmax_j(<teacher_i, y_j> / tau)                                the momentum teacher's distribution
    loss_i = alpha sum_j t_ij f(p_ij) + (1 - alpha) hard_i
    hard_i = mean of f(p_ij) over the positive keys j of row i                positives="mean"
           = f(sum of p_ij over them)                                         positives="any"

The derivative is -df/dlog p = w(p) = (1 - p)^gamma - gamma p (1 - p)^(gamma - 1) log p, so that with the target
t'_ij = alpha t_ij + (1 - alpha) h_ij and W_i = sum_j t'_ij w(p_ij):

    dloss_i / ds_ij = p_ij W_i - t'_ij w(p_ij)            dloss / dtau = -sum_ij (dloss_i / ds_ij) s_ij / tau

("any": h_ij = p_ij / P_i over the positives, with P_i = sum of p_ij over them, and w(P_i) in place of w(p_ij) for the
hard part.)

loss="sigmoid" asks of each pair alone whether it belongs together, with a learned bias b:

    p_ij   = sigmoid(z_ij (s_ij + b)),  z_ij = 1 for the positive keys j of row i, -1 for all others
    loss_i = sum_j f(p_ij)              dloss_i / ds_ij = -z_ij (1 - p_ij) w(p_ij), and their sum is dloss / db

Sources: the focal factor is that of SoftMask++ (Park & Han, CVPR 2023, arXiv 2304.00719), the soft targets those of
ALBEF (Li et al., NeurIPS 2021, arXiv 2107.07651), "any" is EgoNCE (Lin et al., NeurIPS 2022, arXiv 2206.01670), the
sigmoid's loss with gamma 0 SigLIP's (Zhai et al., ICCV 2023, arXiv 2303.15343).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softmask_fast.ops.focal_itc.sampling import negative_log_exponential, row_keys
from softmask_fast.ops.focal_itc.state import SECOND_DERIVATIVE, Keys, Options, Rows, check_every_row_has_positive


def focal_weight(log_p: Tensor, gamma: float) -> Tensor:
    """w(p) = (1 - p)^gamma - gamma p (1 - p)^(gamma - 1) log p, in a form that holds at p = 0 and at p = 1."""
    log_p = log_p.clamp(max=0.0)  # a sum of probabilities may round to a little above 1
    one_minus_p = -torch.expm1(log_p)
    # -p log p / (1 - p), which tends to 1 where p tends to 1
    ratio = torch.where(one_minus_p <= 0, 1.0, -torch.exp(log_p) * log_p / one_minus_p)  # NaN stays
    return one_minus_p**gamma * (1 + gamma * ratio)


class _OnceOnly(torch.autograd.Function):
    """Passes a first derivative on, ties it to what it depends on, and raises where it is differentiated again."""

    @staticmethod
    def forward(ctx, derivative: Tensor, *depends_on: Tensor) -> Tensor:
        return derivative.view_as(derivative)

    @staticmethod
    def backward(ctx, grad: Tensor) -> None:
        raise RuntimeError(SECOND_DERIVATIVE)


class _FocalCrossEntropy(torch.autograd.Function):
    """f of log p, with the derivative -w(p): the chain rule through (1 - p)^gamma would give inf * 0 at p = 1."""

    @staticmethod
    def forward(ctx, log_p: Tensor, gamma: float) -> Tensor:
        ctx.save_for_backward(log_p)
        ctx.gamma = gamma
        log_p = log_p.clamp(max=0.0)
        return -((-torch.expm1(log_p)) ** gamma) * log_p

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (log_p,) = ctx.saved_tensors
        with torch.no_grad():
            derivative = -focal_weight(log_p, ctx.gamma) * grad
        return _OnceOnly.apply(derivative, log_p, grad) if torch.is_grad_enabled() else derivative, None


def focal_cross_entropy(log_p: Tensor, gamma: float) -> Tensor:
    """f(p) = -(1 - p)^gamma log p from log p, any shape; differentiable once, without NaN at p = 0 and p = 1."""
    return _FocalCrossEntropy.apply(log_p, gamma)


def positive_mask(
    rows: int, keys: int, ids: Tensor | None, key_ids: Tensor | None, row_offset: int, device: torch.device
) -> Tensor:
    """(rows, keys) bool: the positives, by ids where given, else key `row_offset + i` for row i.

    Raises ValueError for a row whose id no key has (on a GPU: a device-side assertion, which waits for nothing).
    """
    if ids is None:
        column = torch.arange(row_offset, row_offset + rows, device=device)
        return column[:, None] == torch.arange(keys, device=device)[None]
    mask = ids[:, None] == key_ids[None]
    check_every_row_has_positive(mask.any(dim=1), ids)
    return mask


def poison(products: Tensor) -> Tensor:
    """(B, 1) zeros, NaN where a product of the row is not finite.

    Such a row has no loss. The formulas alone would hide minus infinity, as its p is 0, and with it a diverged feature.
    """
    return (products * 0).sum(dim=1, keepdim=True)


def focal_itc_direction(rows: Rows, keys: Keys) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of the loss; gradients to rows, keys and temperature.

    Returns loss, statistics and hard negatives, see `Outputs`.
    """
    x, teacher, ids, temperature, options = rows
    dtype = temperature.dtype
    x, y = x.to(dtype), keys.features.to(dtype)
    positive = positive_mask(x.shape[0], y.shape[0], ids, keys.ids, options.row_offset, x.device)
    products = x @ y.T
    log_p = torch.log_softmax(products / temperature, dim=1) + poison(products)
    target = None
    if options.alpha is not None:
        with torch.no_grad():
            products = teacher.to(dtype) @ y.T
            target = options.alpha * torch.softmax(products / temperature, dim=1) + poison(products)
    if not options.any_positive:
        hard = positive * (positive.sum(dim=1, keepdim=True, dtype=dtype).reciprocal() * options.hard)
        target = hard if target is None else target + hard
    loss = log_p.new_zeros(log_p.shape[0])
    if target is not None:
        loss = (target * focal_cross_entropy(log_p, options.gamma)).sum(dim=1)
    if options.any_positive:
        log_mass = torch.logsumexp(log_p.masked_fill(~positive, -torch.inf), dim=1)
        loss = loss + options.hard * focal_cross_entropy(log_mass, options.gamma)
    if not options.stats:
        return loss, loss.new_empty(3, 0), torch.empty(0, dtype=torch.int64, device=loss.device)
    return loss, *_statistics(log_p.detach(), positive, options)


def direction(rows: Rows, keys: Keys) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of the loss; without a bias by the softmax."""
    return (focal_itc_direction if rows.options.bias is None else sigmoid_direction)(rows, keys)


def sigmoid_direction(rows: Rows, keys: Keys) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of loss="sigmoid"; gradients to rows, keys, temperature and bias. Returns what the other one does.

    The statistics are those of the softmax of the same logits.
    """
    x, _, ids, temperature, options = rows
    products = x.to(temperature.dtype) @ keys.features.to(temperature.dtype).T
    logits = products / temperature + options.bias + products * 0  # NaN where a product is not finite, see `poison`
    positive = positive_mask(*logits.shape, ids, keys.ids, options.row_offset, logits.device)
    log_p = F.logsigmoid(torch.where(positive, logits, -logits))
    loss = focal_cross_entropy(log_p, options.gamma).sum(dim=1)
    if not options.stats:
        return loss, loss.new_empty(3, 0), torch.empty(0, dtype=torch.int64, device=loss.device)
    return loss, *_statistics(torch.log_softmax(logits.detach(), dim=1), positive, options)


def _statistics(log_p: Tensor, positive: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    lost = log_p.isnan().any(dim=1)
    correct = positive.gather(1, log_p.argmax(dim=1, keepdim=True)).squeeze(1).to(p.dtype).masked_fill(lost, torch.nan)
    entropy = -(p * log_p).sum(dim=1)
    positive_probability = (p * positive).sum(dim=1)
    noise_keys = row_keys(options.row_offset, p.shape[0], options.seed, options.direction)
    score = log_p + negative_log_exponential(noise_keys, 0, p.shape[1], p.dtype)
    column = torch.arange(p.shape[1], device=p.device)
    barred = positive | (column < options.first_negative) | (column >= options.last_negative)
    choice = score.masked_fill(barred, -torch.inf).argmax(dim=1)
    statistics = torch.stack([correct, entropy, positive_probability])
    return statistics, torch.where(barred.all(dim=1) | lost, -1, choice)
