"""The tensors of a module, in memory and as safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from softmask_fast.errors import UsageError
from softmask_fast.utils import replacing

# Prefixes in older files -> those of today's modules.
_RENAMED = {"contrast.": "queue."}  # the teacher's queue once belonged to its loss


def save_state(state: dict[str, Tensor], path: str | Path) -> None:
    """Writes tensors as safetensors, atomically."""
    with replacing(Path(path)) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, temporary)


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters and persistent buffers, shared ones once (safetensors stores each tensor once)."""
    names = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    return {name: tensor for name, tensor in module.state_dict().items() if name in names}


def load_own_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """The inverse of `own_state`, also for names of older files.

    Raises UsageError if a tensor is missing, unexpected, or of another size.
    """
    mine = own_state(module)
    for old, new in _RENAMED.items():
        renamed = {name: name.replace(old, new, 1) for name in state if name.startswith(old)}
        state = {renamed.get(name, name): tensor for name, tensor in state.items()}
    missing, unexpected = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
    sizes = [
        f"{name} has size {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in mine.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if missing or unexpected or sizes:
        raise UsageError(f"weights: missing {missing}, unexpected {unexpected}, {'; '.join(sizes) or 'sizes agree'}")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(state[name])
