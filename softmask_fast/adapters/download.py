"""Where a model lies: a folder, or a name on the Hugging Face hub. Imports nothing heavy, to answer at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from softmask_fast.errors import UsageError

TIMEOUT = 3  # seconds for the hub's first answer


def model_folder(name: str | Path) -> Path:
    """The folder itself, or that of the hub's cache, filled if need be.

    Raises:
        UsageError: for a name that the hub does not know; within seconds, if it is not in the cache and the hub cannot
            be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    name = str(name)
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    unwanted = ["*.msgpack", "*.h5", "*.ot", "*.onnx", "onnx/*", "*.gguf", "original/*"]
    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        if (cached / "config.json").is_file() or (cached / "open_clip_config.json").is_file():
            return cached
    except HFValidationError as error:
        raise UsageError(f"--model: expected a folder or a name on the hub, got {name}") from error
    except LocalEntryNotFoundError:
        pass
    try:
        files = [file.rfilename for file in HfApi().model_info(name, timeout=TIMEOUT).siblings]
        if any(file.endswith(".safetensors") for file in files):
            unwanted += ["*.bin", "*.pth", "*.pt"]
        return Path(snapshot_download(name, ignore_patterns=unwanted))
    except RepositoryNotFoundError as error:
        raise UsageError(f"--model: no folder and no public model on the hub is called {name}") from error
    except Exception as error:  # the hub's client raises those of its transport, whichever that is
        raise UsageError(
            f"--model: {name} is no folder and not in the cache, and the hub cannot be reached "
            f"({type(error).__name__}); with a network, `hf download {name} --local-dir DIR`, then --model DIR"
        ) from error


@contextmanager
def without_hub() -> Iterator[None]:
    """Inside the `with` block the hub's client serves from its cache alone: a folder's files make no request."""
    from huggingface_hub import constants

    with mock.patch.object(constants, "HF_HUB_OFFLINE", True):
        yield
