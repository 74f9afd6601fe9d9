"""The tasks: their examples, what their models compute, and their metrics by the official definitions."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from code_blocks import ROOT, blocks_of
from PIL import Image
from small_models import TWO_HEADS, small_model

from softmask_fast.cli import main
from softmask_fast.config import DataConfig, MomentumConfig, TrainConfig
from softmask_fast.data.augment import AugmentConfig
from softmask_fast.data.synthetic import COLORS, ShapesSource, relation
from softmask_fast.data.tokenizer import train_tokenizer
from softmask_fast.data.types import BadSample
from softmask_fast.errors import UsageError
from softmask_fast.evaluation.boxes import intersection_over_union, proposal_score
from softmask_fast.evaluation.vqa_accuracy import vqa_accuracy
from softmask_fast.model.export import read_model, save_model
from softmask_fast.tasks.answers import evaluate_answers
from softmask_fast.tasks.base import distilled_cross_entropy
from softmask_fast.tasks.datasets import open_examples, open_expressions
from softmask_fast.tasks.entailment import EntailmentModel
from softmask_fast.tasks.loader import ExampleLoader
from softmask_fast.tasks.models import load_task_model
from softmask_fast.tasks.nlvr2 import LEFT, NEITHER, RIGHT, NLVR2Model, TextAssignmentModel, assign
from softmask_fast.tasks.options import FinetuneConfig, TaskConfig
from softmask_fast.tasks.recipes import TASKS
from softmask_fast.tasks.synthetic import ANSWERS, UNSEEN_PROPERTIES, ShapesTask
from softmask_fast.tasks.vqa import VQAModel, read_answers

SIZE = 32
MODELS = {"vqa": VQAModel, "nlvr2": NLVR2Model, "entailment": EntailmentModel}
SPLIT_OPTIONS = dict(seed=0, image_size=SIZE)


def entries(task, split="train", **options):
    source = ShapesTask(task, ShapesSource(split=split, **SPLIT_OPTIONS, **{"num": 200} | options))
    return source, [source.entry(index) for index in range(len(source))]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [e["question"] for e, _ in entries("vqa")[1]] + [e["sentence"] for e, _ in entries("nlvr2")[1]]
    return train_tokenizer(texts + [e["sentence"] for e, _ in entries("entailment")[1]] + [*COLORS, "the"], 200)


@pytest.fixture
def base(tokenizer):
    return small_model(tokenizer, **TWO_HEADS, image_size=SIZE, fusion_layers=2).eval()


def make(task, base, tokenizer):
    model = VQAModel(base, tokenizer, ANSWERS) if task == "vqa" else MODELS[task](base, tokenizer)
    return model.eval()


def inputs(model, tokenizer, texts):
    text = tokenizer(texts, padding=True, return_tensors="pt")
    pixels = torch.randn(model.images_per_example * len(texts), 3, SIZE, SIZE)
    return pixels, text["input_ids"], text["attention_mask"].bool()


def test_questions_about_shapes_have_the_answer_that_is_drawn():
    source, made = entries("vqa", names="color")
    kinds = {"relation": 0, "yes": 0, "no": 0}
    for index, (entry, _) in enumerate(made):
        scene, _ = source.scene(index)
        colors = [thing.color for thing in scene]
        (answer,) = set(entry["answer"])
        words = entry["question"].split()
        if words[:3] == ["is", "there", "a"]:
            assert answer == ("yes" if words[3] in colors else "no")
            kinds[answer] += 1
        else:
            other = scene[colors.index(words[-2])]
            asked = " ".join(words[3 : words.index("the")])
            others = [thing for thing in scene if thing is not other]
            assert [thing.color for thing in others if relation(thing, other) == asked] == [answer]
            kinds["relation"] += 1
    assert min(kinds.values()) > 25
    for index, (entry, _) in enumerate(entries("vqa", num=100)[1]):
        assert set(entry["answer"]) <= set(ANSWERS), index


def test_statements_and_pairs_of_shapes_are_true_as_labeled():
    source, made = entries("entailment")
    for index, (entry, _) in enumerate(made):
        names = [thing.name for thing in source.scene(index)[0]]
        said = entry["sentence"].removeprefix("there is a ")
        thing, _, more = said.partition(" that is ")
        expected = "neutral" if more in UNSEEN_PROPERTIES else "entailment" if thing in names else "contradiction"
        assert entry["label"] == expected and (expected == "contradiction" or thing in names)
    assert {entry["label"] for entry, _ in made} == {"entailment", "neutral", "contradiction"}

    source, made = entries("nlvr2")
    fooled = 0
    for index, (entry, images) in enumerate(made):
        scenes = [[thing.name for thing in source.scene(index, which)[0]] for which in range(2)]
        _, side, _, _, _, *name = entry["sentence"].split()
        place = ("left", "right").index(side)
        assert entry["label"] == str(" ".join(name) in scenes[place])
        fooled += entry["label"] == "False" and " ".join(name) in scenes[1 - place]
        assert len(images) == 2 and not np.array_equal(*images)
    assert fooled > 20 and 60 < sum(entry["label"] == "True" for entry, _ in made) < 140


def test_training_and_validation_scenes_differ():
    def contents(split):
        source = ShapesTask("vqa", ShapesSource(num=150, split=split, **SPLIT_OPTIONS))
        return {frozenset(thing.name for thing in source.scene(i)[0]) for i in range(150)}

    assert contents("train") != contents("val")
    inner = ShapesSource(num=1, split="train")
    assert entries("vqa", "train", num=1)[0].scene(0)[0] == inner.scene(0)


def write_task(folder, task, num=6):
    """Writes `shapes` as a JSON file in ALBEF's format, with its images."""
    _, made = entries(task, num=num)
    listed = []
    for number, (entry, images) in enumerate(made):
        names = [f"{number}-{which}.png" for which in range(len(images))]
        for name, image in zip(names, images, strict=True):
            Image.fromarray(image).save(folder / name)
        listed.append(entry | ({"images": names} if task == "nlvr2" else {"image": names[0]}))
    (folder / f"{task}.json").write_text(json.dumps(listed))
    return folder / f"{task}.json", listed


@pytest.mark.parametrize("task", MODELS)
def test_json_files_give_the_batches_of_what_they_hold(tmp_path, tokenizer, task):
    path, _ = write_task(tmp_path, task)
    form, images = MODELS[task].form, MODELS[task].images_per_example
    batches = []
    for data in (str(path), "shapes:num=6"):
        source = open_examples(data, task, form, split="train", **SPLIT_OPTIONS)
        source.keys = [f"{index}" for index in range(6)]  # the order and the distortions depend on the keys
        loader = ExampleLoader(
            source, tokenizer, batch_size=4, image_size=16, augment=AugmentConfig(), max_tokens=20, seed=1,
            num_threads=1, images_per_sample=images, workers=int(data == str(path)),
        )  # fmt: skip
        with loader:
            batches.append([next(loader) for _ in range(3)])
    for ours, theirs in zip(*batches, strict=True):
        assert ours.pixels.shape == (4 * images, 3, 16, 16) and ours.targets == theirs.targets
        assert ours.keys == theirs.keys and torch.equal(ours.input_ids, theirs.input_ids)
        torch.testing.assert_close(ours.pixels, theirs.pixels)
    if images == 2:
        assert not torch.equal(ours.pixels[0], ours.pixels[1])


def test_a_file_takes_the_folder_that_holds_its_images(tmp_path):
    for name in ("empty", "images"):
        (tmp_path / name).mkdir()
    path, _ = write_task(tmp_path / "images", "vqa")
    path = path.rename(tmp_path / "vqa.json")
    roots = f"{tmp_path}/empty,{tmp_path}/images"
    examples = open_examples(str(path), "vqa", MODELS["vqa"].form, split="train", image_root=roots, **SPLIT_OPTIONS)
    assert examples.read(0).images == [(tmp_path / "images" / "0-0.png").read_bytes()]


@pytest.mark.parametrize(
    "task, change, message",
    [
        ("vqa", {"answer": []}, r'vqa.json: entry 2: "answer": expected a string or a list of strings, got \[\]'),
        ("vqa", {"question": " "}, r"""entry 2: "question": expected a string, got ' '"""),
        ("nlvr2", {"label": "yes"}, r"""entry 2: "label": expected one of \['False', 'True'\], got 'yes'"""),
        ("nlvr2", {"images": ["a.png"]}, r'entry 2: "images": expected two paths'),
        ("entailment", {"label": None}, r"entry 2: \"label\": expected one of .*'entailment'\], got None"),
        ("entailment", {"image": 4}, r'entry 2: "image": expected a string, got 4'),
    ],
)
def test_a_wrong_entry_is_named_before_any_work(tmp_path, task, change, message):
    path, listed = write_task(tmp_path, task, num=3)
    listed[2] |= change
    path.write_text(json.dumps(listed))
    with pytest.raises(UsageError, match=message):
        open_examples(str(path), task, MODELS[task].form, split="train", **SPLIT_OPTIONS)
    with pytest.raises(UsageError, match="expected .json files or shapes for"):
        open_examples(str(tmp_path / "0-0.png"), task, MODELS[task].form, split="train", **SPLIT_OPTIONS)


@pytest.mark.parametrize("task, field, given", [("vqa", "answer", ["red"] * 10), ("nlvr2", "label", "True")])
def test_examples_without_labels_are_answered_and_not_measured(tmp_path, base, tokenizer, capsys, task, field, given):
    path, listed = write_task(tmp_path, task, num=3)
    bare = [{name: value for name, value in entry.items() if name != field} for entry in listed]
    path.write_text(json.dumps(bare))
    save_model(make(task, base, tokenizer), tokenizer, tmp_path / "model")
    answers, scores = tmp_path / "answers.json", tmp_path / "scores.json"
    command = ["evaluate", "--task", task, "--model", str(tmp_path / "model"), "--data", str(path)]
    assert main([*command, "--predictions", str(answers), "--json", str(scores)]) == 0
    assert f"{task}: answered 3 examples; nothing to measure, as they have no labels" in capsys.readouterr().out
    named = [{"question_id": i} if task == "vqa" else {"key": f"{task}-{i:06d}"} for i in range(3)]
    written = json.loads(answers.read_text())
    assert [{name: one[name] for name in one if name != "answer"} for one in written] == named
    path.write_text(json.dumps(listed))  # their labels make no difference to the answers
    assert main([*command, "--predictions", str(answers)]) == 0 and json.loads(answers.read_text()) == written
    assert '"score": null' in scores.read_text() and "always" in capsys.readouterr().out
    for mixed, message in [
        ([bare[0], bare[1] | {field: given}], f'entry 1: "{field}": expected none, as in the first entry, got'),
        ([listed[0], listed[1] | {field: None}], f'entry 1: "{field}": expected .*, got None'),
    ]:
        path.write_text(json.dumps(mixed))
        with pytest.raises(UsageError, match=message):
            TASKS[task].open(str(path), DataConfig(), split="val", **SPLIT_OPTIONS)
    path.write_text(json.dumps(bare))
    with pytest.raises(UsageError, match=f'entry 0: "{field}": expected .*, got None'):
        TASKS[task].open(str(path), DataConfig(), split="train", **SPLIT_OPTIONS)


def test_expressions_are_captions_with_the_box_of_what_they_name(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "wide.png")
    path = tmp_path / "expressions.json"

    def written(**entry):
        path.write_text(json.dumps([{"image": "wide.png", "text": " the red one "} | entry]))
        return open_expressions(str(path), split="val", **SPLIT_OPTIONS).read(0)

    sample = written(box=[4, 5, 8, 10], proposals=[[4, 5, 8, 10], [20, 0, 10, 20]])
    (phrase,) = sample.phrases
    assert sample.captions == ["the red one"] and (phrase.first_word, phrase.n_words) == (0, 3)
    assert phrase.whole  # its map includes [CLS] and [SEP]
    assert phrase.boxes == [(0.1, 0.25, 0.3, 0.75)] and phrase.proposals == [*phrase.boxes, (0.5, 0.0, 0.75, 1.0)]
    assert written().phrases == []  # as for training
    with pytest.raises(UsageError, match='entry 0: "box": expected x, y, width and height in pixels, got'):
        written(box=[1, 2, 0, 4])
    with pytest.raises(UsageError, match='entry 0: "proposals": expected x, y, width and height in pixels, got'):
        written(box=[1, 2, 3, 4], proposals=[[1, 2, 3]])
    with pytest.raises(UsageError, match='entry 0: "text": expected a string, got 7'):
        written(text=7)
    shapes = open_expressions("shapes:num=2", split="val", **SPLIT_OPTIONS).read(0)
    assert all(phrase.boxes[0] in phrase.proposals and len(phrase.proposals) == 2 for phrase in shapes.phrases)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"box": [float("nan"), 1, 2, 3]}, '"box": expected'),
        ({"box": [1, 1, float("inf"), 3]}, '"box": expected'),
        ({"box": [1, 1, 10**400, 3]}, '"box": expected'),
        ({"box": [True, 1, 2, 3]}, '"box": expected'),
        ({"box": {"x": 1}}, '"box": expected'),
        ({"box": [1, 1, 2, 3], "proposals": 5}, '"proposals": expected a list of boxes, got 5'),
        ({"box": [1, 1, 2, 3], "proposals": [[1, 1, 2, float("nan")]]}, '"proposals": expected'),
    ],
)
def test_a_box_that_is_wrong_is_found_at_opening(tmp_path, change, message):
    good = {"image": "i.png", "text": "a cat", "box": [1, 1, 2, 3]}
    (tmp_path / "l.json").write_text(json.dumps([good, {"image": "i.png", "text": "a cat"} | change]))
    with pytest.raises(UsageError, match=f"data: .*l.json: entry 1: {message}"):
        open_expressions(str(tmp_path / "l.json"), split="val", **SPLIT_OPTIONS)


def test_a_box_outside_its_image_makes_a_bad_sample(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "i.png")
    boxes = [{"box": [50, 3, 4, 4]}, {"box": [1, 1, 4, 4], "proposals": [[1, 25, 3, 3]]}, {"box": [35, -2, 90, 90]}]
    (tmp_path / "l.json").write_text(json.dumps([{"image": "i.png", "text": "a cat"} | box for box in boxes]))
    source = open_expressions(str(tmp_path / "l.json"), split="val", **SPLIT_OPTIONS)
    for number, box in enumerate((r"\[50, 3, 4, 4\]", r"\[1, 25, 3, 3\]")):
        with pytest.raises(BadSample, match=f"box {box} lies outside the image of 40 x 20 pixels"):
            source.read(number)
    assert source.read(2).phrases[0].boxes == [(35 / 40, -2 / 20, 125 / 40, 88 / 20)]


def test_a_proposal_that_begins_outside_the_image_is_summed_inside_it():
    heat = np.zeros((4, 4), np.float32)
    heat[:2, :2], heat[3, 3] = 1, 0.2
    outside = (-0.25, -0.25, 0.5, 0.5)
    assert proposal_score(heat, [outside], [(0.5, 0.5, 1.0, 1.0), outside], (40, 40))[0]


def test_the_page_merges_the_boxes_of_refcoco_plus(tmp_path, monkeypatch):
    """The Python of the page, run on four small files, writes a file for each split, with the right boxes."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 20)).save("wide.png")
    for name, content in {
        "refcoco+_test.json": [{"image": "wide.png", "text": text, "ref_id": i} for i, text in ((5, "a b"), (3, "c"))],
        "instances.json": {"annotations": [{"id": 50, "bbox": [4, 5, 8, 10]}, {"id": 30, "bbox": [0, 0, 20, 20]}]},
        "dets.json": {"7": [[20, 0, 10, 20, 0.9], [4, 5, 8, 10, 0.8]]},
    }.items():
        Path(name).write_text(json.dumps(content))
    references = [
        {"ref_id": 3, "ann_id": 30, "image_id": 7, "split": "testA", "sent_ids": [1]},
        {"ref_id": 5, "ann_id": 50, "image_id": 7, "split": "val", "sent_ids": [2]},
    ]
    Path("refs(unc).p").write_bytes(pickle.dumps(references))
    for block in blocks_of(ROOT / "docs/tasks.md", "python"):
        block.run({})
    for split, text, box in (("val", "a b", (0.1, 0.25, 0.3, 0.75)), ("testA", "c", (0.0, 0.0, 0.5, 1.0))):
        source = open_expressions(f"refcoco+_{split}.json", split="val", **SPLIT_OPTIONS)
        (phrase,) = source.read(0).phrases
        assert (len(source), phrase.text, phrase.boxes) == (1, text, [box])
        assert phrase.proposals == [(0.5, 0.0, 0.75, 1.0), (0.1, 0.25, 0.3, 0.75)]


def test_vqa_accuracy_is_the_official_one():
    people = ["two"] * 3 + ["2"] * 2 + ["three"] * 5
    # "two" and "2" are one answer of five: in every subset of nine at least four of them
    assert vqa_accuracy("2", people) == vqa_accuracy("Two.", people) == 1
    assert vqa_accuracy("red", ["red"] + ["blue"] * 9) == pytest.approx(9 / 10 / 3)
    assert vqa_accuracy("red", ["red"] * 2 + ["blue"] * 8) == pytest.approx((8 * 2 / 3 + 2 / 3) / 10)
    assert vqa_accuracy("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx((7 + 3 * 2 / 3) / 10)
    assert vqa_accuracy("red", ["red"] * 4 + ["blue"] * 6) == 1
    mixed = ["dont know"] * 5 + ["yes"] * 5
    assert vqa_accuracy("Don't know!", mixed) == 1 and vqa_accuracy("the dont, know", mixed) == 1
    assert vqa_accuracy("a dog", ["dog"] * 10) == 0  # nothing is normalized if all agree
    assert vqa_accuracy("1,000", ["1000"] * 5 + ["many"] * 5) == 1 and vqa_accuracy("2.5", ["25"] * 5 + ["3"] * 5) == 0
    assert vqa_accuracy("no/yes", ["no yes"] * 5 + ["no"] * 5) == 1
    with pytest.raises(UsageError, match="annotated: expected the answers of at least 4 people"):
        vqa_accuracy("red", ["red"])


def test_too_few_annotators_are_named_before_any_work(tmp_path):
    path, listed = write_task(tmp_path, "vqa", num=3)
    listed[1]["answer"] = ["red", "blue"]
    path.write_text(json.dumps(listed))
    assert len(TASKS["vqa"].open(str(path), DataConfig(), split="train", **SPLIT_OPTIONS)) == 3
    with pytest.raises(UsageError, match='entry 1: "answer": expected one answer, or those of at least 4 people'):
        TASKS["vqa"].open(str(path), DataConfig(), split="val", **SPLIT_OPTIONS)


def test_the_answer_decoder_ranks_by_the_probability_of_the_whole_answer(base, tokenizer):
    answers = ["red", "blue", "red object", "no", "the left image shows"]
    model = VQAModel(base, tokenizer, answers).eval()
    pixels, ids, mask = inputs(model, tokenizer, ["what colour is left of the red object", "is there a red object"])
    with torch.no_grad():
        states = model.question_states(pixels, ids, mask)
        expected = torch.empty(2, len(answers))
        for column, answer in enumerate(answers):  # one at a time, without padding
            own_ids, own_mask = model.answer_tokens([answer], pixels.device)
            for row in range(2):
                length = int(mask[row].sum())
                logits = model.decoder(
                    input_ids=own_ids[:, :-1], encoder_hidden_states=states[row : row + 1, :length]
                ).logits
                expected[row, column] = logits.log_softmax(-1)[0].gather(1, own_ids[0, 1:, None]).sum()
        padded_ids, padded_mask = model.answer_tokens(answers, pixels.device)
        rows = torch.arange(2).repeat_interleave(len(answers))
        scores = model._log_probability(padded_ids.repeat(2, 1), padded_mask.repeat(2, 1), states[rows], mask[rows])
        torch.testing.assert_close(scores.unflatten(0, (2, -1)), expected, rtol=1e-4, atol=1e-4)
        assert model.predict(pixels, ids, mask) == [answers[i] for i in expected.argmax(1)]
        model.candidates = 1  # then the first token decides
        first = model.answer_logits(padded_ids[:1, :2].expand(2, -1), padded_mask[:1, :2], states, mask)[:, 0]
        chosen = first[:, padded_ids[:, 1]].argmax(1)
        assert [a.split()[0] for a in model.predict(pixels, ids, mask)] == [answers[i].split()[0] for i in chosen]


def test_the_answer_decoder_starts_from_the_fusion_encoder(base, tokenizer):
    """With image tokens as its states, it equals text embeddings, fusion layers and language head."""
    model = VQAModel(base, tokenizer, ["red"]).eval()
    states = torch.randn(1, 5, 32)
    ids = torch.tensor([[tokenizer.cls_token_id]])  # a causal mask does not change a single token
    mask = torch.ones(1, 1, dtype=torch.bool)
    with torch.no_grad():
        embedded = base.text.bert.embeddings(ids)
        fused = base.fusion(embedded, mask, base.fusion.keys_values(states))
        torch.testing.assert_close(
            model.decoder(input_ids=ids, encoder_hidden_states=states).logits, base.language_head(fused)
        )


def test_the_layers_of_a_pair_share_their_keys_and_look_at_one_image_each(base, tokenizer):
    single = {name: tensor.clone() for name, tensor in base.fusion.state_dict().items()}
    model = NLVR2Model(base, tokenizer).eval()
    layers = model.base.fusion.layers
    assert len(layers) == 4
    for number, layer in enumerate(layers):
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, single[f"layers.{number // 2}.{name}"]), (number, name)
    for left, right in zip(layers[::2], layers[1::2], strict=True):
        assert left.cross_attention.key.weight is right.cross_attention.key.weight
        assert left.cross_attention.value_bias is right.cross_attention.value_bias
        assert left.cross_attention.query.weight is not right.cross_attention.query.weight
    pixels, ids, mask = inputs(model, tokenizer, ["the left image shows a red object", "red"])
    tokens = model.base.vision(pixels)
    text, _ = model.base.encode_text(ids, mask)
    expected = text
    for number, layer in enumerate(layers):  # layer by layer, image by image
        encoder = base.fusion.__class__.__mro__[1](base.config, base.vision.width)
        encoder.layers = torch.nn.ModuleList([layer])
        expected = encoder.eval()(expected, mask, encoder.keys_values(tokens[number % 2 :: 2]))
    torch.testing.assert_close(model.fused(pixels, ids, mask), expected[:, 0])


def test_text_assignment_draws_the_own_image_as_its_target_says():
    torch.manual_seed(0)
    features, ids = F.normalize(torch.randn(600, 8), dim=1), torch.arange(600) // 2  # two captions for each image
    left, right, target = assign(features, ids, torch.tensor(0.07))
    own = torch.arange(600)
    assert torch.equal(left == own, target == LEFT) and torch.equal(right == own, target == RIGHT)
    others = torch.cat([left[target != LEFT], right[target != RIGHT]])
    captions = torch.cat([own[target != LEFT], own[target != RIGHT]])
    assert (ids[others] != ids[captions]).all()
    assert all(150 < int((target == kind).sum()) < 250 for kind in (LEFT, RIGHT, NEITHER))
    few = [assign(features[:6], ids[:6], torch.tensor(1e3)) for _ in range(40)]  # three images, so often the same one
    assert all((ids[:6][a] != ids[:6][b]).all() for a, b, _ in few)
    similarity = (features[others] * features[captions]).sum(1).mean()
    assert similarity > (features @ features.T).mean() + 0.3  # alike images are drawn more often
    with pytest.raises(UsageError, match="at least three different images"):
        assign(features[:4], ids[:4], torch.tensor(0.07))


def test_soft_targets_have_weight_alpha():
    logits, teacher_logits, target = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    mixed = 0.6 * F.one_hot(target, 3) + 0.4 * teacher_logits.softmax(1)
    expected = -(mixed * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(distilled_cross_entropy(logits, target, teacher_logits, 0.4), expected)
    assert distilled_cross_entropy(logits, target, None, 0.4) == F.cross_entropy(logits, target)


@pytest.mark.parametrize("task", MODELS)
def test_a_saved_model_answers_the_same(tmp_path, base, tokenizer, task):
    model = make(task, base, tokenizer)
    save_model(model, tokenizer, tmp_path / task)
    again, _ = load_task_model(tmp_path / task, task)
    arguments = inputs(model, tokenizer, ["there is a red object", "is there a blue object"])
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    with torch.no_grad():
        assert again.predict(*arguments) == model.predict(*arguments)
    with pytest.raises(ValueError, match=f"fine-tuned for {task}"):
        read_model(tmp_path / task)
    other = "vqa" if task != "vqa" else "nlvr2"
    with pytest.raises(UsageError, match=f"expected a model fine-tuned for {other}, .* is fine-tuned for {task}"):
        load_task_model(tmp_path / task, other)


def test_every_example_is_scored_once_beside_the_floor(base, tokenizer):
    source = open_examples("shapes:num=50", "entailment", EntailmentModel.form, split="val", **SPLIT_OPTIONS)
    model = make("entailment", base, tokenizer)
    labels = [source.read(index).record["label"] for index in range(50)]
    model.predict = lambda pixels, ids, mask: ["neutral"] * len(ids)
    report = evaluate_answers(model, tokenizer, source, batch_size=16)
    common = max(set(labels), key=labels.count)
    assert report.score == labels.count("neutral") / 50 and report.majority == labels.count(common) / 50
    assert report.majority_answer == common and [p["key"] for p in report.predictions] == source.keys
    assert f"always {common!r}" in report.table() and "predictions" not in report.as_dict()
    assert evaluate_answers(model, tokenizer, source, limit=7).examples == 7


def test_a_proposal_is_chosen_by_its_fraction_of_the_map():
    assert intersection_over_union((0, 0, 0.5, 1), (0.25, 0, 0.75, 1)) == pytest.approx(1 / 3)
    assert intersection_over_union((0, 0, 0.1, 0.1), (0.5, 0.5, 1, 1)) == 0
    heat = np.zeros((4, 4), np.float32)
    heat[:2, 2:] = 1.0  # upper right
    corners = [(0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)]
    assert proposal_score(heat, [corners[1]], corners, (40, 24)) == (True, 0.25)
    assert proposal_score(heat, [corners[0]], corners, (40, 24)) == (False, 0.25)
    whole = (0.0, 0.0, 1.0, 1.0)  # more of the map, but less for the root of its area
    assert proposal_score(heat, [corners[1]], [whole, corners[1]], (40, 24)) == (True, 0.5)


def test_answer_lists_are_checked(tmp_path):
    path = tmp_path / "answers.json"
    path.write_text('["red", "blue", "red"]')
    assert read_answers(path) == ["red", "blue"]
    path.write_text('{"red": 1}')
    with pytest.raises(UsageError, match="expected a JSON list of strings"):
        read_answers(path)


def test_text_assignment_prepares_pairs(tmp_path, base, tokenizer):
    assigned = TextAssignmentModel(base, tokenizer)
    with torch.no_grad():
        assigned.base.fusion.layers[1].attention.self.query.weight.add_(1.0)  # the layers of a pair now differ
    save_model(assigned, tokenizer, tmp_path / "assigned")
    start = TaskConfig(str(tmp_path / "assigned"))
    config = FinetuneConfig("nlvr2", start, MomentumConfig(), DataConfig(), TrainConfig())
    model, _ = TASKS["nlvr2"].model(config)
    ours, theirs = model.base.state_dict(), assigned.base.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
