"""Shards by URL: options, downloads, the cache on disk, and the source that reads them."""
