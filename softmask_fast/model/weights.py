"""The weights of a layer as one tuple of tensors, which the functions of layers.py take.

Weights that serve one product are joined: query, key and value, for instance. During a training step the tuples are
held, so that every pass over a layer uses the same ones, and under bfloat16 all of them are cast by one multi-tensor
operator; on the way back each layer's gradients return to its float32 parameters together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ALIGNMENT = 16  # elements between the beginnings of two cast weights are a multiple of this


class Joined(NamedTuple):
    """Parameters that are joined along the first dimension.

    With `holds_key_bias` the middle third is the key bias of self-attention. It adds the same number to all logits of a
    query, which softmax ignores; its gradient would be rounding noise, of which Adam makes steps of full size. So it is
    taken as zero, and its gradient is zero.
    """

    parameters: tuple[nn.Parameter, ...]
    holds_key_bias: bool = False

    def join(self) -> Tensor:
        if self.holds_key_bias:
            query, key, value = self.thirds(*self.parameters)
            return torch.cat([query, key * 0, value])
        return self.parameters[0] if len(self.parameters) == 1 else torch.cat(self.parameters)

    def shape(self) -> torch.Size:
        first = self.parameters[0].shape
        return torch.Size([sum(len(parameter) for parameter in self.parameters), *first[1:]])

    def split(self, joined: Tensor) -> list[Tensor]:
        """Parts of a tensor of the joined size, one for each parameter."""
        if len(self.parameters) == 1:
            return [joined]
        return list(joined.split([len(parameter) for parameter in self.parameters]))

    @staticmethod
    def thirds(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors if len(tensors) == 3 else tensors[0].chunk(3)


class WeightedLayer(nn.Module):
    """A layer that reads its weights as a tuple, within its `forward`, where ZeRO-3 gathers what is read."""

    held: tuple[Tensor, ...] | None = None  # for the length of a step
    frozen: tuple[Tensor, ...] | None = None  # the same without gradients
    compiled = False  # run the functions of layers.py compiled

    def joined(self) -> list[Joined]:
        """What the tuple consists of."""
        raise NotImplementedError

    def weights(self, frozen: bool = False) -> tuple[Tensor, ...]:
        """The weights in the order of `joined`; frozen: no gradient of theirs will be asked for."""
        if self.held is None:
            return tuple(part.join() for part in self.joined())
        if not (frozen and self.compiled):  # autograd leaves out what nobody asks for; a compiled region does not
            return self.held
        if self.frozen is None:
            self.frozen = tuple(weight.detach() for weight in self.held)
        return self.frozen


def weighted_layers(network: nn.Module) -> list[WeightedLayer]:
    return [layer for layer in network.modules() if isinstance(layer, WeightedLayer)]


def run_layer(layer: nn.Module, *arguments: Any, checkpointing: bool) -> Any:
    """A layer's output; with checkpointing the backward pass recomputes its intermediates, with the same weights and
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
    """Holds the weights of all layers of a network while a step runs; not under ZeRO-3, which gathers them in turn."""

    def __init__(self, network: nn.Module):
        self.layers = weighted_layers(network)
        self.parts = [layer.joined() for layer in self.layers]
        self.shapes = [part.shape() for parts in self.parts for part in parts]
        self.sizes = [-(-shape.numel() // ALIGNMENT) * ALIGNMENT for shape in self.shapes]
        self.sharded = any(hasattr(parameter, "ds_id") for parameter in network.parameters())

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the network collects its own."""

    @contextmanager
    def hold(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """The layers' weights, in this dtype, are the same tensors until the end of the context."""
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
    """The beginning of a vector in another shape."""
    if len(memory) != shape.numel():
        memory = memory[: shape.numel()]
    return memory if len(shape) == 1 else memory.view(shape)


class _Cast(torch.autograd.Function):
    """Copies of a layer's parameters that are already there, with the gradient of a cast."""

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
