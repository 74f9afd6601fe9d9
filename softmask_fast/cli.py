"""The command `softmask-fast`: prepare data; train, evaluate and explain models; examine the machine.

Each command imports only what it needs, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softmask_fast import __version__
from softmask_fast.errors import UsageError, format_error, is_user_error, one_line, printable, until_unread
from softmask_fast.hub import local_folder, model_folder
from softmask_fast.installation import explain_missing
from softmask_fast.options import CommandParser
from softmask_fast.utils import write_json

if TYPE_CHECKING:
    import torch

    from softmask_fast.evaluation.tables import Report

PRETRAINED = ("retrieval", "grounding", "maps")  # tasks that need no fine-tuning
TASKS = (*PRETRAINED, "vqa", "nlvr2", "entailment")
SCENE = "shapes:"  # in place of an image: a scene by its number


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 1 if `doctor` found a fault, 2 after a user error or if the output
    cannot be written, 141 if its reader has gone."""
    return until_unread(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    options, others = parser.parse_known_args(argv)
    if others and options.run not in (_train, _finetune, _ablate):
        options.parser.refuse(others)
    options.others = others
    logging.basicConfig(format="%(message)s")
    logging.getLogger("softmask_fast.data.tables").setLevel(logging.INFO)  # names what was guessed
    try:
        return options.run(options) or 0
    except (ValueError, OSError, ModuleNotFoundError) as error:
        missing = isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("softmask_fast")
        if options.debug or not (missing or is_user_error(error)):
            raise
        print(f"softmask-fast: error: {_explain_error(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="softmask-fast", description="Prepare data; train, evaluate and explain models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add_command(name: str, run: Callable, help: str, *parents: CommandParser, **settings: Any) -> CommandParser:
        command = commands.add_parser(name, help=help, description=run.__doc__, parents=parents, **settings)
        command.set_defaults(run=run, parser=command, debug=False)
        return command

    def columns(group: argparse._ActionsContainer) -> None:
        for kind in ("image", "caption"):
            help = f"{kind.capitalize()} column of a table (default: recognized by name)."
            group.add_argument(f"--{kind}_column", metavar="NAME", help=help)

    debug = CommandParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    model = CommandParser(add_help=False, parents=[debug])
    own_help = "Model folder exported by training (RUN/model), or 'demo'."
    model.add_argument("--model", required=True, type=_model, metavar="DIR", help=own_help)
    model.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: cuda if available).")
    layer_help = "Fusion layer of the word maps; 0 is the first (default: that of the soft masks)."

    evaluate = add_command("evaluate", _evaluate, "Evaluate a model on a task.", model)
    data_help = (
        "Shards ('val-{000..003}.tar'), tables, folders of Hugging Face datasets, a comma-separated list of these, "
    )
    data_help += "JSON entries of a task, or 'shapes'."
    evaluate.add_argument("--data", required=True, metavar="DATA", help=data_help)
    evaluate.add_argument("--task", required=True, choices=TASKS, help="What to measure.")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="Also write the metrics to this file.")
    evaluate.add_argument("--limit", type=int, metavar="N", help="Evaluate on the first N samples.")
    page_help = "Also draw heat maps for the words of the first ten samples, good or bad."
    evaluate.add_argument("--heatmaps", type=Path, metavar="FILE.png", help=page_help)
    evaluate.add_argument("--batch_size", type=int, default=64, metavar="N", help="Images per batch (default: 64).")
    retrieval = evaluate.add_argument_group("retrieval")
    captions_help = "Captions of each image to use (default: all, as papers do)."
    retrieval.add_argument("--captions", choices=("all", "first"), default="all", help=captions_help)
    rerank_help = "Candidates per query that image-text matching (ITM) re-ranks; 0: none (default: 16, an eighth of "
    rerank_help += "the work of ALBEF's 128, the default of finetune's --candidates)."
    retrieval.add_argument("--rerank", type=int, default=16, metavar="K", help=rerank_help)
    score_help = 'Score that ITM ranks by: its log-odds (default), or the logit of "matched" alone, as in ALBEF.'
    retrieval.add_argument("--match_score", choices=("log_odds", "logit"), default="log_odds", help=score_help)
    evaluate.add_argument_group("grounding, maps").add_argument("--layer", type=int, metavar="N", help=layer_help)
    entries = evaluate.add_argument_group("tables, tasks with JSON data")
    entries.add_argument(
        "--image_root", metavar="DIR", help="Folder that image paths are relative to (default: the table's)."
    )
    columns(entries)
    entries.add_argument("--answers", metavar="FILE", help="vqa: JSON list of answers to rank (default: the model's).")
    entries.add_argument("--predictions", type=Path, metavar="FILE", help="Write the predicted answers here, as JSON.")

    maps = CommandParser(add_help=False, parents=[debug])
    any_help = "Model folder (of this library, transformers or open_clip), name on the Hugging Face hub, or 'demo'."
    maps.add_argument("--model", required=True, type=_model, metavar="DIR|NAME", help=any_help)
    maps.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: cuda if available).")
    image_help = "JPEG, PNG or WebP files; shapes:N is the Nth unseen scene of colored shapes (default: shapes:0)."
    images = dict(nargs="+", type=Path, default=[Path("shapes:0")])
    maps.add_argument("--image", metavar="FILE", help=image_help, **images)
    text_help = (
        "Caption of the image, right or wrong, or a question for models that answer (default: a scene's caption; "
    )
    text_help += "files need one, unless the model writes)."
    maps.add_argument("--text", metavar="TEXT", help=text_help)
    maps.add_argument("--answer", metavar="TEXT", help="Explain this answer (default: the model's own).")
    layer_of_help = "Layer of the word maps; 0 is the first (default: depends on the model, see docs/word_maps.md)."
    maps.add_argument("--layer", type=int, metavar="N", help=layer_of_help)

    explain = add_command("explain", _explain, "Draw a heat map for each word of a text.", maps)
    out_help = "PNG to write; for several images, a folder of PNGs."
    explain.add_argument("--out", required=True, type=Path, metavar="FILE.png|DIR", help=out_help)
    json_help = "Also write all words and the statistics of their maps."
    explain.add_argument("--json", type=Path, metavar="FILE", help=json_help)
    npy_help = "Also write the maps as arrays, by image and word."
    explain.add_argument("--npy", type=Path, metavar="FILE.npz", help=npy_help)

    features = add_command("features", _features, "Write a table of statistics of word maps.", maps)
    features_help = "File to write, with one row per image and word."
    features.add_argument("--out", required=True, type=Path, metavar="FILE.parquet|FILE.npz", help=features_help)

    export = add_command("export", _export, "Copy a model folder in half precision.", debug)
    export.add_argument(
        "--model", required=True, type=Path, metavar="DIR", help="Model folder of a pretraining run, RUN/model."
    )
    export.add_argument("--out", required=True, type=Path, metavar="DIR", help="Folder to write.")

    prepare = add_command("prepare", _prepare, "Make shards from images and a table of captions.", debug)
    table_help = (
        "Table (.csv, .tsv, .json, .jsonl, .parquet), folder of a Hugging Face dataset, or a split: coco.json:val."
    )
    prepare.add_argument("--pairs", required=True, metavar="TABLE", help=table_help)
    images_help = "Folder that image paths are relative to (default: the table's)."
    prepare.add_argument("--images", type=Path, metavar="DIR", help=images_help)
    prepare.add_argument("--out", required=True, type=Path, metavar="DIR", help="New folder for the shards.")
    columns(prepare)
    prepare.add_argument("--shard_size", type=int, default=5000, metavar="N", help="Images per shard (default: 5000).")
    side_help = "Shrink images whose short side is longer to this (default: no limit)."
    prepare.add_argument("--short_side", type=int, metavar="PIXELS", help=side_help)
    prepare.add_argument("--workers", type=int, metavar="N", help="Processes that decode (default: one per core).")

    devices = CommandParser(add_help=False)
    devices_help = "GPUs of this machine to train on (default: all); without GPUs, processes (default: 1)."
    devices.add_argument_group("devices").add_argument("--devices", type=int, metavar="N", help=devices_help)
    # the scripts answer --help themselves
    for name, run, help in (
        ("train", _train, "Pretrain a model."),
        ("finetune", _finetune, "Fine-tune a pretrained model for a task."),
    ):
        add_command(name, run, help, devices, add_help=False).set_defaults(shown=[devices])

    others = "All other options go to every run, as in `softmask-fast train`: --data, --preset, --epochs ..."
    ablate_help = "Compare the parts of the method."
    ablate = add_command("ablate", _ablate, ablate_help, debug, epilog=others)
    ablate.add_argument(
        "--output_dir", required=True, type=Path, metavar="DIR", help="Folder for the runs, table and figure."
    )
    ablate.add_argument("--seeds", type=int, default=3, metavar="N", help="Runs per row, one per seed (default: 3).")
    ablate.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed configuration (default: ZeRO stage 1).")
    launcher_help = "Options of the deepspeed launcher: --launcher='--num_gpus 4'."
    ablate.add_argument("--launcher", default="", metavar="OPTIONS", help=launcher_help)

    index = add_command("index", _index, "Index shards before uploading them.", debug)
    index.add_argument("shards", nargs="+", metavar="SHARDS", help="Local .tar files, patterns or folders of them.")

    doctor = add_command("doctor", _doctor, "Examine this machine and installation.", debug)
    doctor.add_argument("--json", type=Path, metavar="FILE", help="Also write the report to this file.")
    return parser


def _train(options: argparse.Namespace) -> int:
    """Pretrain a model with SoftMask++."""
    return _start("train", options)


def _finetune(options: argparse.Namespace) -> int:
    """Fine-tune a pretrained model for a task."""
    return _start("finetune", options)


def _start(script: str, options: argparse.Namespace) -> int:
    _quiet_libraries()
    from softmask_fast.launcher import start

    return start(script, options.others, options.devices, options.shown)


def _evaluate(options: argparse.Namespace) -> None:
    """Evaluate a model. `retrieval` prints recall@1, 5 and 10; `grounding`, how well word maps point at the boxes of
    the words; `maps`, the same for attention maps, rollout and Grad-CAM as well; `vqa`, `nlvr2` and `entailment`, the
    accuracy of a model fine-tuned for that task."""
    for name in ("json", "predictions", "heatmaps"):
        if getattr(options, name) is not None:
            _check_output(getattr(options, name), f"--{name}")
    _check_model(options.model)
    _quiet_libraries()
    common = {"batch_size": options.batch_size, "limit": options.limit, "progress": sys.stderr.isatty()}
    report = (_evaluate_pretrained if options.task in PRETRAINED else _evaluate_answers)(options, common)
    print(report.table())
    for key, reason in report.skipped.items():
        print(printable(f"skipped {key}: {reason}"), file=sys.stderr)
    if options.json is not None:
        from softmask_fast.evaluation.record import evaluation_record

        write_json(options.json, evaluation_record([report], options.data, options.limit, model=str(options.model)))
        print(f"written to {options.json}")
    if options.predictions is not None:
        write_json(options.predictions, report.predictions)
        print(f"written to {options.predictions}")
    if options.heatmaps is not None:
        print(f"written to {options.heatmaps}")


def _evaluate_pretrained(options: argparse.Namespace, common: dict[str, Any]) -> Report:
    if options.predictions or options.answers:
        raise UsageError(
            f"--predictions, --answers: expected only with a task that has answers, got --task {options.task}"
        )
    from softmask_fast.data.sources import open_source, refuse_columns
    from softmask_fast.data.synthetic import HELD_OUT
    from softmask_fast.evaluation import evaluate_grounding, evaluate_maps, evaluate_retrieval
    from softmask_fast.model.export import read_model
    from softmask_fast.tasks.datasets import open_expressions

    model, tokenizer = read_model(options.model, _device(options.device))
    opened = HELD_OUT | {"image_size": model.config.image_size, "image_root": options.image_root}
    named = {"image_column": options.image_column, "caption_column": options.caption_column}
    if options.task != "retrieval" and options.data.endswith(".json"):
        refuse_columns(options.data, **named)
        source = open_expressions(options.data, **opened)
    else:
        source = open_source(options.data, **opened, **named)
    if options.heatmaps is not None:
        from softmask_fast.evaluation.heatmaps import heatmap_page

        heatmap_page(model, tokenizer, source, options.heatmaps, layer=options.layer)
    if options.task == "retrieval":
        chosen = {name: getattr(options, name) for name in ("captions", "rerank", "match_score")}
        return evaluate_retrieval(model, tokenizer, source, **chosen, **common)
    evaluate = evaluate_grounding if options.task == "grounding" else evaluate_maps
    return evaluate(model, tokenizer, source, layer=options.layer, **common)


def _evaluate_answers(options: argparse.Namespace, common: dict[str, Any]) -> Report:
    if options.heatmaps:
        raise UsageError(f"--heatmaps: expected only with --task {', '.join(PRETRAINED)}, got --task {options.task}")
    from softmask_fast.config import DataConfig
    from softmask_fast.data.synthetic import HELD_OUT
    from softmask_fast.tasks import recipes
    from softmask_fast.tasks.answers import evaluate_answers
    from softmask_fast.tasks.models import load_task_model
    from softmask_fast.tasks.vqa import read_answers

    model, tokenizer = load_task_model(options.model, options.task, _device(options.device))
    if options.answers:
        if options.task != "vqa":
            raise UsageError(f"--answers: expected only with --task vqa, got --task {options.task}")
        model.answers = read_answers(options.answers)
    named = {name: getattr(options, name) for name in ("image_root", "image_column", "caption_column")}
    size = model.config.image_size
    source = recipes.TASKS[options.task].open(options.data, DataConfig(**named), image_size=size, **HELD_OUT)
    return evaluate_answers(model, tokenizer, source, **common)


def _explain(options: argparse.Namespace) -> None:
    """Draw where a model looks for each word of a text that names something: one heat map per word, over the image.
    One image makes a PNG, several make a folder of them. The printed table and --json list all words."""
    several = len(options.image) > 1
    if several == (options.out.suffix.lower() == ".png"):
        expected = "a folder for several images" if several else "a name that ends in .png"
        raise UsageError(f"--out: expected {expected}, got {options.out}")
    if options.npy is not None and options.npy.suffix != ".npz":
        raise UsageError(f"--npy: expected a name that ends in .npz, got {options.npy}")
    outputs = {"--json": options.json, "--npy": options.npy} | ({} if several else {"--out": options.out})
    explain = _open_explainer(options, outputs)
    from softmask_fast.word_maps import explain_files, write_arrays

    records, arrays = explain_files(explain, options.image, options.out)
    if options.json is not None:
        write_json(options.json, records)
        print(f"written to {options.json}")
    if options.npy is not None:
        write_arrays(arrays, options.npy)
        print(f"written to {options.npy}")


def _features(options: argparse.Namespace) -> None:
    """Write one row for each word of each image, as .parquet or .npz, for classical learners: statistics of its map and
    of the colors under it, and the image's features pooled under it."""
    if options.out.suffix not in (".parquet", ".npz"):
        raise UsageError(f"--out: expected a name that ends in .parquet or .npz, got {options.out}")
    explain = _open_explainer(options, {"--out": options.out})
    from softmask_fast.word_maps import feature_table, write_table

    columns = feature_table(explain, options.image)
    write_table(columns, options.out)
    print(f"{len(columns['word'])} words with {len(columns)} columns written to {options.out}")


def _open_explainer(options: argparse.Namespace, outputs: dict[str, Path | None]) -> Callable:
    """Checks every argument before the model is opened."""
    if options.text is not None and not options.text.split():
        raise UsageError("--text: expected at least one word, got none")
    for option, text in (("--text", options.text), ("--answer", options.answer)):
        if text is not None and any(0xD800 <= ord(letter) < 0xE000 for letter in text):
            raise UsageError(f"{option}: expected UTF-8 text, got {text!r}")
    for image in options.image:
        if not str(image).startswith(SCENE):
            image.open("rb").close()
    if len({image.stem for image in options.image}) < len(options.image):
        raise UsageError("--image: expected files with different names, as figures and maps are named after them")
    for option, path in outputs.items():
        if path is not None:
            _check_output(path, option)
    _quiet_libraries()
    folder = model_folder(options.model)
    from softmask_fast.word_maps import explainer

    return explainer(folder, _device(options.device), options.text, options.layer, options.answer)


def _export(options: argparse.Namespace) -> None:
    """Copy a model folder with its weights in float16, at half the size. Loading turns them back into float32."""
    _quiet_libraries()
    from softmask_fast.model.export import own_state, read_model, save_model

    _check_model(options.model)
    model, tokenizer = read_model(options.model)
    halves = {name: x.half() if x.is_floating_point() else x for name, x in own_state(model).items()}
    save_model(model, tokenizer, options.out, halves)
    print(f"written to {options.out}")


def _prepare(options: argparse.Namespace) -> None:
    """Decode every image of a table, write the usable ones as indexed WebDataset shards, and list the others. The same
    command resumes an interrupted run."""
    from softmask_fast.data.prepare import make_shards

    summary = make_shards(
        options.pairs, options.images, options.out, shard_size=options.shard_size, short_side=options.short_side,
        image_column=options.image_column, caption_column=options.caption_column, workers=options.workers,
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    print(f"{summary.samples} of {summary.listed} images written to {summary.shards} shards in {options.out}")
    if summary.skipped_captions:
        print(f"{summary.skipped_captions} captions without a word were skipped")
    for row, image, reason in summary.bad[:10]:
        print(printable(f"row {row}: {image}: {reason}"), file=sys.stderr)
    if summary.bad:
        print(f"{len(summary.bad)} images cannot be used; {options.out / 'bad.csv'} lists them", file=sys.stderr)


def _ablate(options: argparse.Namespace) -> None:
    """Pretrain the baseline, the baseline plus each part of the method (augmentation, soft masks, focal loss), and the
    whole method, with several seeds each. Write a table (JSON, Markdown) and a figure. The same command resumes."""
    _quiet_libraries()
    from softmask_fast.training.ablation import markdown, run_ablation

    content = run_ablation(
        options.others, options.output_dir, seeds=options.seeds, deepspeed=options.deepspeed, launcher=options.launcher
    )
    print(f"\n{markdown(content['rows'], content)}\ntable and figure: {options.output_dir}")


def _index(options: argparse.Namespace) -> None:
    """Write NAME.tar.index.jsonl next to each shard. Upload it with the shards: without it, training by URL downloads
    every shard once before the first step."""
    from softmask_fast.data.prepare import write_indexes

    print(f"{write_indexes(options.shards, progress=sys.stderr.isatty())} indexes written")


def _doctor(options: argparse.Namespace) -> int:
    """Show versions, devices, compiled libraries, and which implementation each operator chooses on this machine and
    why. Then test every implementation that runs here, for up to ten seconds. Exit with status 1 if a test fails."""
    if options.json is not None:
        _check_output(options.json, "--json")
    from softmask_fast import doctor

    report = doctor.examine()
    print(doctor.render(report))
    if options.json is not None:
        write_json(options.json, report)
        print(f"written to {options.json}")
    return 0 if doctor.passed(report) else 1


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device: {one_line(error)}") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device: expected cpu or cuda, got {name}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device: expected one of {torch.cuda.device_count()} CUDA devices, got {name}")
    return device


def _model(name: str) -> Path:
    """The folder of a model, or its possible name on the hub."""
    return local_folder(name) or Path(name)


def _check_model(directory: Path) -> None:
    if not directory.is_dir():
        raise UsageError(f"--model: expected a model directory, got {directory}")


def _check_output(path: Path, option: str) -> None:
    """Refuses a wrong path, and makes its folder, before the work starts."""
    if path.is_dir():
        raise UsageError(f"{option}: expected a file name, got the folder {path}")
    path.absolute().parent.mkdir(parents=True, exist_ok=True)


def _quiet_libraries() -> None:
    """Silences the libraries' start-up messages."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _explain_error(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name != "pyarrow":
        return explain_missing(error)
    return format_error(error)


if __name__ == "__main__":
    sys.exit(main())
