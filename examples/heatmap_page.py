"""Word heat maps in a browser, on this machine only: python examples/heatmap_page.py [--model runs/photos/model]

Needs `pip install -e '.[page]'`. Without --model it is the model in the package, which knows scenes of colored shapes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from softmask_fast import load_model
from softmask_fast.data.sources import open_source
from softmask_fast.data.types import BadSample
from softmask_fast.errors import UsageError
from softmask_fast.evaluation.heatmaps import explain
from softmask_fast.installation import install_command

if TYPE_CHECKING:
    import gradio

LONGEST = 500  # characters of a text
COLUMNS = ["word", "strength %", "peak x %", "peak y %"]


def heat_maps(model: Any, tokenizer: Any, image: np.ndarray | None, text: str) -> tuple[np.ndarray, list[list[Any]]]:
    """The figure of an image (H, W, 3) uint8 and a text, as such an array, and the rows of COLUMNS.

    Raises UsageError for no image or a text without a word, BadSample for an image that is too large.
    """
    if image is None:
        raise UsageError("image: expected one, got none")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "words.png"
        shown = explain(model, tokenizer, image, text, file)
        with Image.open(file) as figure:
            drawn = np.asarray(figure.convert("RGB"))
    numbers = ([word["strength"], *word["peak"]] for word in shown["words"])
    return drawn, [
        [word["word"], *(round(100 * number) for number in row)]
        for word, row in zip(shown["words"], numbers, strict=True)
    ]


def make_page(model: Any, tokenizer: Any, image: np.ndarray | None = None, text: str = "") -> gradio.Interface:
    """The page. It starts with an image and a text, if they are given."""
    import gradio

    def answer(image: np.ndarray | None, text: str) -> tuple[np.ndarray, list[list[Any]]]:
        try:
            return heat_maps(model, tokenizer, image, text)
        except (UsageError, BadSample) as error:
            raise gradio.Error(str(error), print_exception=False) from error

    return gradio.Interface(
        answer,
        [
            gradio.Image(image, label="image", sources=["upload", "clipboard"]),
            gradio.Textbox(text, label="caption", max_length=LONGEST),
        ],
        [
            gradio.Image(show_label=False, format="png", buttons=["download", "fullscreen"]),
            gradio.Dataframe(headers=COLUMNS, label="words"),
        ],
        title="Where does the model look?",
        flagging_mode="never",
        analytics_enabled=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="a model folder, or owner/name on the Hugging Face hub")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args()
    first = {}
    if options.model == "demo":
        scene = open_source("shapes:objects=3", split="val", image_size=256).read(3)
        first = {"image": scene.image, "text": scene.captions[0]}
    try:
        model, tokenizer, _ = load_model(options.model)
        page = make_page(model, tokenizer, **first)
    except UsageError as error:
        sys.exit(f"heatmap_page.py: error: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"heatmap_page.py: error: {error}; install it with: {install_command('page')}")
    page.launch(server_name="127.0.0.1", server_port=options.port)


if __name__ == "__main__":
    main()
