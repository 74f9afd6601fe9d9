"""The work of `softmask-fast explain` and `softmask-fast features`: images and a text through any model with maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from softmask_fast.adapters.hub import Explanation, WordMap, explain_image, open_model
from softmask_fast.data.images import check_image, decode_image
from softmask_fast.data.sources import open_source
from softmask_fast.data.types import BadSample, Sample
from softmask_fast.data.words import content_words
from softmask_fast.errors import UsageError, printable
from softmask_fast.evaluation.common import image_pixels
from softmask_fast.evaluation.heatmaps import MATCHES, draw, explained_words, left_out_notes, peak, strengths
from softmask_fast.evaluation.map_statistics import color_statistics, map_statistics
from softmask_fast.evaluation.tables import format_table
from softmask_fast.model.export import read_model
from softmask_fast.utils import read_json, replacing

SCENE, SCENES = "shapes:", "shapes:objects=3"  # in place of a file: a scene by its number, of the data of `tiny`
SCENE_SIZE = 256  # pixels

Explainer = Callable[[Path], tuple[Image.Image, Explanation]]


def explainer(
    folder: Path, device: torch.device, text: str | None, layer: int | None, answer: str | None = None
) -> Explainer:
    """A function from an image's file to the picture and its maps, by a model of any kind.

    The folder holds a model of this library, of transformers or of open_clip.

    Raises:
        UsageError: if the model cannot be used. The function raises it for an image or a text that cannot be used.
    """
    if not _is_foreign(folder):
        model, tokenizer = read_model(folder, device)
        return lambda file: _own(model, tokenizer, file, text, layer)
    model, processor = open_model(folder, device)

    def explain(file: Path) -> tuple[Image.Image, Explanation]:
        picture, caption = _read(file)
        return picture, explain_image(model, processor, picture, text or caption, layer=layer, answer=answer)

    return explain


def _is_foreign(folder: Path) -> bool:
    if (folder / "open_clip_config.json").is_file():
        return True
    if not (folder / "config.json").is_file():
        return False
    config = read_json(folder / "config.json", "model")
    return isinstance(config, dict) and "model_type" in config


def _read(file: Path) -> tuple[Image.Image, str | None]:
    """The picture in a file; or that of a scene, "shapes:N", and its caption."""
    if str(file).startswith(SCENE):
        number, scenes = str(file).removeprefix(SCENE), open_source(SCENES, split="val", image_size=SCENE_SIZE)
        if not number.isdecimal() or int(number) >= len(scenes):
            raise UsageError(f"--image: expected a scene from {SCENE}0 to {SCENE}{len(scenes) - 1}, got {file}")
        scene = scenes.read(int(number))
        return Image.fromarray(scene.image), scene.captions[0]
    data = file.read_bytes()
    try:
        check_image(data)
        return decode_image(data), None
    except BadSample as error:
        raise UsageError(f"--image: {file}: {error}") from error


def _own(
    model: Any, tokenizer: Any, file: Path, text: str | None, layer: int | None
) -> tuple[Image.Image, Explanation]:
    picture, caption = _read(file)
    if text is None and caption is None:
        raise UsageError(f"--text: expected a caption of {file}, right or wrong, got none; only scenes have their own")
    picture = np.asarray(picture)
    shown, maps = explained_words(model, tokenizer, picture, text or caption, layer=layer)
    with torch.inference_mode():
        patches = model.vision(image_pixels(model, [Sample("image", picture, [])]))[0, model.prefix_tokens :]
    words = []
    for word, heat in zip(shown["words"], maps, strict=True):
        share = torch.from_numpy(heat.flatten()).to(patches)
        share = share / share.sum()  # NaN for a map of zeros
        words.append(WordMap(word["word"], "text", heat, (share @ patches).cpu().numpy()))
    notes = left_out_notes(model, shown["left_out"])
    explanation = Explanation(shown["text"], None, "probability of a match", shown["matched"], words, notes)
    return Image.fromarray(picture), explanation


def explain_files(explain: Explainer, files: Sequence[Path], out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Draws each image's figure: into `out`, a PNG, or a folder for several. Prints a table for each.

    Returns a record of each image, and the maps by "FILE/number of the word".
    """
    records, arrays = [], {}
    for file in files:
        picture, explanation = explain(file)
        png = out if out.suffix.lower() == ".png" else out / f"{file.stem.replace(':', '-')}.png"
        title = explanation.text if explanation.answer is None else f"{explanation.text} {explanation.answer}".strip()
        heats, names = [word.heat for word in explanation.words], [word.text for word in explanation.words]
        note = f"{explanation.score}: {explanation.value:.3g}"
        gray = explanation.score == "probability of a match" and explanation.value < MATCHES
        options = {"footnotes": explanation.notes, "shown": content_words(names), "gray": gray}
        draw(picture, names, heats, png, title=title, note=note, **options)
        words = []
        for number, (word, strength) in enumerate(zip(explanation.words, strengths(heats), strict=True)):
            x, y = peak(word.heat)
            words.append({"word": word.text, "part": word.part, "strength": strength, "peak": [x, y]})
            words[-1] |= map_statistics(word.heat)
            arrays[f"{file.name}/{number:03d}"] = word.heat
        records.append({
            "image": str(file), "text": explanation.text, "answer": explanation.answer, "score": explanation.score,
            "value": explanation.value, "words": words, "notes": explanation.notes, "figure": str(png),
        })  # fmt: skip
        print(_table(records[-1]))
        for note in explanation.notes:
            print(printable(note))
        print(printable(f"written to {png}"))
    return records, arrays


def _table(record: dict[str, Any]) -> str:
    rows = [
        [word["word"], word["part"], f"{100 * word['strength']:.0f}", *(f"{100 * place:.0f}" for place in word["peak"])]
        for word in record["words"]
    ]
    if record["score"] == "probability of a match":
        title = f"The model gives the pair a {100 * record['value']:.1f} % chance to match"
    else:
        title = f"{record['score']}: {record['value']:.4g}"
    return format_table(title, {}, ["word", "part", "strength %", "peak x %", "peak y %"], rows)


def feature_table(explain: Explainer, files: Sequence[Path]) -> dict[str, list[Any]]:
    """One row for each word of each image: what `map_statistics` and `color_statistics` say, and the image's features
    pooled under the map, as columns f0, f1, ..."""
    columns: dict[str, list[Any]] = {}
    for file in files:
        picture, explanation = explain(file)
        pixels = np.asarray(picture)
        for word in explanation.words:
            row = {"image": str(file), "text": explanation.text, "word": word.text, "part": word.part}
            row |= map_statistics(word.heat) | color_statistics(pixels, word.heat)
            row |= {f"f{number}": float(value) for number, value in enumerate(word.features)}
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
    return columns


def write_table(columns: dict[str, list[Any]], out: Path) -> None:
    """A .parquet file with these columns, or an .npz with one array for each."""
    if out.suffix == ".npz":
        write_arrays({name: np.array(values) for name, values in columns.items()}, out)
        return
    import pyarrow
    from pyarrow import parquet

    with replacing(out) as temporary:
        parquet.write_table(pyarrow.table(columns), temporary)


def write_arrays(arrays: dict[str, np.ndarray], out: Path) -> None:
    """An .npz file with these arrays."""
    with replacing(out) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
