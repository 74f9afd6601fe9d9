"""The weights of a layer as one tuple of tensors, which the functions of layers.py take.

Weights of one matrix product are joined: query, key and value, for instance. During a training step the tuples are
held, so that every pass over a layer uses the same ones. Under bfloat16 one multi-tensor operator casts all of them; in
the backward pass each layer's gradients return to its float32 parameters together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ALIGNMENT = 16  # cast weights start at multiples of this many elements


class Joined(NamedTuple):
    """Parameters that are joined along the first dimension.

    With `holds_key_bias` the middle third is the key bias of self-attention. It adds the same number to all logits of a
    query, which softmax ignores. Its gradient would be rounding noise, which Adam turns into steps of full size. So
    both the bias and its gradient are taken as zero.
    """

    parameters: tuple[nn.Parameter, ...]
    holds_key_bias: bool = False

    def join(self) -> Tensor:
        """The joined tensor."""
        if self.holds_key_bias:
            query, key, value = self.thirds(*self.parameters)
            return torch.cat([query, key * 0, value])
        return self.parameters[0] if len(self.parameters) == 1 else torch.cat(self.parameters)

    def shape(self) -> torch.Size:
        """The shape of the joined tensor."""
        first = self.parameters[0].shape
        return torch.Size([sum(len(parameter) for parameter in self.parameters), *first[1:]])

    def split(self, joined: Tensor) -> list[Tensor]:
        """The parts of a joined tensor, one per parameter."""
        if len(self.parameters) == 1:
            return [joined]
        return list(joined.split([len(parameter) for parameter in self.parameters]))

    @staticmethod
    def thirds(*tensors: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, from three tensors or one that joins them."""
        return tensors if len(tensors) == 3 else tensors[0].chunk(3)


class WeightedLayer(nn.Module):
    """A layer that reads its weights as a tuple. It does so within `forward`, where ZeRO-3 gathers them."""

    held: tuple[Tensor, ...] | None = None  # for the length of a step
    frozen: tuple[Tensor, ...] | None = None  # the same, without gradients
    compiled = False  # whether the functions of layers.py run compiled

    def joined(self) -> list[Joined]:
        """The parts of the tuple."""
        raise NotImplementedError

    def weights(self, frozen: bool = False) -> tuple[Tensor, ...]:
        """The weights in the order of `joined`. Pass `frozen` if their gradients will not be needed."""
        if self.held is None:
            return tuple(part.join() for part in self.joined())
        if not (frozen and self.compiled):  # autograd skips gradients that nobody needs; a compiled region does not
            return self.held
        if self.frozen is None:
            self.frozen = tuple(weight.detach() for weight in self.held)
        return self.frozen


def weighted_layers(network: nn.Module) -> list[WeightedLayer]:
    """The layers of a network that read their weights as tuples."""
    return [layer for layer in network.modules() if isinstance(layer, WeightedLayer)]


def run_layer(layer: nn.Module, *arguments: Any, checkpointing: bool) -> Any:
    """A layer's output. With checkpointing the backward pass recomputes its intermediates, with the same weights and
    dropout."""
    if not (checkpointing and torch.is_grad_enabled()):
        return layer(*arguments)
    held = getattr(layer, "held", None)

    @contextmanager
    def holding() -> Iterator[None]:
        layer.held = held
        try:
            yield
        finally:
            layer.held = None

    contexts = (nullcontext(), nullcontext() if held is None else holding())
    return checkpoint(layer, *arguments, use_reentrant=False, context_fn=lambda: contexts)


class HeldWeights:
    """Holds the weights of all layers of a network during a step. Under ZeRO-3, which gathers them layer by layer, it
    does nothing."""

    def __init__(self, network: nn.Module) -> None:
        self.layers = weighted_layers(network)
        self.parts = [layer.joined() for layer in self.layers]
        self.shapes = [part.shape() for parts in self.parts for part in parts]
        self.sizes = [-(-shape.numel() // ALIGNMENT) * ALIGNMENT for shape in self.shapes]
        self.sharded = any(hasattr(parameter, "ds_id") for parameter in network.parameters())

    def __deepcopy__(self, memo: dict) -> None:
        """None: a copy of the network makes its own."""

    @contextmanager
    def hold(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """A context in which the layers' weights, in `dtype`, are always the same tensors. None: the parameters'
        dtype."""
        if self.sharded:
            yield
            return
        make = self._join if dtype is None else self._cast
        for layer, weights in zip(self.layers, make(dtype), strict=True):
            layer.held = weights
        try:
            yield
        finally:
            for layer in self.layers:
                layer.held = layer.frozen = None

    def _join(self, _: None) -> Iterator[tuple[Tensor, ...]]:
        return (tuple(part.join() for part in parts) for parts in self.parts)

    def _cast(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
        memory = self.parts[0][0].parameters[0].new_empty(sum(self.sizes), dtype=dtype).split(self.sizes)
        copies = iter([_as(x, shape) for x, shape in zip(memory, self.shapes, strict=True)])
        cast = [[(part, next(copies)) for part in parts] for parts in self.parts]
        targets, sources, zeros = [], [], []
        for part, copy in (pair for layer in cast for pair in layer):
            targets += part.split(copy)
            sources += part.parameters
            if part.holds_key_bias:
                zeros.append(part.thirds(*part.split(copy))[1])
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)
            torch._foreach_zero_(zeros)
        for parts in cast:
            parameters = [parameter for part, _ in parts for parameter in part.parameters]
            if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
                yield _Cast.apply(parts, *parameters)
            else:
                yield tuple(copy for _, copy in parts)


def _as(memory: Tensor, shape: torch.Size) -> Tensor:
    """The beginning of a vector as a tensor of some shape."""
    if len(memory) != shape.numel():
        memory = memory[: shape.numel()]
    return memory if len(shape) == 1 else memory.view(shape)


class _Cast(torch.autograd.Function):
    """Returns copies of a layer's parameters that were already made, with the gradient of a cast."""

    @staticmethod
    def forward(ctx: Any, parts: list[tuple[Joined, Tensor]], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.parts = [part for part, _ in parts]
        ctx.set_materialize_grads(False)
        return tuple(copy for _, copy in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        results, targets, sources, zeros = [None], [], [], []
        for part, gradient in zip(ctx.parts, gradients, strict=True):
            if gradient is None:
                results += [None] * len(part.parameters)
                continue
            own = [torch.empty_like(parameter) for parameter in part.parameters]
            results += own
            targets += own
            sources += part.split(gradient)
            if part.holds_key_bias:
                zeros.append(part.thirds(*own)[1])
        if targets:
            torch._foreach_copy_(targets, sources)
        if zeros:
            torch._foreach_zero_(zeros)
        return tuple(results)
