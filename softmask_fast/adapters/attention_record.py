"""One attention layer of a forward pass, recorded, and the word maps that follow from it.

A layer is recorded where transformers hands queries, keys and values to the attention function (the attention
interface), whichever function that is, and its output becomes a leaf of the graph. A map then only needs
the word's rows: their log-sum-exp over all keys, and the keys and values of the image.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from softmask_fast.adapters.scores import output_gradient
from softmask_fast.errors import UsageError
from softmask_fast.ops import word_gradcam
from softmask_fast.ops.checks import compute_dtype

MASKED = -1e4  # additive masks have at most this value at hidden keys
# Arguments of attention functions, other than the mask, that change what a row attends to.
REFUSED = (("s_aux", "attention sinks"), ("position_bias", "a position bias"), ("cu_seq_lens_q", "packed sequences"))
_KEEPERS: dict[int, Callable] = {}  # of the modules that are observed, by their id
_LAYERS: list[nn.Module] = []  # whose lower part has no graph
_LOCK = threading.Lock()
LOGITS = 1 << 22  # logits at a time, in one key head: bounds the memory of maps, whatever the number of words


@dataclass
class AttentionRecord:
    """What one attention layer computed: query (B, H, L, D), key and value (B, Hk, N, D), output (B, L, H, D) or
    (B, L, C) with a graph from it to the model's outputs."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    scale: float
    mask: Any = None  # (B, 1, L, N) bool or additive, (B, N) of padding, a flex BlockMask, or None
    causal: bool = False  # without a mask, and with one of padding
    aligned: str = "start"  # a causal row i sees key i and earlier ("start"), or key i + N - L and earlier ("end")
    window: int | None = None  # keys that a causal row sees, where the mask does not say so
    soft_cap: float | None = None
    projection: Tensor | None = None  # (C', H * D), where the output is that of the projection after the attention

    def gradient(self, score: Tensor) -> Tensor:
        """d score / d output as (B, H, L, D); raises UsageError for a score that does not depend on the layer."""
        gradient = output_gradient(score, self.output)
        if self.projection is not None:
            gradient = gradient @ self.projection.to(gradient.dtype)
        return gradient.reshape(*gradient.shape[:2], self.query.shape[1], -1).transpose(1, 2)

    def visible(self, rows: Tensor) -> Tensor:
        """The keys that some rows (B, W) attend to: (B, W, N) bool."""
        batch, tokens = self.key.shape[0], self.key.shape[2]
        keys = torch.arange(tokens, device=rows.device)
        row = rows[..., None]
        if hasattr(self.mask, "mask_mod"):
            image, head = torch.arange(batch, device=rows.device)[:, None, None], torch.zeros_like(row)
            return self.mask.mask_mod(image, head, row, keys).expand(batch, rows.shape[1], tokens)
        if isinstance(self.mask, Tensor) and self.mask.ndim == 4:
            chosen = self.mask.expand(batch, -1, -1, -1)[..., :tokens]
            at = rows if chosen.shape[2] > 1 else torch.zeros_like(rows)
            chosen = chosen[torch.arange(batch, device=rows.device)[:, None], :, at]  # (B, W, heads or 1, N)
            seen = chosen if chosen.dtype == torch.bool else chosen == 0
            hidden = ~chosen if chosen.dtype == torch.bool else chosen <= MASKED
            if not (seen | hidden).all() or not (seen == seen[:, :, :1]).all():
                raise UsageError(
                    "attention_mask: expected the same hidden tokens for all heads, got a bias of positions or heads"
                )
            return seen[:, :, 0]
        seen = torch.ones(batch, rows.shape[1], tokens, dtype=torch.bool, device=rows.device)
        if self.causal:
            last = row if self.aligned == "start" else row + tokens - self.query.shape[2]
            seen = seen & (keys <= last)
            if self.window is not None:
                seen = seen & (keys > last - self.window)
        if self.mask is not None:
            seen = seen & self.mask[:, None, :tokens].bool()
        return seen

    def maps(self, gradient: Tensor, rows: Tensor, columns: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
        """Grad-CAM of some rows over some keys: the mean over heads of A * relu(dS/dA).

        Args:
            gradient: (B, H, L, D), of `gradient`.
            rows: (B, W) int64.
            columns, exists: (B, N') int64 and bool, the keys, and which of them are no padding.

        Returns:
            (B, W, N') float32 (float64 for a float64 model), 0 at keys that are hidden or padding; and (B, W) bool, the
            rows that see any of the keys.
        """
        with torch.no_grad(), torch.autocast(self.key.device.type, enabled=False):
            return self._maps(gradient, rows, columns, exists)

    def _maps(self, gradient: Tensor, rows: Tensor, columns: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
        batch, heads = gradient.shape[:2]
        dtype = functools.reduce(torch.promote_types, (self.key.dtype, self.value.dtype, gradient.dtype))
        query, key = self.query.expand(batch, -1, -1, -1).to(dtype), self.key.to(dtype)
        image_key, image_value = take(key, columns), take(self.value.to(dtype), columns)
        step = max(1, LOGITS // max(1, batch * heads // key.shape[1] * key.shape[2]))
        maps, sees = [], []
        for chunk in rows.split(step, dim=1):
            seen = self.visible(chunk)
            words = take(query, chunk)
            cam = word_gradcam(
                words, image_key, image_value, take(gradient.to(dtype), chunk),
                log_sum_exp=row_log_sum_exp(words, key, seen, self.scale, self.soft_cap),
                soft_cap=self.soft_cap, scale=self.scale,
            )  # fmt: skip
            shown = seen.gather(2, columns[:, None].expand(-1, chunk.shape[1], -1)) & exists[:, None]
            maps.append(cam.masked_fill_(~shown, 0.0))
            sees.append(shown.any(2))
        return torch.cat(maps, 1), torch.cat(sees, 1)


def row_log_sum_exp(query: Tensor, key: Tensor, visible: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """query (B, H, W, D), key (B, Hk, N, D), visible (B, W, N) bool -> (B, H, W), 0 for a row that sees nothing."""
    dtype, groups = compute_dtype(query.dtype), query.shape[1] // key.shape[1]
    parts = []
    for number in range(key.shape[1]):  # one key head at a time
        rows = query[:, number * groups : (number + 1) * groups].to(dtype)
        logits = rows @ key[:, number, None].to(dtype).mT * scale
        if soft_cap is not None:
            logits = soft_cap * (logits / soft_cap).tanh()
        parts.append(logits.masked_fill_(~visible[:, None], float("-inf")).logsumexp(-1))
    lse = torch.cat(parts, 1)
    return lse.masked_fill(lse == float("-inf"), 0.0)


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """(B, H, T, D) at index (B, W) -> (B, H, W, D); a view where all samples have the same run of tokens."""
    first = int(index[0, 0]) if index.numel() else 0
    run = torch.arange(first, first + index.shape[1], device=index.device)
    if torch.equal(index, run.expand_as(index)):
        return tensor[:, :, first : first + index.shape[1]]
    return tensor.gather(2, index[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def cut(output: Tensor) -> Tensor:
    """The layer's output as a leaf, so that the graph starts here. If the graph has started below, the output is part
    of it and stays as it is."""
    if output.requires_grad:
        return output
    torch.set_grad_enabled(True)
    return output.detach().requires_grad_()


@contextmanager
def observed_attention(
    modules: Collection[nn.Module], keep: Callable[[nn.Module, AttentionRecord], None]
) -> Iterator[None]:
    """Within the block, `keep` gets a record of every call of the attention interface of transformers by `modules`.

    The name of the model's attention does not change, as masks depend on it. Only what the interface returns is
    wrapped, once for all open blocks, including those of other threads.
    """
    if not modules:
        yield
        return
    from transformers.modeling_utils import AttentionInterface

    with _LOCK:
        before = {id(module): _KEEPERS.get(id(module)) for module in modules}
        if not _KEEPERS:
            AttentionInterface.get_interface = _observed(AttentionInterface.get_interface)
        _KEEPERS.update(dict.fromkeys(before, keep))
    try:
        yield
    finally:
        with _LOCK:
            for module, outer in before.items():
                del _KEEPERS[module]
                if outer is not None:
                    _KEEPERS[module] = outer
            if not _KEEPERS:
                AttentionInterface.get_interface = AttentionInterface.get_interface.__wrapped__


def _observed(get_interface: Callable) -> Callable:
    """The interface's lookup. Its attention functions record the modules that a block observes."""

    @functools.wraps(get_interface)
    def lookup(self: Any, implementation: str, default: Callable) -> Callable:
        attend = get_interface(self, implementation, default)

        @functools.wraps(attend)
        def recorded(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple:
            outputs = attend(module, query, key, value, *args, **kwargs)
            keep = _KEEPERS.get(id(module))
            if keep is None:
                return outputs
            for name, what in REFUSED:
                if kwargs.get(name) is not None:
                    raise UsageError(f"model: expected attention without {what}, got {type(module).__name__} with it")
            output = cut(outputs[0])
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            flash = "flash" in (implementation or "")
            scale = kwargs.get("scaling")
            record = AttentionRecord(
                query.detach(), key.detach(), value.detach(), output,
                scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
                mask=args[0] if args else kwargs.get("attention_mask"),
                causal=bool(causal) and implementation != "eager" and (flash or query.shape[2] > 1),
                aligned="end" if flash else "start", window=kwargs.get("sliding_window") if flash else None,
                soft_cap=kwargs.get("softcap"),
            )  # fmt: skip
            keep(module, record)
            return output, *outputs[1:]

        return recorded

    return lookup


def _arguments(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict[str, Any]:
    """A call's arguments by name."""
    bound = dict(signature.bind_partial(*args, **kwargs).arguments)
    return bound | bound.pop("kwargs", {})


@contextmanager
def lower_part_without_graph(model: nn.Module, layer: nn.Module, *others: nn.Module) -> Iterator[None]:
    """Within the block what runs before a layer has no graph, whichever method of the model or of a part of it runs.

    These are the modules that contain the layer, until it runs; modules next to them whose inputs have no graph, as
    they do not read the layer's output; and `others`. From the layer on there is a graph, until the next pass. A graph
    that starts at another layer, which another block observes, is kept.
    """
    place = next((name for name, module in model.named_modules() if module is layer), "").split(".")[:-1]
    holders = [model.get_submodule(".".join(place[:depth])) for depth in range(len(place) + 1)]
    never, modes = {*holders, *others}, []

    def start(module: nn.Module, args: tuple, kwargs: dict) -> None:
        modes.append(torch.is_grad_enabled())
        inputs = tree_leaves((args, kwargs))
        alone = all(other is layer for other in _LAYERS)
        if module in never and alone or not any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            torch.set_grad_enabled(False)

    def end(*_: Any) -> None:
        torch.set_grad_enabled(modes.pop() or torch.is_grad_enabled())

    watched = dict.fromkeys([*never, *(child for holder in holders for child in holder.children())])
    watched.pop(layer, None)
    with ExitStack() as stack:
        _LAYERS.append(layer)
        stack.callback(_LAYERS.remove, layer)
        for module in watched:
            stack.callback(module.register_forward_pre_hook(start, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(end, always_call=True).remove)
        yield


@contextmanager
def observed_model(
    model: nn.Module, cam: Any, modules: Sequence[nn.Module], layer: nn.Module | None = None, *others: nn.Module
) -> Iterator[Any]:
    """Within the block the model and `others` run without a graph up to a layer, by default the first of the modules.
    `cam` gets the model's inputs and outputs, and through `cam.keep` what the modules compute."""

    signature = inspect.signature(model.forward)

    def start(_: nn.Module, args: tuple, kwargs: dict) -> None:
        cam.passes = cam.passes + 1 if kwargs.get("past_key_values") is not None else 1
        cam.inputs, cam.outputs, cam.record = _arguments(signature, args, kwargs), None, None

    def end(_: nn.Module, args: tuple, outputs: Any) -> None:
        cam.outputs = outputs
        if cam.record is None and modules:
            raise UsageError(
                f"model: expected attention by transformers' attention interface, got {type(model).__name__}, whose "
                f"{type(modules[-1]).__name__} does not run by it, or did not run"
            )

    grad_enabled = torch.is_grad_enabled()
    with ExitStack() as stack:
        stack.callback(torch.set_grad_enabled, grad_enabled)
        stack.enter_context(observed_attention(modules, cam.keep))
        for handle in (model.register_forward_pre_hook(start, with_kwargs=True), model.register_forward_hook(end)):
            stack.callback(handle.remove)
        stack.enter_context(lower_part_without_graph(model, layer or modules[0], *others))
        yield cam
