"""How shards by URL are downloaded, cached and mixed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from softmask_fast.errors import UsageError


@dataclass(frozen=True)
class RemoteOptions:
    """The options of shards by URL. Raises UsageError for values out of range."""

    cache_dir: str | None = None  # default: softmask_fast in $XDG_CACHE_HOME or ~/.cache
    cache_gigabytes: float = 64.0  # in 1e9 bytes, for all ranks of a machine together
    shuffle_shards: int = 8  # shards that a rank mixes; determines the order
    prefetch_shards: int = 2  # downloaded ahead by each rank
    download_tries: int = 5
    download_timeout: float = 60.0  # seconds without data

    def __post_init__(self) -> None:
        for name, least in (("shuffle_shards", 1), ("prefetch_shards", 0), ("download_tries", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("cache_gigabytes", "download_timeout"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}: expected a number above 0, got {getattr(self, name)}")

    @classmethod
    def of(cls, options: Any) -> RemoteOptions:
        """From the fields of `options` with the same names."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})
