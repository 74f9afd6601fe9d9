"""Focal image-text contrastive loss: queues, soft targets, several positives, statistics, hard negatives."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from softmask_fast.ops import registry, triton_support
from softmask_fast.ops.checks import (
    as_scalar,
    check_choice,
    check_gamma,
    check_integer,
    check_seed,
    check_teachers,
    check_tensor,
)
from softmask_fast.ops.extension import cpu_unavailable_reason
from softmask_fast.ops.focal_itc import cpp, cpp_sigmoid, cpp_tile, operators, reference, sigmoid, streamed
from softmask_fast.ops.focal_itc.state import Problem

__all__ = ["FocalITCStats", "focal_itc_loss"]

_TRITON, _SYMMETRIC, _SIGMOID = (
    f"softmask_fast.ops.focal_itc.triton_{file}" for file in ("launch", "symmetric_launch", "sigmoid")
)
# The definition and its gradients hold about 12 matrices (B, M). Up to 32 MiB each, it is twice as fast as tiles. From
# there on glibc requests each allocation from the system, and tiles are faster as well as smaller.
_STREAMED_FROM = 1 << 25
registry.register(
    "focal_itc",
    operators.streaming(
        "triton",
        {
            "forward": registry.lazily(_TRITON, "Forward"),
            "backward": registry.lazily(_TRITON, "backward"),
            "symmetric_covers": registry.lazily(_SYMMETRIC, "covers"),
            "symmetric_forward": registry.lazily(_SYMMETRIC, "forward"),
            "symmetric_backward": registry.lazily(_SYMMETRIC, "backward"),
        },
        sigmoid.parts(registry.lazily(_SIGMOID, "add_losses"), registry.lazily(_SIGMOID, "gradients")),
        unavailable_reason=functools.partial(triton_support.unavailable_reason, largest=1024, what="features"),
        automatic_on=("cuda",),
    ),
    operators.streaming(
        "cpp",
        {
            "forward": cpp.Forward,
            "backward": cpp.backward,
            "symmetric_forward": cpp.symmetric_forward,
            "symmetric_backward": cpp.symmetric_backward,
            "whole_covers": cpp_tile.covers,
            "whole": cpp_tile.loss,
        },
        sigmoid.parts(cpp_sigmoid.add_losses, cpp_sigmoid.gradients),
        unavailable_reason=cpu_unavailable_reason,
        automatic_on=("cpu",),
    ),
    operators.streaming(
        "streamed",
        {"forward": streamed.Forward, "backward": streamed.backward},
        sigmoid.parts(sigmoid.add_losses, sigmoid.gradients),
        automatic_from=_STREAMED_FROM,
    ),
    registry.Implementation("reference", {"direction": reference.focal_itc_direction}),
)


class FocalITCStats(NamedTuple):
    """Detached statistics of both directions: `image_...` ranks the text keys of an image row, `text_...` the reverse.

    Attributes:
        image_accuracy, text_accuracy: fraction of rows whose most probable key is a positive; among equally probable
            keys the first counts.
        image_entropy, text_entropy: mean entropy of the softmax, in nats.
        image_positive_probability, text_positive_probability: mean total probability of a row's positives.
        image_hard_negative, text_hard_negative: (B,) int64, the key column of each row's hard negative, sampled from
            its softmax over the negatives; -1 for a row without negatives.

    All but the hard negatives are 0-dim, means over the rows, in the dtype of the loss.
    """

    image_accuracy: Tensor
    text_accuracy: Tensor
    image_entropy: Tensor
    text_entropy: Tensor
    image_positive_probability: Tensor
    text_positive_probability: Tensor
    image_hard_negative: Tensor
    text_hard_negative: Tensor


def focal_itc_loss(
    image: Tensor,
    text: Tensor,
    image_keys: Tensor | None = None,
    text_keys: Tensor | None = None,
    *,
    temperature: float | Tensor,
    gamma: float = 2.0,
    teacher_image: Tensor | None = None,
    teacher_text: Tensor | None = None,
    alpha: float | Tensor = 0.0,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    positives: str = "mean",
    row_offset: int = 0,
    reduction: str = "mean",
    return_stats: bool = False,
    negative_range: tuple[int, int] | None = None,
    loss: str = "softmax",
    bias: float | Tensor | None = None,
    seed: int | Tensor = 0,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, FocalITCStats]:
    """Focal contrastive loss of B image-text pairs: each term is weighted by `(1 - p)^gamma`.

    Image rows are compared with `text_keys`, text rows with `image_keys`; the loss is the mean of both directions.
    `ops/focal_itc/reference.py` has the formulas. Focal weighting of ITC is from SoftMask++ (Park & Han, CVPR 2023).

    If the product of a row, or of its teacher, with any key is not finite, the row's loss is NaN. If it is the row's
    own product, its statistics are NaN and its hard negative is -1. Every implementation does the same.

    Args:
        image, text: (B, d) unit vectors, float16, bfloat16, float32 or float64. All features share one dtype and
            device; sums run in float32 (float64 for float64).
        image_keys, text_keys: (M, d), both or neither. None: the batch of the other modality (CLIP), so M = B, and each
            feature gets its gradient as a row and as a key. With a queue (ALBEF), pass the teacher's features of the
            batch followed by those of the queue.
        temperature: a number from 1e-12 to 1e12, or a 0-dim tensor, which gets a gradient.
        gamma: focal exponent, from 0 to 1000; 0 is plain cross-entropy. 0, 1, 2 and 3 are the fastest.
        teacher_image, teacher_text: (B, d) features of the same rows by the momentum teacher, treated as constants.
            Required for alpha > 0.
        alpha: weight in [0, 1] of the teacher's soft targets `softmax(teacher @ keys.T / temperature)`: a number, or a
            0-dim tensor on the device of the features. With a tensor the teachers are used whatever its value.
        ids, key_ids: (B,) and (M,) int64. The keys with a row's id are its positives; each duplicate counts. A row
            without a positive raises. `key_ids` defaults to `ids` if the keys default to the batch. Without ids, the
            positive of row i is key `row_offset + i`.
        positives: "mean": the hard target is uniform over the positives (ALBEF, BLIP). "any": the hard term uses their
            total probability (EgoNCE).
        row_offset: key column of local row 0. It also numbers the rows for the sampler.
        reduction: "mean" or "sum" over the rows, or "none" for the (B,) losses.
        return_stats: also return `FocalITCStats`.
        negative_range: (first, last + 1) key columns to sample hard negatives from; default: all keys.
        loss: "softmax" asks which key belongs to a row. "sigmoid" asks of each pair alone whether it matches (SigLIP's
            loss if gamma is 0): a row's loss is the sum over its keys, every key with the row's id is a positive, there
            are no soft targets, and the statistics are those of the softmax of the same logits.
        bias: added to the logits of "sigmoid": a number of size at most 1e12, or a 0-dim tensor, which gets a gradient;
            None: 0.
        seed: seed of the hard negatives: a number, or a 0-dim int64 tensor on the device of the features. A sample
            depends only on (seed, direction, row_offset + row) and the row's softmax.
        impl: implementation by name: "triton", "cpp", "streamed" or "reference". None: the best one that runs here. If
            no kernel runs, that is "reference", or "streamed" once a (B, M) matrix takes 32 MiB.

    Returns:
        The loss, float32 (float64 for float64 inputs): 0-dim, or (B,) with reduction "none". With `return_stats`,
        (loss, stats). Gradients flow to image, text, both key sets, temperature and bias; none flow to the teachers, to
        alpha or through the statistics.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; the same for every implementation.
            On a GPU and under `torch.compile`, the host reads no tensor, because it would wait for the device. There an
            id without a key trips a device-side assertion, and a 0-dim tensor out of range is used as it is.
        RuntimeError: in forward-mode autograd and under `torch.func` transforms.
    """
    registry.refuse_transforms(
        "focal_itc_loss", image, text, image_keys, text_keys, temperature, teacher_image, teacher_text, alpha, ids,
        key_ids, bias, seed,
    )  # fmt: skip
    check_tensor("image", image, ("B", "d"))
    batch, width = image.shape
    if batch == 0 or width == 0:
        raise ValueError(f"image: expected at least one row and one column, got size {tuple(image.shape)}")
    like = ("image", image)
    check_tensor("text", text, (batch, width), like=like, same_dtype=True)
    keys = _check_keys(image, image_keys, text_keys)
    alpha = check_teachers(image, teacher_image, teacher_text, alpha)
    gamma = check_gamma(gamma)
    if ids is None and key_ids is not None:
        raise ValueError("ids: expected the ids of the rows along with key_ids, got None")
    if ids is not None:
        check_tensor("ids", ids, (batch,), dtypes=(torch.int64,), like=like)
        if key_ids is not None:
            check_tensor("key_ids", key_ids, (keys,), dtypes=(torch.int64,), like=like)
        elif image_keys is not None:
            raise ValueError("key_ids: expected the ids of the keys along with ids and image_keys, got None")
    check_integer("row_offset", row_offset, 0, None if ids is not None else keys - batch)
    check_choice("positives", positives, ("mean", "any"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    first_negative, last_negative = _check_negative_range(negative_range, keys)
    seed = check_seed(seed, image, return_stats)
    temperature = as_scalar("temperature", temperature, image, above=0)

    bias = check_loss(loss, bias, positives, alpha, image)
    teachers = [None if alpha is None else teacher.detach() for teacher in (teacher_image, teacher_text)]
    problem = Problem(
        image, text, image_keys, text_keys, temperature, bias, *teachers, ids, key_ids, alpha, seed,
        gamma, positives == "any", row_offset, first_negative, last_negative, impl,
    )  # fmt: skip
    if impl == "reference" or impl is None and _takes_definition(problem, keys):
        with torch.autocast(image.device.type, enabled=False):
            directions = [reference.direction(*direction) for direction in problem.directions()]
            of_rows, *figures = (torch.stack(results) for results in zip(*directions, strict=True))
    elif reduction != "none" and (whole := operators.whole(problem)) is not None:
        result, *figures = whole(problem, 0.5 / batch if reduction == "mean" else 0.5)
        return (result, statistics(*figures)) if return_stats else result
    else:
        of_rows, *figures = operators.focal_itc(problem)
    if reduction == "mean":
        result = of_rows.mean()
    else:
        result = of_rows.mean(0) if reduction == "none" else of_rows.sum() / 2
    return (result, statistics(*figures)) if return_stats else result


def _takes_definition(problem: Problem, keys: int) -> bool:
    """Whether `impl=None` means the definition here: no kernel runs and its (B, M) matrices are small.

    Only where autograd sees through it: the registered operator streams.
    """
    if torch.compiler.is_compiling():
        return False
    rows, matrix = problem.image, len(problem.image) * keys * problem.temperature.element_size()
    run = registry.resolve("focal_itc", None, rows.device, rows.dtype, rows.shape[1], matrix)
    return run.name == "reference" and registry.plain_eager(*problem[: operators.TENSORS])


def statistics(of_rows: Tensor, hard_negative: Tensor) -> FocalITCStats:
    """Averages the rows' statistics of both directions (2, 3, B), and adds the hard negatives (2, B)."""
    means = of_rows.mean(-1)
    return FocalITCStats(*means.T.flatten().unbind(), *hard_negative.unbind())


def check_loss(
    loss: str, bias: float | Tensor | None, positives: str, alpha: Tensor | None, image: Tensor
) -> Tensor | None:
    """The bias as a 0-dim tensor in the `compute_dtype` of the image, None for the softmax."""
    check_choice("loss", loss, ("softmax", "sigmoid"))
    if loss == "softmax":
        if bias is not None:
            raise ValueError("bias: expected None with loss='softmax', which a bias does not change, got one")
        return None
    if positives != "mean":
        raise ValueError(f"positives: expected 'mean' with loss='sigmoid', got {positives!r}")
    if alpha is not None:
        raise ValueError("alpha: expected 0 with loss='sigmoid', which has no soft targets, got another value")
    return as_scalar("bias", 0.0 if bias is None else bias, image)


def _check_keys(image: Tensor, image_keys: Tensor | None, text_keys: Tensor | None) -> int:
    """The number of keys."""
    if (image_keys is None) != (text_keys is None):
        missing, other = ("image_keys", "text_keys") if image_keys is None else ("text_keys", "image_keys")
        raise ValueError(f"{missing}: expected a tensor along with {other} (both or neither), got None")
    if image_keys is None:
        return image.shape[0]
    like = ("image", image)
    check_tensor("image_keys", image_keys, ("M", image.shape[1]), like=like, same_dtype=True)
    if image_keys.shape[0] == 0:
        raise ValueError(f"image_keys: expected at least one key, got size {tuple(image_keys.shape)}")
    check_tensor("text_keys", text_keys, tuple(image_keys.shape), like=like, same_dtype=True)
    return image_keys.shape[0]


def _check_negative_range(negative_range: tuple[int, int] | None, keys: int) -> tuple[int, int]:
    if negative_range is None:
        return 0, keys
    try:
        first, last = negative_range
    except (TypeError, ValueError):
        raise TypeError(f"negative_range: expected a pair of key columns, got {negative_range!r}") from None
    check_integer("negative_range", first, 0, keys)
    check_integer("negative_range", last, first, keys)
    return first, last
