"""Options: flags win over the file, the file over the preset; user errors are named."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from spellings import check_both_spellings, options_of

from softmask_fast.config import GATHERS, PRESETS
from softmask_fast.errors import UsageError
from softmask_fast.ops.focal_itc.module import GATHERS as GATHERS_OF_THE_LOSS
from softmask_fast.options import section_parser, spell
from softmask_fast.tasks import options as task_options
from softmask_fast.training import options as pretraining_options
from softmask_fast.training.deepspeed_engine import read_deepspeed_config
from softmask_fast.training.options import make_config, parse_arguments

ROOT = Path(__file__).parent.parent


def parse(*flags):
    return parse_arguments(["--deepspeed", "ds.json", *flags])[0]


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("preset: small\nlearning_rate: 3.0e-4\nbatch_size: 16\nsoft_mask: false\n")
    config = parse("--config", str(path), "--batch_size", "8")
    assert config.preset == "small" and config.model.image_size == PRESETS["small"]["image_size"]
    assert config.train.learning_rate == 3e-4 and config.train.batch_size == 8 and not config.objectives.soft_mask
    assert config.train.weight_decay == 0.02  # the default
    assert parse("--config", str(path), "--preset", "tiny").model.image_size == PRESETS["tiny"]["image_size"]


def test_json_file(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"epochs": 2, "flip": False}))
    config = parse("--config", str(path))
    assert config.preset == "tiny" and config.train.epochs == 2 and not config.data.flip


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_same_from_flags_and_from_python(preset):
    assert parse("--preset", preset) == make_config(preset)


def test_base_is_the_paper():
    config = make_config("base")
    assert (config.model.image_size, config.model.vision_model) == (256, "vit_base_patch16_224")
    assert (config.model.text_layers, config.model.fusion_layers, config.model.embed_dim) == (6, 6, 256)
    objectives = config.objectives
    assert (objectives.queue_size, objectives.momentum, objectives.distill_alpha) == (65536, 0.995, 0.4)
    assert (objectives.queue_warmup_steps, objectives.mask_probability, objectives.temperature) == (0, 0.15, 0.07)
    train = config.train
    assert (train.learning_rate, train.final_learning_rate, train.weight_decay) == (1e-4, 1e-5, 0.02)
    assert train.epochs == 30 and config.model.soft_mask_layer == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=0.6), r"temperature: expected in \[0.001, 0.5\], got 0.6"),
        (
            dict(soft_mask_layer=5),
            "soft_mask_layer: expected a layer before the last of fusion_layers=6, .* got 5",
        ),
        (dict(text_width=100), "text_width: expected a multiple of text_heads=12, got 100"),
        (dict(batch_size=1), "batch_size: expected at least 2"),
        (dict(momentum=1.5), r"momentum: expected in \[0, 1\], got 1.5"),
        (
            dict(warmup_steps=1.5),
            "warmup_steps: expected a fraction of the run from 0 to below 1, or a whole .* got 1.5",
        ),
        (dict(queue_warmup_steps=float("inf")), "queue_warmup_steps: expected a finite number"),
        (dict(eval_steps=0), "eval_steps: expected at least 1, got 0"),
        (dict(resume=True), "output_dir: expected the folder of the run to resume, got None"),
        (
            dict(itc_weight=0, itm_weight=0, mlm_weight=0),
            "itc_weight: expected at least one objective with a",
        ),
        (dict(hard_negatives=False, gathered_negatives=True), "hard_negatives: expected true with gathered_negatives"),
        (dict(learnin_rate=1), "unknown option 'learnin_rate'; did you mean learning_rate\\?"),
    ],
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        make_config("base", **options)


def test_unknown_options_in_the_file_are_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("batchsize: 8\n")
    with pytest.raises(ValueError, match=r"run.yaml: unknown option 'batchsize'; did you mean batch_size\?"):
        parse("--config", str(path))
    path.write_text("- batch_size\n")
    with pytest.raises(ValueError, match="expected a mapping of options, got list"):
        parse("--config", str(path))


def test_the_gathers_are_those_of_the_loss():
    assert GATHERS == GATHERS_OF_THE_LOSS


def test_options_have_one_spelling():
    given = ["--batch-size", "8", "--a-b=0", "--no-colour", "--data", "a--b-c", "--image-root=a-b", "--", "--c-d"]
    expected = ["--batch_size", "8", "--a_b=0", "--no_color", "--data", "a--b-c", "--image_root=a-b", "--", "--c-d"]
    assert spell(given) == expected


@pytest.mark.parametrize("module", [pretraining_options, task_options], ids=["train.py", "finetune.py"])
def test_every_option_takes_both_spellings(module):
    parser = section_parser(module.SECTIONS, "preset", PRESETS, "tiny", module.ABOUT)
    for option in options_of(parser):
        check_both_spellings(parser, option)
    shown = parser.format_help()
    assert "--batch_size" in shown and "--batch-size" not in shown and "colour" not in shown


@pytest.mark.parametrize("mistyped", ["--bach_size", "--batch", "--batch-sise"])
def test_a_mistyped_or_shortened_option_is_refused_with_a_suggestion(capsys, mistyped):
    with pytest.raises(SystemExit) as stopped:
        parse(mistyped, "8")
    assert stopped.value.code == 2
    assert f"unknown option: {mistyped.replace('-s', '_s')}; did you mean --batch_size?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--batch_size", "many"), "argument --batch_size: expected an integer, got 'many'"),
        (("--max_steps", "many"), "argument --max_steps: expected an integer or none, got 'many'"),
        (("--flip", "maybe"), "argument --flip: expected true or false, got 'maybe'"),
        (("tiny",), "unexpected argument: tiny"),
    ],
)
def test_values_of_another_type_are_named(capsys, flags, message):
    with pytest.raises(SystemExit):
        parse(*flags)
    assert message in capsys.readouterr().err


def test_help_begins_with_what_everybody_needs_and_has_the_defaults_of_the_preset(capsys):
    shown = {}
    for preset in ("small", "base"):
        with pytest.raises(SystemExit) as stopped:
            parse("--help", "--preset", preset)
        assert stopped.value.code == 0
        text = shown[preset] = " ".join(capsys.readouterr().out.split())
        places = [
            text.index(word) for word in ("--preset", "--data TEXT", "--resume", "model: Sizes", "--image_size N")
        ]
        assert places == sorted(places)
        assert "--no_flip" not in text and "local_rank" not in text
    assert "input image in pixels. [128]" in shown["small"] and "input image in pixels. [256]" in shown["base"]
    assert "Random resized crop. [true]" in shown["base"]


def store(folder, config, **more) -> None:
    folder.mkdir(exist_ok=True)
    name = more.pop("name", "config.json")
    (folder / name).write_text(json.dumps({"config": asdict(config), **more}))


def test_a_resumed_run_has_the_options_that_it_stored(tmp_path):
    run = tmp_path / "run"
    stored = make_config("small", batch_size=8, max_steps=40, flip=False, compile=True, eval_data="held.tar")
    store(run, stored, deepspeed={"zero_optimization": {"stage": 3}})
    resume = ("--output_dir", str(run), "--resume", "true")
    config, launch = parse_arguments(resume)
    assert config.preset == "small" and config.model == stored.model and config.data == stored.data
    expected = replace(stored.train, output_dir=str(run), resume=True, compile=None)
    assert config.train == expected
    assert launch.deepspeed == {"zero_optimization": {"stage": 3}}

    path = tmp_path / "run.json"
    path.write_text(json.dumps({"batch_size": 16, "seed": 3, "max_steps": 50}))
    given = ("--config", str(path), "--max_steps", "60", "--eval_data", "none", "--deepspeed", "ds.json")
    config, launch = parse_arguments([*resume, *given])
    assert (config.train.batch_size, config.train.seed, config.train.max_steps) == (16, 3, 60)
    assert config.data.eval_data is None and launch.deepspeed == "ds.json"

    store(run, replace(stored, train=replace(stored.train, batch_size=4)), name="config-from-step-00000020.json")
    assert parse_arguments(resume)[0].train.batch_size == 4  # what it was resumed with
    assert parse_arguments([*resume[:2]])[0].preset == "tiny"  # not resumed
    record = json.loads((run / "config.json").read_text())
    del record["config"]["train"]["warmup_steps"]  # a run of before this option
    (run / "config-from-step-00000020.json").write_text(json.dumps(record))
    assert PRESETS["small"]["warmup_steps"] != parse_arguments(resume)[0].train.warmup_steps == 1000
    with pytest.raises(UsageError, match=f"preset: expected 'small', as in the run in {run}, got 'tiny'"):
        parse_arguments([*resume, "--preset", "tiny"])


def test_what_was_stored_without_its_secrets_is_given_again(tmp_path):
    run, path = tmp_path / "run", tmp_path / "run.yaml"
    store(run, make_config("tiny", data="https://host/a.tar", seed=3), incomplete=["data"])
    resume = ("--output_dir", str(run), "--resume", "auto")
    with pytest.raises(UsageError, match="^data: pass it again: it was stored without its password or signature$"):
        parse_arguments(resume)
    path.write_text("data: https://host/a.tar?sig=2")
    for given in (["--data", "https://host/a.tar?sig=2"], ["--config", str(path)]):
        config, _ = parse_arguments([*resume, *given])
        assert config.data.data == "https://host/a.tar?sig=2" and config.train.seed == 3
    with pytest.raises(SystemExit):
        parse_arguments([*resume, "--help"])


def test_without_a_file_deepspeed_has_the_configuration_of_ds_json():
    train = make_config("tiny").train
    ours = read_deepspeed_config(parse_arguments([])[1].deepspeed, train)
    assert ours == read_deepspeed_config(str(ROOT / "ds.json"), train)
    stored = ours | {"train_micro_batch_size_per_gpu": 7}  # of a run with another batch
    assert read_deepspeed_config(stored, train) == ours


def test_renamed_options_are_still_read(tmp_path):
    assert not parse("--colour", "false").data.color and not parse("--no-colour").data.color
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"colour": False}))
    assert not parse("--config", str(path)).data.color


@pytest.mark.parametrize("name", ["deep.json", "deep.yaml"])
def test_a_configuration_that_is_nested_too_deep_is_an_error_of_one_line(tmp_path, name):
    (tmp_path / name).write_text("[" * 20_000)
    with pytest.raises(UsageError, match=f"--config: .*{name} cannot be read: .*(nested|recursion)"):
        parse_arguments(["--config", str(tmp_path / name), "--deepspeed", "ds.json"])
