"""Keyed randomness: the same names, such as (seed, epoch, key), give the same numbers in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np


def keyed_generator(*names: str | int) -> np.random.Generator:
    """A counter-based (Philox) generator. Its stream depends only on `names`, such as (seed, epoch, key, "crop")."""
    digest = hashlib.blake2b(_encode("\0".join(map(str, names))), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, np.uint64)))


def hash_names(names: Iterable[str]) -> np.ndarray:
    """(n,) uint64: one 64-bit hash per name."""
    return np.frombuffer(b"".join(hashlib.blake2b(_encode(n), digest_size=8).digest() for n in names), np.uint64)


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")  # file names may hold bytes that are not text


def image_ids(names: Iterable[str]) -> np.ndarray:
    """(n,) int64, non-negative: image identities from names; equal names are equal images."""
    return (hash_names(names) >> np.uint64(1)).astype(np.int64)


def visiting_order(hashes: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """(n,) int64: the indices of the (n,) uint64 hashes, sorted by a hash of (seed, epoch, sample).

    Removing a sample does not change the order of the others. Vectorized: four million samples take a second.
    """
    salt = keyed_generator(seed, epoch, "order").integers(0, 2**64, dtype=np.uint64)
    return np.argsort(splitmix64(hashes ^ salt), kind="stable")


def splitmix64(values: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: a bijection of uint64 whose output bits depend on all input bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
