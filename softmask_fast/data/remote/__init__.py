"""Shards by URL: what to download, the downloads, their cache on disk, and the source that reads them."""
