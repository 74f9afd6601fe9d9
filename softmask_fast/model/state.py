"""The tensors of a module, in memory and as safetensors."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from softmask_fast.errors import UsageError, one_line
from softmask_fast.utils import replacing

# Prefixes in older files -> those of today's modules.
_RENAMED = {"contrast.": "queue."}  # the teacher's queue once belonged to its loss
NAMED = 8  # tensors in a message


def save_state(state: dict[str, Tensor], path: str | Path) -> None:
    """Writes tensors as safetensors, atomically."""
    with replacing(Path(path)) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, temporary)


def read_checkpoint(path: str | Path, option: str) -> dict[str, Tensor]:
    """The tensors of a .pth file that holds a state dict, alone or under "model". None of the file's code runs.

    The file is memory-mapped if its format allows it.

    Args:
        path: of the file.
        option: the option that it came from, for messages.

    Raises:
        UsageError: for any other content.
    """
    try:
        mapped = zipfile.is_zipfile(path)
        if mapped:
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > Path(path).stat().st_size:
                    raise UsageError(f"{option}: {path} cannot be read as tensors: expected them uncompressed")
        with warnings.catch_warnings():  # about bytes that are not a checkpoint
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UsageError:
        raise
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise UsageError(f"{option}: {path} cannot be read as tensors: {one_line(error)}") from error
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise UsageError(f"{option}: expected a state dict, alone or under 'model', in {path}")
    return state


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters and persistent buffers. Shared ones appear once, as safetensors stores each tensor
    once."""
    names = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    return {name: tensor for name, tensor in module.state_dict().items() if name in names}


def load_own_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """The inverse of `own_state`. It also knows the names of older files.

    Raises:
        UsageError: if a tensor is missing, unexpected, or of another size or kind.
    """
    mine = own_state(module)
    for old, new in _RENAMED.items():
        renamed = {name: name.replace(old, new, 1) for name in state if name.startswith(old)}
        state = {renamed.get(name, name): tensor for name, tensor in state.items()}
    wrong = [f"{name} is missing" for name in sorted(mine.keys() - state.keys())]
    wrong += [f"{name} is unexpected" for name in sorted(state.keys() - mine.keys())]
    for name in sorted(mine.keys() & state.keys()):
        found, expected = state[name], mine[name]
        if found.shape != expected.shape:
            wrong.append(f"{name} has size {tuple(found.shape)}, expected {tuple(expected.shape)}")
        elif found.is_floating_point() != expected.is_floating_point():
            wrong.append(f"{name} has dtype {found.dtype}, expected {expected.dtype}")
    if wrong:
        more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise UsageError(f"weights: {'; '.join(wrong[:NAMED])}{more}")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(state[name])
