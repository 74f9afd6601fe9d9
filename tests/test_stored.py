"""What commit 107101d wrote is still valid: its run is resumed, its model folder loads.

tests/stored/run is a run of that commit, without what resuming does not read (1 thread, PyTorch 2.11, AVX-512):

    OMP_NUM_THREADS=1 deepspeed --num_accelerators 1 softmask_fast/train.py --deepspeed ds.json --output_dir run \
        --data shapes:num=16 --image_size 16 --vision_width 8 --vision_depth 1 --vision_heads 2 --text_width 8 \
        --text_heads 2 --text_layers 1 --fusion_layers 2 --text_positions 32 --embed_dim 8 --vocab_size 64 \
        --hidden_dropout 0.1 --queue_size 8 --queue_warmup_steps 1 --distill_ramp_steps 2 --warmup_steps 1 \
        --eval_size 12 --batch_size 4 --max_steps 4 --log_steps 1 --checkpoint_steps 2 --data_threads 1 --colour false

tests/stored/outputs.json is what its model then gave for the image and text below.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from runs import finish, launch, metrics
from safetensors.torch import load_file

from softmask_fast.config import RENAMED
from softmask_fast.data.sources import open_source
from softmask_fast.errors import UsageError
from softmask_fast.evaluation.record import parse_record
from softmask_fast.model.export import read_model
from softmask_fast.training.options import parse_arguments
from softmask_fast.training.run_record import check_same_run

STORED = Path(__file__).parent / "stored"
# The bits of a sum depend on its order: today's layers join query, key and value; vector width and libraries do, too.
TOLERANCE = {"rel": 1e-4, "abs": 1e-6}
# Options that did not exist then, which the preset sets today.
LATER = {
    "vision_contrast_blocks": 0,
    "text_contrast_layers": 0,
    "contrast_pooling": "cls",
    "match_through_words": False,
    "soft_masked_negatives": False,
}


def stored_run(folder):
    """A copy of the stored run after its second step, and its options."""
    run = folder / "run"
    shutil.copytree(STORED / "run", run)
    shutil.rmtree(run / "model")
    config = json.loads((run / "config.json").read_text())["config"]
    options = dict(LATER)
    for section in ("model", "objectives", "data", "train"):
        options |= {name: value for name, value in config[section].items() if value is not None}
    del options["output_dir"]
    return run, options


def updates(run) -> str:
    return json.loads((run / "config-from-step-00000002.json").read_text())["updates"]


def test_a_stored_run_is_resumed(tmp_path):
    run, options = stored_run(tmp_path)
    assert "contrast.image_queue" in load_file(run / "checkpoints/step-00000002/teacher.safetensors")  # its name then
    assert "colour" in options and "colour" in RENAMED  # a renamed option, among those of the stored run
    text = finish(launch(run, cwd=tmp_path, common=options | {"resume": True}))
    assert re.search(r"^resumed +after step 2$", text, re.MULTILINE)
    assert updates(run) == "direct"
    expected, resumed = metrics(STORED / "run"), metrics(run)
    assert resumed.keys() == expected.keys() == {1, 2, 3, 4}
    for step, line in expected.items():
        found = {name: resumed[step][name] for name in line}  # today more is logged
        assert found == pytest.approx(line, **TOLERANCE), step
    before, after = (load_file(folder / "model/model.safetensors") for folder in (STORED / "run", run))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=TOLERANCE["rel"], atol=TOLERANCE["abs"])
    changed = launch(run, cwd=tmp_path, common=options | {"resume": True, "colour": True})
    assert "resume: expected color False, as in" in finish(changed, 2)


def test_a_stored_run_is_not_resumed_with_what_the_preset_changed_since(tmp_path):
    run, options = stored_run(tmp_path)
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    check_same_run(run, parse_arguments(["--deepspeed", "ds.json", *flags])[0])
    for name, was, today in (("contrast_pooling", "cls", "mean"), ("soft_masked_negatives", False, True)):
        with pytest.raises(UsageError, match=f"^resume: expected {name} {was!r}, as in {run}, got {today!r}$"):
            check_same_run(run, parse_arguments(["--deepspeed", "ds.json", *flags, f"--{name}", str(today)])[0])


def test_a_stored_run_of_one_rank_is_resumed_by_two(tmp_path):
    """Their losses are others: each rank has its own half of the batch, with its own dropout."""
    run, options = stored_run(tmp_path)
    text = finish(launch(run, cwd=tmp_path, ranks=2, common=options | {"resume": True, "batch_size": 2}))
    changed = r"^resumed +after step 2; batch_size 4 -> 2; world_size 1 -> 2$"
    assert re.search(changed, text, re.MULTILINE), text
    assert updates(run) == "DeepSpeed's engine (2 ranks)"
    assert metrics(run).keys() == {1, 2, 3, 4}
    before, after = (load_file(folder / "model/model.safetensors") for folder in (STORED / "run", run))
    rate = options["learning_rate"]
    for name, tensor in before.items():  # two of Adam's steps lie between, on either side
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=4 * rate, msg=name)
    (shard,) = (run / "checkpoints/step-00000004").glob("*pp_rank_1_*optim_states.pt")
    optimizer = torch.load(shard, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]
    assert [int(state["step"]) for state in optimizer["state"].values()] == [4, 4]


def test_a_stored_model_gives_the_same_outputs():
    model, tokenizer = read_model(STORED / "run" / "model")
    sample = open_source("shapes:num=4", split="val", seed=0, image_size=16).read(0)
    pixels = torch.from_numpy(sample.image).permute(2, 0, 1)[None].float() / 255
    text = tokenizer(sample.captions[0], truncation=True, max_length=32, return_tensors="pt")
    ids, mask = text["input_ids"], text["attention_mask"].bool()
    with torch.no_grad():
        found = {
            "image_features": model.encode_image(pixels)[1],
            "text_features": model.encode_text(ids, mask)[1],
            "match_logits": model.match_logits(pixels, ids, mask),
        }
    expected = json.loads((STORED / "outputs.json").read_text())
    assert model.temperature.item() == expected.pop("temperature")
    for name, values in expected.items():
        assert found[name][0].tolist() == pytest.approx(values, **TOLERANCE), name


def test_a_record_of_an_older_version_is_refused_by_name():
    for old in ([{"task": "a", "score": 0.5}], {"task": "a", "score": 0.5}):
        with pytest.raises(UsageError, match="run/evaluation.json: .*older version"):
            parse_record(json.dumps(old), Path("run/evaluation.json"))
