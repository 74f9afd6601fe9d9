"""Configuration: four flat dataclasses and the presets.

Every field is a command line flag (`--batch_size 64`, `--soft_mask false`) and a key of a YAML or JSON file
(`--config run.yaml`). A flag wins over the file, the file over the preset, the preset over the defaults below, which
are those of the paper. Configurations are frozen: `dataclasses.replace` makes a changed copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol, get_args, get_type_hints

from softmask_fast.errors import UsageError

GATHERS = ("momentum", "with_grad", "ring")  # those of `FocalITCLoss`; a test compares them
POOLINGS = ("cls", "mean")
STEMS = ("patches", "convolutions")
ATTENTIONS = ("auto", "padded", "varlen", "xformers")
LOGGERS = ("tensorboard", "wandb", "mlflow")  # those of `training.loggers`; a test compares them
RENAMED = {"colour": "color"}  # old name of an option -> its name


def renamed(options: dict[str, Any]) -> dict[str, Any]:
    """Stored options under their present names."""
    return {RENAMED.get(name, name): value for name, value in options.items()}


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": help})


KINDS = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}


class Section:
    """A dataclass of options. Raises UsageError for a value that is not of its field's type."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, kinds = getattr(self, name), get_args(hint) or (hint,)
            _require(any(_is_of(value, kind) for kind in kinds), name, KINDS[kinds[0]], value)


def _is_of(value: object, kind: type) -> bool:
    if kind is not float or type(value) not in (int, float):
        return type(value) is kind
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


# The largest sizes of a model. Anything larger is a mistake or an attack, and would exhaust memory before it fails.
MOST = {
    1 << 10: ("text_heads", "text_layers", "fusion_layers", "vision_heads", "vision_depth"),
    1 << 14: ("image_size", "vision_patch_size", "max_tokens"),
    1 << 16: ("text_width", "vision_width", "embed_dim"),
    1 << 24: ("vocab_size", "text_positions"),
}


@dataclass(frozen=True)
class ModelConfig(Section):
    """Sizes and starting weights of the vision-language model."""

    image_size: int = option(256, "Side of the square input image in pixels.")
    vision_model: str = option("vit_base_patch16_224", "Name of a timm vision transformer.")
    vision_patch_size: int | None = option(None, "Side of a patch, in pixels; default: that of vision_model.")
    vision_stem: str = option(
        "patches",
        "What turns pixels into tokens: 'patches' (one projection, as in ViT), or 'convolutions', which learn from "
        "fewer images.",
    )
    vision_width: int | None = option(None, "Width of the image encoder; default: that of vision_model.")
    vision_depth: int | None = option(None, "Blocks in the image encoder; default: as vision_model.")
    vision_heads: int | None = option(None, "Attention heads per block; default: as vision_model.")
    vision_mlp_ratio: float | None = option(None, "MLP width divided by vision_width; default: as vision_model.")
    vision_weights: str = option("timm", "'timm' (its pretrained weights), 'random', or a .safetensors or .pth file.")
    text_width: int = option(768, "Width of the text and fusion encoders.")
    text_heads: int = option(12, "Attention heads per layer of the text and fusion encoders.")
    text_mlp_ratio: float = option(4.0, "MLP width divided by text_width, in the text and fusion encoders.")
    text_positions: int = option(512, "Text position embeddings; at least max_tokens are made.")
    text_layers: int = option(6, "Layers of the text encoder.")
    fusion_layers: int = option(6, "Layers of the fusion encoder, which attends to the image.")
    text_weights: str = option(
        "google-bert/bert-base-uncased",
        "A BERT (a name on the hub or a local folder), or 'random'. Its first layers initialize the text encoder, the "
        "next ones the fusion encoder. Cross-attention always starts from random weights.",
    )
    model_weights: str | None = option(
        None,
        "Start from a whole model: a folder exported by training (DIR/model) or an ALBEF checkpoint. Its sizes and "
        "tokenizer become the defaults.",
    )
    vocab_size: int = option(
        30522, "Vocabulary size of a tokenizer trained on the captions; otherwise the tokenizer's."
    )
    max_tokens: int = option(30, "Longest caption in tokens, including [CLS] and [SEP]; longer ones are cut.")
    embed_dim: int = option(256, "Width of the features that ITC compares.")
    hidden_dropout: float = option(0.1, "Dropout in the text and fusion encoders.")
    soft_mask_layer: int = option(2, "Fusion layer whose word Grad-CAM makes the soft mask; 0 is the first.")
    match_through_words: bool = option(
        False, "Hide the image from [CLS] and [SEP], so that ITM sees it only through the words."
    )
    vision_contrast_blocks: int = option(
        0, "Last blocks of the image encoder that only ITC uses; fusion reads the tokens before them."
    )
    text_contrast_layers: int = option(0, "Last layers of the text encoder that only ITC uses.")
    contrast_pooling: str = option("cls", "What ITC reads from an encoder: 'cls', or the 'mean' of all tokens.")
    contrast_gradient: float = option(
        0.0, "Fraction of ITC's gradient that passes from the layers only ITC uses into those before them."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for most, names in MOST.items():
            for name in names:
                value = getattr(self, name)
                _require(value is None or 1 <= value <= most, name, f"from 1 to {most}", value)
        _require(self.max_tokens >= 3, "max_tokens", "at least 3 ([CLS], one token, [SEP])", self.max_tokens)
        for part in ("text", "vision"):
            heads, width, ratio = (getattr(self, f"{part}_{name}") for name in ("heads", "width", "mlp_ratio"))
            whole = heads is None or width is None or width % heads == 0
            _require(whole, f"{part}_width", f"a multiple of {part}_heads={heads}", width)
            _require(ratio is None or 0 < ratio <= 1000, f"{part}_mlp_ratio", "above 0, at most 1000", ratio)
        patch = self.vision_patch_size
        _require(
            patch is None or patch <= self.image_size,
            "vision_patch_size",
            f"at most image_size={self.image_size}",
            patch,
        )
        stem = self.vision_stem
        _require(stem in STEMS, "vision_stem", " or ".join(map(repr, STEMS)), stem)
        fits = stem == "patches" or self.vision_weights == "random"
        _require(fits, "vision_weights", "'random' with a stem of convolutions", self.vision_weights)
        if self.model_weights:
            for name in ("vision_weights", "text_weights"):
                expected = "'random' with model_weights, which fill the whole model"
                _require(getattr(self, name) == "random", name, expected, getattr(self, name))
        _require(0 <= self.hidden_dropout < 1, "hidden_dropout", "in [0, 1)", self.hidden_dropout)
        # The last layer only feeds [CLS], so attention of the words there has no gradient.
        layer, last = self.soft_mask_layer, self.fusion_layers - 1
        expected = f"a layer before the last of fusion_layers={self.fusion_layers}, counted from 0"
        _require(0 <= layer < last, "soft_mask_layer", expected, layer)
        _require_at_least(self, 0, "vision_contrast_blocks", "text_contrast_layers")
        own, layers = self.text_contrast_layers, self.text_layers
        _require(own < layers, "text_contrast_layers", f"fewer than text_layers={layers}", own)
        pooling = self.contrast_pooling
        _require(pooling in POOLINGS, "contrast_pooling", " or ".join(map(repr, POOLINGS)), pooling)
        _require(0 <= self.contrast_gradient <= 1, "contrast_gradient", "in [0, 1]", self.contrast_gradient)


@dataclass(frozen=True)
class MomentumConfig(Section):
    """The momentum teacher, its soft targets, and the contrastive loss against its features."""

    focal_gamma: float = option(2.0, "Focal exponent of the contrastive loss; 0 disables it.")
    itc_gather: str = option(
        "momentum",
        "What ITC gathers from all ranks as keys: 'momentum' (the teacher's features), 'with_grad' (the model's, with "
        "gradient) or 'ring' (the same result in less memory).",
    )
    hard_negatives: bool = option(
        True, "Sample ITM negatives by similarity; false: uniformly, for data whose most similar pairs also match."
    )
    hard_negatives_start: float = option(
        0.0, "Fraction of the run that samples uniformly first, so that ITM starts with easy negatives."
    )
    queue_size: int = option(
        65536, "Teacher features per modality that the queue keeps as extra ITC keys; 0 disables it."
    )
    queue_warmup_steps: float = option(
        0, "Steps before the queue's features serve as keys; below 1, a fraction of the run."
    )
    momentum: float = option(0.995, "Decay of the momentum teacher, the model's moving average.")
    distill_alpha: float = option(0.4, "Weight of the teacher's soft targets.")
    distill_ramp_steps: float | None = option(
        None, "Steps over which distill_alpha ramps up from 0; below 1, a fraction of the run; default: one epoch."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("momentum", "distill_alpha", "hard_negatives_start"):
            _require(0 <= getattr(self, name) <= 1, name, "in [0, 1]", getattr(self, name))
        _require_at_least(self, 0, "focal_gamma", "queue_size")
        _require_steps_or_share(self, "queue_warmup_steps", "distill_ramp_steps")
        _require(self.itc_gather in GATHERS, "itc_gather", " or ".join(map(repr, GATHERS)), self.itc_gather)


@dataclass(frozen=True)
class ObjectiveConfig(MomentumConfig):
    """The objectives. The paper's parts are `soft_mask`, `focal_gamma`, and `masked_captions` with augmentation."""

    soft_mask: bool = option(True, "Also train ITM on matched pairs whose image has a text-driven soft mask.")
    soft_masked_negatives: bool = option(
        False, "Also pair the soft-masked image with a wrong caption; otherwise a mask gives away that a pair matches."
    )
    masked_captions: bool = option(True, "Use the masked caption in ITC and ITM as well; false: only in MLM.")
    itc_weight: float = option(1.0, "Weight of image-text contrast (ITC); 0 disables it.")
    itm_weight: float = option(1.0, "Weight of image-text matching (ITM); 0 disables it.")
    mlm_weight: float = option(1.0, "Weight of masked language modeling (MLM); 0 disables it.")
    mask_probability: float = option(0.15, "Fraction of the tokens that are masked.")
    temperature: float = option(0.07, "Initial ITC temperature, which is learned; model_weights bring their own.")
    gathered_negatives: bool = option(False, "Sample hard ITM negatives from the batches of all ranks.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.mask_probability <= 1, "mask_probability", "in [0, 1]", self.mask_probability)
        _require_at_least(self, 0, "itc_weight", "itm_weight", "mlm_weight")
        _require(0.001 <= self.temperature <= 0.5, "temperature", "in [0.001, 0.5]", self.temperature)
        total = self.itc_weight + self.itm_weight + self.mlm_weight
        _require(total > 0, "itc_weight", "at least one objective with a weight above 0", 0)
        if self.gathered_negatives:  # uniform ones come from the rank's own batch
            start = self.hard_negatives_start
            _require(self.hard_negatives, "hard_negatives", "true with gathered_negatives", self.hard_negatives)
            _require(start == 0, "hard_negatives_start", "0 with gathered_negatives", start)


@dataclass(frozen=True)
class DataConfig(Section):
    """Where the pairs come from and how the images are augmented."""

    data: str = option(
        "shapes",
        "'shapes' (drawn on the fly); WebDataset shards ('cc/{000..331}.tar', a folder, or a comma-separated list) by "
        "path or URL (https://, s3://, gs://); tables (.csv, .tsv, .jsonl, .parquet, or .json of ALBEF, COCO or "
        "Karpathy); or folders of Hugging Face datasets. Tables and folders take a split: 'dataset_coco.json:val'.",
    )
    image_root: str | None = option(
        None,
        "Folder that image paths in tables are relative to; of several ('train2017,val2017'), a "
        "table takes the one that holds its images. Default: the table's folder.",
    )
    image_column: str | None = option(None, "Image column of a table; default: recognized by name.")
    caption_column: str | None = option(
        None, "Caption column of a table, or several separated by commas; default: recognized by name."
    )
    eval_data: str | None = option(
        None, "Held-out data, as in --data; default: none, or unseen scenes when pretraining on shapes."
    )
    eval_size: int | None = option(256, "Held-out samples to evaluate on; 0: all.")
    tokenizer: str | None = option(
        None,
        "Tokenizer folder or hub name; default: that of text_weights, or a WordPiece one trained on the captions.",
    )
    drop_punctuation: bool = option(
        False,
        "Remove punctuation from texts and turn - and / into spaces, as ALBEF does; stored with the tokenizer.",
    )
    crop: bool = option(True, "Random resized crop.")
    crop_scale: float = option(0.2, "Smallest fraction of the image's area that a random crop keeps.")
    flip: bool = option(True, "Horizontal flip with probability 0.5.")
    rand_augment: bool = option(True, "RandAugment with two operations per image.")
    color: bool = option(True, "Brightness, contrast and saturation jitter.")
    blur: bool = option(True, "Gaussian blur with probability 0.5.")
    max_bad_fraction: float = option(0.01, "Training stops when more than this fraction of the samples is unusable.")
    data_threads: int | None = option(
        None, "Threads that decode and augment (and read, without data_workers); default: all cores, at most 16."
    )
    data_workers: int | None = option(
        None,
        "Processes that read, check, tokenize and mask; 0: use threads. Default: half the cores of a rank, at "
        "most 8, if it has a GPU and at least 4 cores; else 0.",
    )
    cache_dir: str | None = option(None, "Folder that caches shards read by URL; default: ~/.cache/softmask_fast.")
    cache_gigabytes: float = option(64.0, "Size limit of cache_dir in GB, shared by all ranks of a machine.")
    shuffle_shards: int = option(8, "Shards read by URL that a rank mixes at a time; changes the data order.")
    prefetch_shards: int = option(2, "Shards read by URL that a rank downloads ahead.")
    download_tries: int = option(5, "Attempts to download a shard before the run stops.")
    download_timeout: float = option(60.0, "Seconds without data after which an attempt fails.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(not self.eval_size or self.eval_size > 0, "eval_size", "at least 0", self.eval_size)


@dataclass(frozen=True)
class TrainConfig(Section):
    """The run: its length, its optimizer, its outputs."""

    output_dir: str | None = option(None, "Output folder; default: runs/<preset or task>-<n>, with the next free n.")
    max_steps: int | None = option(None, "Optimizer steps; overrides epochs.")
    epochs: float = option(30.0, "Passes over the training data.")
    batch_size: int = option(64, "Pairs per rank and forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes per optimizer step.")
    learning_rate: float = option(1e-4, "Peak learning rate.")
    final_learning_rate: float = option(1e-5, "Learning rate at the end of the cosine schedule.")
    warmup_steps: float = option(1000, "Steps of linear warm-up; below 1, a fraction of the run.")
    weight_decay: float = option(0.02, "AdamW weight decay, applied to matrices only.")
    gradient_clipping: float = option(1.0, "Largest gradient norm; 0 disables clipping.")
    bf16: bool | None = option(None, "Train in bfloat16; default: on GPUs that support it.")
    attention: str = option(
        "auto",
        "Text self-attention: 'padded', or packed on a GPU ('varlen', 'xformers'); 'auto': varlen where supported.",
    )
    activation_checkpointing: bool = option(False, "Save memory by recomputing every block in the backward pass.")
    compile: bool | None = option(
        None, "Run the layers through torch.compile; default: on a GPU, if a C compiler is installed. Not with ZeRO-3."
    )
    cuda_graph: bool = option(
        False,
        "Launch whole pretraining steps as CUDA graphs; needs one GPU, ZeRO 0 to 2, hard negatives from the first step "
        "and no gradient accumulation.",
    )
    profile: int = option(0, "Steps to profile, after the first 3, into trace.json of the output folder.")
    seed: int = option(0, "Seed of the weights, the data order and augmentation.")
    resume: bool | str = option(
        False, "Continue the run in output_dir with its options; 'auto': start one if there is none."
    )
    checkpoint_steps: int = option(1000, "Steps between checkpoints.")
    keep_checkpoints: int = option(2, "Newest checkpoints to keep.")
    eval_epochs: float = option(
        0.0, "Epochs between evaluations on the held-out data; 0: only at the end. Fine-tuning defaults to 1."
    )
    eval_steps: int | None = option(None, "Steps between evaluations on the held-out data; overrides eval_epochs.")
    log_steps: int = option(10, "Steps between lines of metrics.jsonl and reports to report_to.")
    report_to: str | None = option(
        "tensorboard",
        "Where metrics go besides metrics.jsonl: tensorboard, wandb, mlflow, a comma-separated list, or none.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least(self, 1, "batch_size", "gradient_accumulation_steps", "log_steps")
        _require_at_least(self, 1, "checkpoint_steps", "keep_checkpoints")
        _require_at_least(self, 0, "profile", "eval_epochs")
        _require_steps_or_share(self, "warmup_steps")
        _require(self.attention in ATTENTIONS, "attention", " or ".join(map(repr, ATTENTIONS)), self.attention)
        for name in report_names(self.report_to):
            _require(name in LOGGERS, "report_to", f"some of {', '.join(LOGGERS)}, or none", name)
        for name in ("max_steps", "eval_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "at least 1", value)
        _require(self.resume in (True, False, "auto"), "resume", "true, false or 'auto'", self.resume)
        _require(not self.resume or self.output_dir is not None, "output_dir", "the folder of the run to resume", None)


def report_names(report_to: str | None) -> list[str]:
    """The names in `report_to`, each once."""
    return list(dict.fromkeys(name.strip() for name in report_to.split(","))) if report_to is not None else []


class RunConfig(Protocol):
    """What the configurations of pretraining and fine-tuning share; a dataclass, stored as config.json."""

    name: str  # names the default output folder
    objectives: MomentumConfig
    data: DataConfig
    train: TrainConfig


@dataclass(frozen=True)
class Config:
    """The configuration of a pretraining run."""

    preset: str
    model: ModelConfig
    objectives: ObjectiveConfig
    data: DataConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        size = self.train.batch_size
        _require(size >= 2 or not self.objectives.itm_weight, "batch_size", "at least 2 (ITM needs another pair)", size)

    @property
    def name(self) -> str:
        return self.preset


# `base` is the paper: the defaults above. The others list what they change.
PRESETS: dict[str, dict[str, Any]] = {
    "base": {},
    "small": {
        "image_size": 128, "vision_model": "vit_small_patch16_224", "vision_width": 192, "vision_depth": 6,
        "vision_heads": 3, "vision_weights": "random", "text_weights": "random", "text_width": 192, "text_heads": 3,
        "text_layers": 2, "fusion_layers": 3, "vocab_size": 4000, "soft_mask_layer": 1, "embed_dim": 128,
        "vision_contrast_blocks": 3, "text_contrast_layers": 1, "contrast_pooling": "mean",
        "match_through_words": True, "soft_masked_negatives": True, "hard_negatives": False,
        "rand_augment": False, "crop_scale": 0.5, "eval_size": 1000,
        "queue_size": 1024, "queue_warmup_steps": 0.7, "momentum": 0.99, "distill_ramp_steps": 0.9,
        "batch_size": 64, "learning_rate": 1e-3, "warmup_steps": 0.1, "epochs": 20.0, "checkpoint_steps": 500,
    },
    # For `shapes`: a flip makes "left of" wrong, RandAugment moves objects out of the picture or changes their color.
    "tiny": {
        "image_size": 64, "vision_model": "vit_tiny_patch16_224", "vision_patch_size": 8, "vision_width": 128,
        "vision_depth": 4, "vision_heads": 4, "vision_weights": "random", "text_weights": "random", "text_width": 128,
        "text_heads": 4, "text_layers": 2, "fusion_layers": 2, "vocab_size": 256, "soft_mask_layer": 0,
        "max_tokens": 32, "embed_dim": 128, "hidden_dropout": 0.0,
        "vision_contrast_blocks": 2, "text_contrast_layers": 1, "contrast_pooling": "mean",
        "match_through_words": True, "soft_masked_negatives": True, "hard_negatives": False,
        "data": "shapes:objects=3", "flip": False, "rand_augment": False, "crop_scale": 0.8,
        "queue_size": 256, "queue_warmup_steps": 0.25, "momentum": 0.98, "distill_ramp_steps": 0.6,
        "batch_size": 32, "max_steps": 1600, "learning_rate": 1e-3, "warmup_steps": 0.06, "checkpoint_steps": 400,
    },
}  # fmt: skip


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise UsageError(f"{name}: expected {expected}, got {got!r:.100}")


def _require_at_least(config: object, least: int, *names: str) -> None:
    for name in names:
        _require(getattr(config, name) >= least, name, f"at least {least}", getattr(config, name))


def _require_steps_or_share(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        fits = value is None or 0 <= value < 1 or value >= 1 and value % 1 == 0
        _require(fits, name, "a fraction of the run from 0 to below 1, or a whole number of steps", value)
