"""Samples by name, good ones and ones that are bad in different ways: what `write_shard` takes."""

import numpy as np
from shard_files import encode, scene_files

from softmask_fast.data.synthetic import ShapesSource

SHAPES = ShapesSource(num=40, image_size=24)
GOOD = {f"{i:03d}": scene_files(i, 24) for i in range(188)}
JPEG = GOOD["000"]["jpg"]
CAPTION = GOOD["000"]["json"]
BAD = {
    "empty": {"jpg": b"", "json": CAPTION},
    "truncated": {"jpg": JPEG[: len(JPEG) // 2], "json": CAPTION},
    "text": {"jpg": b"<html>not found</html>", "json": CAPTION},
    "gif": {"jpg": encode(SHAPES.read(0).image, "GIF"), "json": CAPTION},
    "gif2": {"gif": encode(SHAPES.read(0).image, "GIF"), "json": CAPTION},
    "huge": {"jpg": encode(np.zeros((120, 120, 3), np.uint8)), "json": CAPTION},
    "no-image": {"json": CAPTION},
    "no-caption": {"jpg": JPEG},
    "bad-json": {"jpg": JPEG, "json": b"{oops"},
    "no-captions": {"jpg": JPEG, "json": b'{"captions": []}'},
    "blank": {"jpg": JPEG, "json": b'{"captions": ["", " ... "]}'},
    "latin": {"jpg": JPEG, "txt": "caf\xe9".encode("latin-1")},
}
