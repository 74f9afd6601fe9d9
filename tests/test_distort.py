"""The pipeline: every distortion against its definition, neutral values change nothing, samples are independent."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import encode

from softmask_fast.data.augment import GEOMETRIC, NEUTRAL, PHOTOMETRIC, AugmentConfig, draw_parameters
from softmask_fast.data.dali_pipeline import MEAN, STD, DaliPipeline, evaluation_pixels
from softmask_fast.data.seeding import keyed_generator
from softmask_fast.data.synthetic import ShapesSource
from softmask_fast.data.types import BadSample

SIZE = 32
IMAGE = ShapesSource(num=1, image_size=SIZE).read(0).image
EVERYTHING = AugmentConfig(rand_augment_ops=(*GEOMETRIC, *PHOTOMETRIC, "identity"), color_hue=10.0)


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """(B, H, W, 3) uint8 again."""
    raw = pixels.cpu() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return (raw * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def run(images, parameters, config=EVERYTHING, batch_size=None, device="cpu", threads=1):
    pipeline = DaliPipeline(
        image_size=SIZE,
        batch_size=batch_size or len(images),
        encoded=isinstance(images[0], bytes),
        arguments=config.arguments(),
        device=device,
        num_threads=threads,
    )
    pipeline.schedule(images, parameters)
    return pipeline.result()


def one(device, **changed) -> np.ndarray:
    values = {name: np.array(value, NEUTRAL[name].dtype) for name, value in changed.items()}
    return to_bytes(run([IMAGE], [NEUTRAL | values], device=device))[0].astype(int)


def test_neutral_arguments_change_nothing(device):
    assert (one(device) == IMAGE).all()
    assert (to_bytes(evaluation_pixels([IMAGE], SIZE, device=device))[0] == IMAGE).all()


def test_operators_do_what_they_are_called(device):
    image = IMAGE.astype(int)
    assert (one(device, mirror=1) == image[:, ::-1]).all()
    assert (one(device, posterize=0b11110000) == image & 0b11110000).all()
    assert (one(device, solarize=128) == np.where(image >= 128, 255 - image, image)).all()
    low, high = image.min(axis=(0, 1)), image.max(axis=(0, 1))
    assert np.abs(one(device, autocontrast=True) - (image - low) * 255 / (high - low)).max() <= 1
    assert np.abs(one(device, brightness=0.5) - image * 0.5).max() <= 1
    assert np.abs(one(device, contrast=0.5) - (image * 0.5 + 64)).max() <= 1
    grey = one(device, saturation=0)
    assert np.abs(grey[..., 0] - grey[..., 2]).max() <= 3
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
    parameters = [draw_parameters(EVERYTHING, keyed_generator(0, i), 40, 40, SIZE) for i in range(12)]
    together = run(images, parameters, device=device)
    shuffled = run(images[::-1], parameters[::-1], batch_size=20, device=device, threads=2)
    alone = torch.cat([run([image], [values], device=device) for image, values in zip(images, parameters, strict=True)])
    assert torch.equal(together, shuffled.flip(0)) and torch.equal(together, alone)
    assert not torch.equal(together[0], together[1])


def test_exif_rotation_is_the_same_for_every_kind_of_file():
    pixels = np.kron(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10, np.ones((8, 8), np.uint8))
    pixels = np.stack([pixels] * 3, axis=2)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright = np.rot90(pixels, -1)
    expected = evaluation_pixels([np.ascontiguousarray(upright)], SIZE)
    for kind, mode in [("JPEG", "RGB"), ("PNG", "RGB"), ("WEBP", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L")]:
        options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
        got = evaluation_pixels([encode(pixels, kind, mode, exif=exif, **options)], SIZE)
        assert (got - expected).abs().max() < 0.15, kind  # JPEG is not lossless


def test_evaluation_takes_files_and_arrays_together(device):
    source = ShapesSource(num=70, image_size=24)
    arrays = [source.read(i).image for i in range(70)]
    mixed = [encode(image, "PNG") if i % 3 else image for i, image in enumerate(arrays)]
    got = evaluation_pixels(mixed, 16, device=device)
    assert got.shape == (70, 3, 16, 16) and got.dtype == torch.float32 and got.device.type == device.type
    assert torch.equal(got, evaluation_pixels(arrays, 16, device=device))
    pil = np.stack([np.asarray(Image.fromarray(image).resize((16, 16), Image.BICUBIC)) for image in arrays])
    assert np.abs(to_bytes(got).astype(int) - pil).mean() < 2
    assert evaluation_pixels([], 16).shape == (0, 3, 16, 16)
    with pytest.raises(BadSample, match="0 bytes"):
        evaluation_pixels([b""], 16)
    with pytest.raises(ValueError, match="device"):
        evaluation_pixels([arrays[0]], 16, device="meta")


def test_drawn_arguments_follow_the_settings():
    drawn = [draw_parameters(EVERYTHING, keyed_generator(1, i), 300, 200, SIZE) for i in range(600)]
    for values in drawn:
        assert values.keys() == NEUTRAL.keys()
        assert all(values[name].dtype == NEUTRAL[name].dtype for name in NEUTRAL)
        height, width = (values["roi_end"] - values["roi_start"]) * (200, 300)
        assert (values["roi_start"] >= 0).all() and (values["roi_end"] <= 1 + 1e-6).all()
        assert 0.2 - 1e-4 <= height * width / 60_000 <= 1 and 3 / 4 - 1e-4 <= width / height <= 4 / 3 + 1e-4
        assert 0 <= values["blur"] <= 2 * SIZE / 256
    assert 0.4 < np.mean([values["mirror"] for values in drawn]) < 0.6
    assert 0.4 < np.mean([values["blur"] > 0 for values in drawn]) < 0.6
    changed = {name: np.mean([(v[name] != NEUTRAL[name]).any() for v in drawn]) for name in NEUTRAL}
    # 2 of 14 operations; five of them share the matrix
    assert changed["equalize"] == pytest.approx(1 - (13 / 14) ** 2, abs=0.05)
    assert changed["matrix"] == pytest.approx(1 - (9 / 14) ** 2, abs=0.06)
    assert changed["hue"] == pytest.approx(0.8, abs=0.05)


def test_what_is_switched_off_is_not_in_the_graph():
    assert AugmentConfig.none().arguments() == frozenset()
    assert AugmentConfig(crop=False, rand_augment=False, color=False, blur=False).arguments() == {"mirror"}
    off = draw_parameters(AugmentConfig.none(), keyed_generator(0), 30, 20, SIZE)
    assert all((off[name] == NEUTRAL[name]).all() for name in NEUTRAL)


def test_a_crop_that_never_fits_is_the_largest_central_one():
    config = AugmentConfig(crop_scale=(1.0, 1.0), rand_augment=False, color=False, blur=False, flip=False)
    values = draw_parameters(config, keyed_generator(0), 1000, 10, SIZE)
    width = (values["roi_end"] - values["roi_start"])[1] * 1000
    assert width == pytest.approx(10 * 4 / 3, rel=1e-3)
    assert values["roi_start"][1] + values["roi_end"][1] == pytest.approx(1)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_move_pixels_as_named(name):
    config = AugmentConfig(
        crop=False, flip=False, color=False, blur=False, rand_augment_ops=(name,), rand_augment_n=1
    )
    matrix = draw_parameters(config, keyed_generator(0), SIZE, SIZE, SIZE)["matrix"]
    a, s, c = 0.3 * 0.7, 0.1 * 0.7 * SIZE, math.cos(math.radians(21))
    centre = SIZE / 2
    expected = {"shear_x": [[1, a, -a * centre], [0, 1, 0]], "shear_y": [[1, 0, 0], [a, 1, -a * centre]],
                "translate_x": [[1, 0, s], [0, 1, 0]], "translate_y": [[1, 0, 0], [0, 1, s]]}  # fmt: skip
    if name == "rotate":
        assert matrix[0, 0] == matrix[1, 1] == pytest.approx(c, rel=1e-5) and matrix[0, 1] == -matrix[1, 0] != 0
        assert matrix[:, :2] @ [centre, centre] + matrix[:, 2] == pytest.approx([centre, centre], rel=1e-5)
    else:
        signs = [np.array(expected[name]), 2 * np.eye(2, 3) - expected[name]]
        assert any(np.allclose(matrix, sign, atol=1e-4) for sign in signs)


@pytest.mark.parametrize("wrong", [
    {"crop_scale": (0.0, 1.0)}, {"crop_ratio": (2.0, 1.0)}, {"rand_augment_ops": ("invert",)}, {"rand_augment_ops": ()},
    {"rand_augment_magnitude": 11.0}, {"color_probability": 2.0}, {"color_strength": (2.0, 0, 0)},
    {"blur_sigma": (2.0, 1.0)},
])  # fmt: skip
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AugmentConfig(**wrong)


def test_files_are_decoded_as_pil_does():
    pixels = np.asarray(Image.fromarray(IMAGE).resize((48, 40)))
    for kind in ("PNG", "JPEG"):
        file = encode(pixels, kind)
        decoded = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
        difference = (evaluation_pixels([file], SIZE) - evaluation_pixels([decoded], SIZE)).abs().max()
        assert difference <= (0 if kind == "PNG" else 0.05)
