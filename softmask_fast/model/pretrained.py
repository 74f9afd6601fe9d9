"""A trained model with its tokenizer and image preprocessing, from a folder or the Hugging Face hub, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from transformers import PreTrainedTokenizerFast

from softmask_fast.data.pixels import Preprocess
from softmask_fast.errors import printable
from softmask_fast.hub import model_folder
from softmask_fast.model.export import (
    CONFIG,
    EVALUATION,
    TASK,
    TOKENIZER,
    WEIGHTS,
    read_model,
    read_record,
    write_model,
)
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.utils import write_json

CARD = """---
library_name: softmask_fast
tags:
- image-text-retrieval
- vision-language
---

# A vision-language model of softmask_fast

Image encoder, text encoder and fusion encoder, as in ALBEF; {parameters:,} parameters.

| | |
| --- | --- |
| images | {config.image_size} x {config.image_size} pixels, {rows} x {columns} patches |
| image encoder | `{config.vision_model}`, {blocks} blocks of width {width} |
| text | up to {config.max_tokens} tokens of a vocabulary of {config.vocab_size} |
| text and fusion encoder | {config.text_layers} and {config.fusion_layers} layers of width {config.text_width} |
| features for the contrast | {config.embed_dim} |

```python
from softmask_fast import load_model

model, tokenizer, preprocess = load_model("OWNER/NAME")  # this repository, or a folder with its files
_, image = model.encode_image(preprocess(picture)[None])  # picture: of PIL
_, text = model.encode_text(**tokenizer(["a caption"], padding=True, truncation=True, return_tensors="pt"))
similarity = image @ text.T
```
"""


@dataclass
class Pretrained(ModelHubMixin):
    """What `load_model` returns. It can be unpacked: `model, tokenizer, preprocess = load_model("demo")`.

    `save_pretrained(folder)` and `push_to_hub("owner/name")` of huggingface_hub's `ModelHubMixin` write a model folder
    (config.json, model.safetensors, tokenizer/) with a model card and, if the model was evaluated, its metrics in
    evaluation.json.
    """

    model: VisionLanguageModel
    tokenizer: PreTrainedTokenizerFast
    preprocess: Preprocess
    evaluation: dict[str, Any] | None = None  # the numbers of an evaluation.json, nested as there

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer, self.preprocess))

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str | torch.device = "cpu", revision: str | None = None,
        token: str | bool | None = None, cache_dir: str | Path | None = None, force_download: bool = False,
        local_files_only: bool = False,
    ) -> Pretrained:  # fmt: skip
        """`load_model` with the hub's options. The mixin's own method would read config.json before it is checked."""
        hub = dict(revision=revision, token=token, cache_dir=cache_dir)
        hub |= dict(force_download=force_download, local_files_only=local_files_only)
        folder = model_folder(name, "model", (CONFIG, WEIGHTS, TOKENIZER), (EVALUATION,), **hub)
        model, tokenizer = read_model(folder, device)
        tokenizer.model_max_length = model.config.max_tokens  # where `truncation=True` cuts
        records = (folder / EVALUATION, folder.parent / EVALUATION)  # of a best or a shared model; of a run's last one
        path = next((path for path in records[: 1 + (folder.name == "model")] if path.is_file()), None)
        return cls(model, tokenizer, Preprocess(model.config.image_size), path and _figures(read_record(path, "model")))

    def _save_pretrained(self, save_directory: Path) -> None:
        for stale in (EVALUATION, TASK):  # of a model that the folder held before
            (save_directory / stale).unlink(missing_ok=True)
        write_model(self.model, self.tokenizer, save_directory)
        if self.evaluation:
            write_json(save_directory / EVALUATION, self.evaluation)

    def push_to_hub(self, repo_id: str, *, delete_patterns: Sequence[str] | str | None = None, **options: Any) -> str:
        """The mixin's method, which also removes evaluation.json and task.json of the repository's earlier model."""
        chosen = [delete_patterns] if isinstance(delete_patterns, str) else delete_patterns or ()
        return super().push_to_hub(repo_id, delete_patterns=[EVALUATION, TASK, *chosen], **options)

    def generate_model_card(self) -> ModelCard:
        """The model card: sizes, how to use the model, and the metrics of its evaluation."""
        model = self.model
        rows, columns = model.grid_size
        parameters = sum(parameter.numel() for parameter in model.parameters())
        text = CARD.format(
            config=model.config, rows=rows, columns=columns, parameters=parameters, width=model.vision.width,
            blocks=len(model.vision.vit.blocks),
        )  # fmt: skip
        if self.evaluation:
            lines = [f"| {name} | {value:.6g} |" for name, value in _leaves(self.evaluation)]
            head = ("\n## Evaluation\n", "Fractions are in [0, 1].\n", "| | |", "| --- | ---: |")
            text += "\n".join([*head, *lines, ""])
        return ModelCard(text)


def load_model(name: str | Path, device: str | torch.device = "cpu") -> Pretrained:
    """Load a trained model, its tokenizer and its image preprocessing:

    ```python
    model, tokenizer, preprocess = load_model("demo")
    tokens, features = model.encode_image(preprocess(picture)[None])
    tokens, features = model.encode_text(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))
    ```

    Args:
        name: a model folder that training wrote; "demo", the model in the package; or "owner/name" on the Hugging Face
            hub, which is asked if its cache lacks the model. A folder is data: none of its code runs, and no hub is
            asked for what its files name.
        device: of the model. `preprocess` makes tensors on the CPU.

    Returns:
        `Pretrained`: the model in eval mode, float32; the tokenizer; and `preprocess`, from a PIL image to float32
        (3, image_size, image_size). Fine-tuned models of tasks with labels are refused.

    Raises:
        UsageError: if a file is missing or does not fit; the message names it. Also for a name that the hub does not
            have, after at most 10 seconds.
    """
    return Pretrained.from_pretrained(name, device=device)


def _figures(record: dict[str, Any], depth: int = 8) -> dict[str, Any]:
    """The numbers of a record, without its texts: these are paths on somebody's machine, which must not be
    published."""
    numbers = {}
    for name, value in record.items() if depth else ():
        value = _figures(value, depth - 1) if isinstance(value, dict) else value
        if isinstance(value, (int, float)) and not isinstance(value, bool) or isinstance(value, dict) and value:
            numbers[name] = value
    return numbers


def _leaves(figures: dict[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """Each number with its path, such as ("retrieval, itc, recall@1", 0.5)."""
    for name, value in figures.items():
        name = above + printable(name).replace("_", " ").replace("|", "/")
        if isinstance(value, dict):
            yield from _leaves(value, f"{name}, ")
        else:
            yield name, value
