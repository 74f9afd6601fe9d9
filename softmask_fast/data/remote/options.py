"""How shards by URL are kept and mixed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class RemoteOptions:
    """Raises ValueError for values out of range."""

    cache_dir: str | None = None  # default: softmask_fast in $XDG_CACHE_HOME or ~/.cache
    cache_gigabytes: float = 64.0  # of 1e9 bytes, for all ranks of the machine together
    shuffle_shards: int = 8  # shards that a rank mixes; part of the order
    prefetch_shards: int = 2  # downloaded ahead, per rank
    download_tries: int = 5
    download_timeout: float = 60.0  # seconds without data

    def __post_init__(self) -> None:
        for name, least in (("shuffle_shards", 1), ("prefetch_shards", 0), ("download_tries", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("cache_gigabytes", "download_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")

    @classmethod
    def of(cls, data: Any) -> RemoteOptions:
        """From the fields of the same names of `data`, a DataConfig."""
        return cls(**{field.name: getattr(data, field.name) for field in fields(cls)})
