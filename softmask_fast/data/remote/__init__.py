"""Shards by URL: options, downloads, their cache on disk, and the source that reads them."""
