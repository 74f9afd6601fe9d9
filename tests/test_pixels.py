"""Pixels for evaluation: DALI and PIL give the same, for every kind of file, and PIL does without DALI."""

import io
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import encode
from small_models import small_model, small_tokenizer

from softmask_fast.data import pixels
from softmask_fast.data.images import MEAN, STD, check_image, decode_image
from softmask_fast.data.pixels import evaluation_pixels
from softmask_fast.data.synthetic import ShapesSource
from softmask_fast.data.types import BadSample
from softmask_fast.evaluation.heatmaps import shown_picture
from softmask_fast.model.export import save_model

SIZE = 32
IMAGE = ShapesSource(num=1, image_size=SIZE).read(0).image


@pytest.fixture(params=["dali", "pil"])
def impl(request):
    return request.param


def to_levels(pixels: torch.Tensor) -> np.ndarray:
    """(B, H, W, 3) float64 in [0, 255] again."""
    raw = pixels.cpu().double() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return (255 * raw).permute(0, 2, 3, 1).numpy()


def test_an_image_of_the_right_size_is_only_normalized(impl, device):
    assert (to_levels(evaluation_pixels([IMAGE], SIZE, device=device, impl=impl))[0].round() == IMAGE).all()


def photograph(width: int, height: int) -> np.ndarray:
    """Smooth colors with an edge and noise: (height, width, 3) uint8."""
    generator = np.random.default_rng(width)
    waves = generator.random((height // 16, width // 16, 3)) * 255
    smooth = Image.fromarray(waves.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth, int) + generator.integers(-8, 9, (height, width, 3))
    pixels[height // 3 :, width // 2 :] //= 2
    return pixels.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "kind, mode", [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB")]
)
@pytest.mark.parametrize("size", [64, 256])
def test_dali_and_pil_agree(kind, mode, size):
    files = [encode(photograph(*shape), kind, mode) for shape in ((320, 240), (160, 208), (500, 96))]
    dali, pil = (to_levels(evaluation_pixels(files, size, impl=name)) for name in ("dali", "pil"))
    assert np.abs(dali - pil).mean() < 0.3 and np.abs(dali - pil).max() < 16


def test_exif_rotation_is_the_same_for_every_kind_of_file(impl):
    pixels = np.kron(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10, np.ones((8, 8), np.uint8))
    pixels = np.stack([pixels] * 3, axis=2)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright = np.rot90(pixels, -1)
    expected = evaluation_pixels([np.ascontiguousarray(upright)], SIZE, impl=impl)
    for kind, mode in [("JPEG", "RGB"), ("PNG", "RGB"), ("WEBP", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L")]:
        options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
        got = evaluation_pixels([encode(pixels, kind, mode, exif=exif, **options)], SIZE, impl=impl)
        assert (got - expected).abs().max() < 0.15, kind  # JPEG is not lossless


def test_files_and_arrays_are_taken_together(impl, device):
    source = ShapesSource(num=70, image_size=24)
    arrays = [source.read(i).image for i in range(70)]
    mixed = [encode(image, "PNG") if i % 3 else image for i, image in enumerate(arrays)]
    got = evaluation_pixels(mixed, 16, device=device, impl=impl)
    assert got.shape == (70, 3, 16, 16) and got.dtype == torch.float32 and got.device.type == device.type
    assert torch.equal(got, evaluation_pixels(arrays, 16, device=device, impl=impl))
    pil = np.stack([np.asarray(Image.fromarray(image).resize((16, 16), Image.BICUBIC)) for image in arrays])
    assert np.abs(to_levels(got) - pil).mean() < 2
    assert evaluation_pixels([], 16, impl=impl).shape == (0, 3, 16, 16)
    with pytest.raises(BadSample, match="0 bytes"):
        evaluation_pixels([b""], 16, impl=impl)
    with pytest.raises(ValueError, match="impl"):
        evaluation_pixels(arrays, 16, impl="opencv")


def test_files_are_decoded_as_pil_does(impl):
    pixels = np.asarray(Image.fromarray(IMAGE).resize((48, 40)))
    for kind in ("PNG", "JPEG"):
        file = encode(pixels, kind)
        decoded = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
        from_file, from_array = (evaluation_pixels([image], SIZE, impl=impl) for image in (file, decoded))
        assert (from_file - from_array).abs().max() <= (0 if kind == "PNG" else 0.05)


@pytest.mark.parametrize("task", ["retrieval", "grounding"])
def test_evaluation_runs_without_dali(task, tmp_path):
    """In a new process that cannot import DALI."""
    tokenizer = small_tokenizer()
    save_model(small_model(tokenizer), tokenizer, tmp_path / "model")
    command = ["evaluate", "--model", str(tmp_path / "model"), "--data", "shapes:num=12", "--task", task]
    code = f"""
import sys
sys.modules["nvidia.dali"] = None
from softmask_fast.cli import main
sys.exit(main({command!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert task in done.stdout.lower()


def test_without_dali_pil_is_the_default(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    pixels._default_impl.cache_clear()
    try:
        assert torch.equal(evaluation_pixels([IMAGE], 20), evaluation_pixels([IMAGE], 20, impl="pil"))
    finally:
        pixels._default_impl.cache_clear()


def with_segments(*segments: bytes) -> bytes:
    """A picture of four colors as a JPEG with APP1 segments."""
    colors = np.zeros((40, 80, 3), np.uint8)
    colors[:20, :40], colors[:20, 40:], colors[20:, :40] = (220, 30, 30), (30, 220, 30), (30, 30, 220)
    plain = encode(colors, quality=95)
    return plain[:20] + b"".join(b"\xff\xe1" + struct.pack(">H", len(s) + 2) + s for s in segments) + plain[20:]


def exif(value: int, kind: int = 3, order: str = ">", repeat: int = 1) -> bytes:
    size = {1: "B3x", 3: "H2x", 4: "I"}[kind]
    entry = struct.pack(f"{order}HHI{size}", 0x112, kind, 1, value)
    head = struct.pack(f"{order}2sHIH", b"MM" if order == ">" else b"II", 42, 8, repeat)
    return b"Exif\0\0" + head + entry * repeat + bytes(4)


def xmp(value: int) -> bytes:
    return (
        b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf='
        b'"http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        b'tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>' % value
    )


ROTATIONS = {
    "one entry": [exif(8)], "little endian": [exif(3, order="<")], "xmp": [xmp(6)], "xmp and exif": [xmp(3), exif(6)],
    "twice": [exif(6), exif(1)], "twice, other order": [exif(1), exif(6)], "long": [exif(5, 4)],
    "long, little endian": [exif(6, 4, "<")], "byte": [exif(6, 1)], "byte, little endian": [exif(6, 1, "<")],
    "two entries": [exif(6, repeat=2)], "no orientation": [exif(9)], "zero": [exif(0)], "cut": [exif(6)[:20]],
}  # fmt: skip


@pytest.mark.parametrize("kind", ROTATIONS)
def test_checker_figure_and_model_see_an_image_turned_alike(kind, impl):
    file = with_segments(*ROTATIONS[kind])
    try:
        facts = check_image(file)
    except BadSample:  # metadata that PIL cannot read
        assert kind == "cut"
        return
    upright = np.asarray(decode_image(file))
    assert (facts.height, facts.width) == upright.shape[:2]
    shown = shown_picture(file)
    assert (shown.shape[0] > shown.shape[1]) == (facts.height > facts.width)
    seen, expected = (to_levels(evaluation_pixels([one], SIZE, impl=impl))[0] for one in (file, upright))
    assert np.abs(seen - expected).mean() < 1
    if kind in ("one entry", "little endian"):
        assert not facts.convert  # the fast way
