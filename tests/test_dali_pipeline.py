"""The pipeline: every operation against its definition, neutral values change nothing, samples are independent."""

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import encode

from softmask_fast.data.augment import NEUTRAL, AugmentConfig, draw_parameters, pack
from softmask_fast.data.dali_pipeline import DaliPipeline
from softmask_fast.data.images import MEAN, STD
from softmask_fast.data.seeding import keyed_generator
from softmask_fast.data.synthetic import ShapesSource

SIZE = 32
IMAGE = ShapesSource(num=1, image_size=SIZE).read(0).image
AUGMENT = AugmentConfig()


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """(B, H, W, 3) uint8 again."""
    raw = pixels.cpu() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return (raw * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def run(images, parameters, config=AUGMENT, batch_size=None, device="cpu", threads=1):
    pipeline = DaliPipeline(
        image_size=SIZE,
        batch_size=batch_size or len(images),
        encoded=isinstance(images[0], bytes),
        arguments=config.arguments(),
        device=device,
        num_threads=threads,
    )
    pipeline.schedule(images, pack(parameters, config.arguments()))
    return pipeline.result()


def one(device, **changed) -> np.ndarray:
    values = {name: np.array(value, NEUTRAL[name].dtype) for name, value in changed.items()}
    return to_bytes(run([IMAGE], [NEUTRAL | values], device=device))[0].astype(int)


def test_neutral_arguments_change_nothing(device):
    assert (one(device) == IMAGE).all()


def test_operators_do_what_they_are_called(device):
    image = IMAGE.astype(int)
    assert (one(device, mirror=1) == image[:, ::-1]).all()
    low, high = image.min(axis=(0, 1)), image.max(axis=(0, 1))
    assert np.abs(one(device, autocontrast=True) - (image - low) * 255 / (high - low)).max() <= 1
    assert np.abs(one(device, brightness=0.5) - image * 0.5).max() <= 1
    assert np.abs(one(device, contrast=0.5) - (image * 0.5 + 64)).max() <= 1
    gray = one(device, saturation=0)
    assert np.abs(gray[..., 0] - gray[..., 2]).max() <= 3
    turned = one(device, matrix=[[-1, 0, SIZE], [0, -1, SIZE]])
    assert (turned == image[::-1, ::-1]).all()
    shifted = one(device, matrix=[[1, 0, 3], [0, 1, 0]])
    assert (shifted[:, :-3] == image[:, 3:]).all()
    crop = one(device, roi_start=[0.25, 0.5], roi_end=[0.75, 1.0])
    pil = Image.fromarray(IMAGE).resize((SIZE, SIZE), Image.BICUBIC, box=(16, 8, 32, 24))
    assert np.abs(crop - np.asarray(pil)).mean() < 3  # both are bicubic, PIL with another coefficient
    assert np.abs(one(device, blur=1.5)[8:-8, 8:-8].std()) < image[8:-8, 8:-8].std()
    edges = [np.abs(np.diff(one(device, sharpness=factor), axis=0)).mean() for factor in (0.1, 1, 1.9)]
    assert edges[0] < edges[1] < edges[2]
    equal = one(device, equalize=True)
    for channel in range(3):  # order is kept, and the range is used
        pairs = sorted(zip(image[..., channel].ravel(), equal[..., channel].ravel(), strict=True))
        assert (np.diff([after for _, after in pairs]) >= 0).all()
    assert equal.max() == 255


def test_a_flat_channel_survives_autocontrast(device):
    flat = np.full((SIZE, SIZE, 3), 90, np.uint8)
    values = NEUTRAL | {"autocontrast": np.array(True)}
    assert (to_bytes(run([flat], [values], device=device)) == 90).all()


@pytest.mark.parametrize("encoded", [False, True])
def test_a_sample_depends_on_itself_alone(encoded, device):
    source = ShapesSource(num=12, image_size=40)
    images = [encode(source.read(i).image) if encoded else source.read(i).image for i in range(12)]
    parameters = [draw_parameters(AUGMENT, keyed_generator(0, i), 40, 40, SIZE) for i in range(12)]
    together = run(images, parameters, device=device)
    shuffled = run(images[::-1], parameters[::-1], batch_size=20, device=device, threads=2)
    alone = torch.cat([run([image], [values], device=device) for image, values in zip(images, parameters, strict=True)])
    assert torch.equal(together, shuffled.flip(0)) and torch.equal(together, alone)
    assert not torch.equal(together[0], together[1])


def test_a_wrong_device_is_named():
    with pytest.raises(ValueError, match="device"):
        DaliPipeline(image_size=SIZE, batch_size=1, encoded=False, device="meta")
