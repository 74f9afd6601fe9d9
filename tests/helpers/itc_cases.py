"""Inputs of focal_itc_loss, and fixtures: each implementation that streams, in tiles that divide nothing."""

import pytest
import torch
import torch.nn.functional as F
from compare import DEVICES

from softmask_fast.ops import registry
from softmask_fast.ops.focal_itc import cpp, streamed


def device_of(impl):
    """The GPU, where there is one, for the implementation that is made for it."""
    return DEVICES[-1] if impl == "triton" else DEVICES[0]


# those that stream, where they run here
IMPLEMENTATIONS = [
    name for name in ("cpp", "streamed", "triton") if name in registry.runnable("focal_itc", device_of(name))
]


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request):
    return request.param


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles that divide nothing, so that every test crosses their borders."""
    for module in (cpp, streamed):
        monkeypatch.setattr(module, "TILE_ROWS", 16)
        monkeypatch.setattr(module, "TILE_KEYS", 24)


def inputs(batch, keys, width, dtype, scale=1.0, device="cpu"):
    """image, text, image_keys, text_keys, teacher_image, teacher_text; texts partly agree with their images."""
    generator = torch.Generator().manual_seed(batch + keys)

    def draw(rows):
        return torch.randn(rows, width, generator=generator, dtype=torch.float64)

    image, image_keys, text_keys = draw(batch), draw(keys), draw(keys)
    text = image + draw(batch)
    image_keys[:batch], text_keys[:batch] = image + 0.5 * draw(batch), text + 0.5 * draw(batch)
    teachers = image_keys[:batch].clone(), text_keys[:batch].clone()
    unit = (F.normalize(tensor, dim=1) for tensor in (image, text, image_keys, text_keys, *teachers))
    return [(tensor * scale).to(device, dtype) for tensor in unit]
