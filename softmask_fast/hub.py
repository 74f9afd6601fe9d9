"""Where a model is: a folder, "demo", or a name on the Hugging Face hub. Imports nothing heavy, to answer at once.

What is in the hub's cache is used without a request. Otherwise the hub is asked once whether it has the name, before
any library starts a download with its own retries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar
from unittest import mock

from softmask_fast.errors import UsageError, one_line

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

Loaded = TypeVar("Loaded")

DEMO = Path(__file__).parent / "demo"  # the model folder that is called "demo"
TIMEOUT = 3  # seconds for each phase of the request: connecting, the first byte
LIMIT = 10  # seconds for all of it, name servers included
SAFE = ["*.safetensors"]
PICKLED = ["*.bin", "*.pth", "*.pt"]  # weights that are not fetched if there are .safetensors
ABSENT, PARTIAL = "is neither a folder nor in the cache", "is not a folder, and the cache holds only a part of it"
NEEDED = ["*config*.json", "*token*", "*vocab*", "merges.txt", "*.model", "*template*"]  # besides weights
UNWANTED = ["*.msgpack", "*.h5", "*.ot", "*.onnx", "onnx/*", "*.gguf", "original/*"]


def local_folder(name: str | Path) -> Path | None:
    """The folder with that name, or None. "demo" is the model in the package, unless there is a folder with that
    name."""
    if Path(name).is_dir():
        return Path(name)
    return DEMO if str(name) == DEMO.name else None


def model_folder(
    name: str | Path, option: str = "--model", parts: Sequence[str] = (), also: Sequence[str] = (), **where: Any
) -> Path:
    """The folder of a model: the one that is named, the demo's, or that of the hub's cache, filled if necessary.

    Args:
        name: a folder, "demo", or a name on the hub.
        option: what messages call the name.
        parts: the files and folders to fetch; default: all but the weights of other frameworks.
        also: files and folders to fetch if they exist.
        where: options of `huggingface_hub.snapshot_download`: revision, token, cache_dir, force_download,
            local_files_only.

    Raises:
        UsageError: for a name that the hub does not know, or that is not in the cache while the hub cannot be reached;
            within seconds.
    """
    if (folder := local_folder(name)) is not None:
        return folder
    name = str(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    found = ABSENT
    try:
        if not where.get("force_download"):
            found = _cached(name, parts, where)
    except HFValidationError as error:
        raise UsageError(f"{option}: expected a folder or a name on the hub, got {name}") from error
    if isinstance(found, Path):
        return found
    instead = f"with a network, `hf download {name} --local-dir DIR`, then {option} DIR"
    if where.get("local_files_only"):
        raise UsageError(f"{option}: {name} {found}; {instead}")
    answer = ask_hub(name, option, instead, where.get("token"), where.get("revision"), found)
    if parts:
        wanted = {"allow_patterns": _below(*parts, *also)}
    else:
        safe = any(file.rfilename.endswith(".safetensors") for file in answer.siblings or ())
        wanted = {"ignore_patterns": UNWANTED + PICKLED * safe}
    try:
        return Path(snapshot_download(name, **wanted, **where))
    except Exception as error:  # the hub's client passes on the errors of its transport
        raise UsageError(f"{option}: {name} cannot be downloaded ({type(error).__name__}); {instead}") from error


def _below(*parts: str) -> list[str]:
    """Patterns of these files, and of what is in these folders."""
    return [pattern for part in parts for pattern in (part, f"{part}/*")]


def _cached(name: str, parts: Sequence[str], where: dict[str, Any]) -> Path | str:
    """The folder in the hub's cache, or why it cannot be used.

    If the cache has the repository's list of files, the client knows what an interrupted download left out.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    found = ABSENT
    for weights in ([],) if parts else (SAFE, PICKLED):
        wanted = _below(*parts) if parts else [*NEEDED, *weights, *(f"{kind}.index.json" for kind in weights)]
        local = {"allow_patterns": wanted, "ignore_patterns": UNWANTED, "local_files_only": True}
        try:
            folder = Path(snapshot_download(name, **where | local))
        except LocalEntryNotFoundError as error:
            found = PARTIAL if hasattr(error, "snapshot_path") else found
            continue
        if all((folder / part).exists() for part in parts) if parts else _is_whole(folder, weights):
            return folder
        found = PARTIAL
    return found


def _is_whole(folder: Path, kinds: Sequence[str]) -> bool:
    """Whether a foreign model has a configuration and weights of these kinds, and all files of those that are split.

    Pickled ones do not count beside an index of others, which libraries prefer.
    """
    weights = [path for pattern in kinds for path in folder.glob(pattern)]
    if kinds is PICKLED and any(folder.glob(f"{SAFE[0]}.index.json")):
        return False
    numbered = {(number[0], int(number[1])) for path in weights if (number := re.search(r"-of-(\d+)\.\w+$", path.name))}
    configured = any((folder / config).exists() for config in ("config.json", "open_clip_config.json"))
    return configured and bool(weights) and all(len([*folder.glob(f"*{end}")]) >= count for end, count in numbered)


def from_hub(name: str, option: str, instead: str, load: Callable[[], Loaded]) -> Loaded:
    """The result of `load`, a call of another library with a folder or a name on the hub.

    `load` first runs without a request. If that fails for a name that the hub has, it runs again with the hub.

    Raises:
        UsageError: as in `ask_hub`, with the first failure if the cache has files of that name. Errors of `load` pass.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        with without_hub():
            return load()
    except Exception as error:  # the libraries raise many kinds of errors for damaged files
        if Path(name).exists():
            raise
        found = ABSENT
        with suppress(HFValidationError):
            if isinstance(try_to_load_from_cache(name, "config.json"), str):
                found = f"is in the cache, but cannot be loaded from there ({one_line(error)})"
        ask_hub(name, option, instead, found=found)
        return load()


def ask_hub(
    name: str, option: str, instead: str, token: str | bool | None = None, revision: str | None = None,
    found: str = ABSENT,
) -> ModelInfo:  # fmt: skip
    """What the hub says about a name, in one request of at most `LIMIT` seconds.

    Args:
        name: of a model.
        option: the option that it came from, for messages.
        instead: what to do if there is no answer, for messages.
        token: of the hub.
        revision: of the model.
        found: what is known without a request, for messages.

    Raises:
        UsageError: if the hub does not know the name or does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    answers: SimpleQueue[ModelInfo | Exception] = SimpleQueue()

    def ask() -> None:
        try:
            answers.put(HfApi(token=token).model_info(name, revision=revision, timeout=TIMEOUT))
        except Exception as error:  # the hub's client passes on the errors of its transport
            answers.put(error)

    Thread(target=ask, daemon=True).start()  # a name server may be silent for minutes, whatever the timeout
    try:
        answer = answers.get(timeout=LIMIT)
    except Empty:
        answer = TimeoutError()
    if not isinstance(answer, Exception):
        return answer
    if isinstance(answer, HFValidationError):
        reason = f"{name} is neither a folder nor a possible name on the hub"
    elif isinstance(answer, RevisionNotFoundError):
        reason = f"{name} has no revision {revision!r} on the hub"
    elif isinstance(answer, GatedRepoError):
        reason = f"{name} is gated: accept its terms on the hub, then `hf auth login`"
    elif isinstance(answer, RepositoryNotFoundError):
        reason = f"no folder and no public model on the hub is called {name}"
    elif isinstance(answer, OfflineModeIsEnabled):
        reason = f"{name} {found}, and HF_HUB_OFFLINE is set"
    else:
        reason = f"{name} {found}, and the hub cannot be reached ({type(answer).__name__})"
    raise UsageError(f"{option}: {reason}; {instead}") from answer


@contextmanager
def without_hub() -> Iterator[None]:
    """A context in which the hub's client uses only its cache, so that a folder's files cause no request."""
    from huggingface_hub import constants

    with mock.patch.object(constants, "HF_HUB_OFFLINE", True):
        yield
