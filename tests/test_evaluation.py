"""Retrieval and grounding: the metrics on cases computed by hand, and a small random model against the definitions."""

import json
from dataclasses import replace
from math import comb
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gloo_ranks import results_of_ranks
from small_models import small_pair

from softmask_fast.data.pixels import evaluation_pixels
from softmask_fast.data.sources import open_source
from softmask_fast.data.types import BadSample, Phrase, Sample
from softmask_fast.errors import UsageError
from softmask_fast.evaluation import evaluate_grounding, evaluate_retrieval
from softmask_fast.evaluation.boxes import box_coverage, grounding_score
from softmask_fast.evaluation.common import batches, tokenize
from softmask_fast.evaluation.grounding import phrase_maps, word_tokens
from softmask_fast.evaluation.report import PretrainingEvaluation
from softmask_fast.evaluation.retrieval import ranks_of_best, recall_at_k
from softmask_fast.evaluation.tables import format_table
from softmask_fast.training.options import make_config


class ListSource:
    """A source over a list of samples; None is one that cannot be read."""

    encoded = False

    def __init__(self, samples, image_ids=None):
        self.samples = samples
        self.keys = [f"sample {i}" if sample is None else sample.key for i, sample in enumerate(samples)]
        self.image_ids = np.arange(len(samples)) if image_ids is None else np.array(image_ids)

    def __len__(self):
        return len(self.samples)

    def read(self, index):
        if self.samples[index] is None:
            raise BadSample("damaged")
        return self.samples[index]


def small_source():
    return open_source("shapes:num=28", split="val", image_size=32)


def model_of(shapes):
    return small_pair(shapes, soft_mask_layer=1)


@pytest.fixture(scope="module")
def shapes():
    return small_source()


@pytest.fixture(scope="module")
def model_and_tokenizer(shapes):
    return model_of(shapes)


def test_ranks_count_the_wrong_items_before_the_best_correct_one():
    inf = torch.inf
    scores = torch.tensor([[9, 5, 1, 3], [9, 5, 1, 3], [2, 2, 2, 2], [9, 5, 1, -inf]])
    correct = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 1]]).bool()
    assert ranks_of_best(scores, correct).tolist() == [0, 2, 3, 3]


def test_another_correct_item_does_not_count_as_wrong():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    assert ranks_of_best(scores, torch.tensor([[False, True, True, True]])).tolist() == [1]


def test_recall_at_k():
    assert recall_at_k(torch.tensor([0, 1, 4, 5, 9, 10, 99, 0])) == {
        "recall@1": 2 / 8,
        "recall@5": 4 / 8,
        "recall@10": 6 / 8,
    }


def test_box_coverage_is_exact_for_edges_between_and_inside_patches():
    coverage = box_coverage([(0.25, 0.0, 0.75, 0.5)], 2, 2)
    np.testing.assert_allclose(coverage, [[0.5, 0.5], [0.0, 0.0]])
    # two overlapping boxes count once: 0.6 x 0.6 and 0.6 x 0.6 share 0.2 x 0.2
    coverage = box_coverage([(0.0, 0.0, 0.6, 0.6), (0.4, 0.4, 1.0, 1.0)], 3, 5)
    assert coverage.mean() == pytest.approx(0.36 + 0.36 - 0.04)
    assert coverage.max() <= 1 + 1e-12
    # the part outside the image does not count
    np.testing.assert_allclose(box_coverage([(-0.5, -1.0, 0.5, 2.0)], 1, 2), [[1.0, 0.0]])


@pytest.mark.parametrize("boxes", [[], [(0.5, 0.0, 0.5, 1.0)], [(0.0, 0.9, 1.0, 0.1)], [(1.1, 0.0, 1.5, 1.0)]])
def test_boxes_without_area_are_refused(boxes):
    with pytest.raises(UsageError, match="boxes: expected"):
        box_coverage(boxes, 4, 4)


def test_grounding_score_by_hand():
    heat = np.array([[1.0, 0.0], [2.0, 5.0]], dtype=np.float32)
    right = grounding_score(heat, [(0.5, 0.5, 1.0, 1.0)])  # exactly the patch with 5
    assert (right.hit, right.hit_random, right.hit_center, right.flat) == (1.0, 0.25, 1.0, False)
    assert right.mass_inside == pytest.approx(5 / 8)
    assert right.area_inside == pytest.approx(0.25)
    assert right.mask_inside == pytest.approx(1.0)
    assert right.mask_image == pytest.approx((0.2 + 0 + 0.4 + 1) / 4)

    left = grounding_score(heat, [(0.0, 0.0, 0.5, 1.0)])  # the left column; x = 0.5 is on its edge
    assert (left.hit, left.hit_random, left.hit_center) == (0.0, 0.5, 1.0)
    assert left.mass_inside == pytest.approx(3 / 8)
    assert left.mask_inside == pytest.approx((0.2 + 0.4) / 2)

    corner = grounding_score(heat, [(0.0, 0.0, 0.2, 0.2), (0.8, 0.0, 1.0, 0.2)])  # reaches no patch center
    assert (corner.hit, corner.hit_random, corner.hit_center) == (0.0, 0.0, 0.0)
    assert corner.mass_inside == pytest.approx(0.16 * 1 / 8)


def test_a_flat_map_scores_what_the_random_floor_scores():
    box = [(0.0, 0.0, 0.5, 0.5)]
    for value in (0.0, 3.0):
        score = grounding_score(np.full((4, 4), value, np.float32), box)
        assert score.flat
        assert score.hit == score.hit_random == 0.25
        assert score.mass_inside == pytest.approx(score.area_inside)
        assert score.mask_inside == score.mask_image == 0


def test_word_tokens_follow_whitespace_words(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    caption = "A  red circle, left-of a Square"
    tokens = tokenize(model, tokenizer, [caption])
    texts = [caption[a:b] for a, b in tokens.offsets[0]]
    assert texts[0] == "" and texts[-1] == ""  # [CLS] and [SEP]
    for first, count, expected in ((0, 1, "A"), (1, 2, "redcircle,"), (3, 1, "left-of"), (5, 1, "Square")):
        span = word_tokens(caption, tokens.offsets[0], range(first, first + count))
        assert "".join(texts[i] for i in span) == expected
    assert word_tokens("a a a", [(0, 0), (0, 1), (2, 3), (4, 5), (0, 0)], range(1, 3)) == [2, 3]
    assert word_tokens("a a a", [(0, 0), (0, 1), (0, 0)], range(1, 3)) == []  # cut away


def test_tokenize_counts_what_it_cuts(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    tokens = tokenize(model, tokenizer, ["a circle", "red " * 60])
    assert tokens.truncated == 1
    assert tokens.input_ids.shape == (2, model.config.max_tokens)
    assert tokens.attention_mask.dtype == torch.bool
    assert tokens.attention_mask[0].sum() < model.config.max_tokens and tokens.attention_mask[1].all()


def single_pixels(model, sample):
    return evaluation_pixels([sample.image], model.config.image_size)


@torch.no_grad()
def expected_recalls(model, tokenizer, samples, captions_of, rerank, match_score):
    """The definition: the model sees one pair at a time, and loops and sorting do the rest."""
    pixels = [single_pixels(model, sample) for sample in samples]
    texts = [(owner, tokenize(model, tokenizer, [c])) for owner, own in enumerate(captions_of) for c in own]
    images = [model.encode_image(p)[1][0] for p in pixels]
    features = [model.encode_text(t.input_ids, t.attention_mask)[1][0] for _, t in texts]

    def itc(text, image):
        return float(features[text] @ images[image])

    def itm(text, image):
        logits = model.match_logits(pixels[image], texts[text][1].input_ids, texts[text][1].attention_mask)[0]
        return float(logits[1] - logits[0] if match_score == "log_odds" else logits[1])

    def recalls(queries, gallery, score, rescore, is_correct):
        ranks = []
        for q in range(queries):
            order = sorted(range(gallery), key=lambda g: -score(q, g))  # noqa: B023
            if rescore is not None:
                order = sorted(order[:rerank], key=lambda g: -rescore(q, g))  # noqa: B023
            ranks.append(next((rank for rank, g in enumerate(order) if is_correct(q, g)), 10**6))
        return {f"recall@{k}": float(np.mean([rank < k for rank in ranks])) for k in (1, 5, 10)}

    def summed(text, image):
        return itm(text, image) + itc(text, image) / model.temperature.item()

    def both_ways(rescore):
        backward = None if rescore is None else lambda image, text: rescore(text, image)
        return {
            "text_to_image": recalls(len(texts), len(images), itc, rescore, lambda t, i: texts[t][0] == i),
            "image_to_text": recalls(
                len(images), len(texts), lambda i, t: itc(t, i), backward, lambda i, t: texts[t][0] == i
            ),
        }

    return [both_ways(rescore) for rescore in (None, itm, summed)]


@pytest.mark.parametrize("captions, match_score", [("first", "logit"), ("all", "log_odds")])
def test_retrieval_equals_its_definition(model_and_tokenizer, shapes, captions, match_score):
    model, tokenizer = model_and_tokenizer
    samples = [shapes.read(i) for i in range(14)]
    # Two or three captions each, no two the same, so that "first" and "all" differ and nothing is tied.
    others = [shapes.read(i).captions[0] for i in range(14, 28)]
    captions_of = [[samples[i].captions[0], others[i]] + ["circle"] * (i == 3) for i in range(14)]
    assert len({caption for own in captions_of for caption in own}) == 29
    source = ListSource([Sample(s.key, s.image, c) for s, c in zip(samples, captions_of, strict=True)])

    taken = [own[:1] for own in captions_of] if captions == "first" else captions_of
    itc, itm, both = expected_recalls(model, tokenizer, samples, taken, 10, match_score)
    chosen = {"captions": captions, "match_score": match_score}
    report = evaluate_retrieval(model, tokenizer, source, rerank=10, batch_size=5, **chosen)
    assert (report.images, report.captions) == (14, 14 if captions == "first" else 29)
    criterion = "mean recall, ITC + ITM" if captions == "first" else "mean recall of all captions, ITC + ITM"
    assert report.headline[0] == criterion and f"{captions} of each" in report.table()
    assert report.as_dict()["captions_of_an_image"] == captions
    assert report.itc == itc
    assert report.itm == itm and report.both == both
    assert report.truncated_captions == 0
    assert json.loads(json.dumps(report.as_dict()))["itm"] == itm
    assert report.as_dict()["match_score"] == match_score
    name = {"log_odds": "ITM", "logit": "ITM's logit"}[match_score]
    assert all(f"to image, {by} on the best 10" in report.table() for by in (name, f"ITC + {name}"))


def test_the_logit_alone_ranks_otherwise(model_and_tokenizer, shapes, monkeypatch):
    """Where it says the opposite of the difference."""
    model, tokenizer = model_and_tokenizer

    def logits(image_tokens, text_tokens, attention_mask, image_index):
        matched = (1e4 * image_tokens[image_index, 0, 0] * text_tokens[:, 0, 0]).sin()
        return torch.stack([2 * matched, matched], -1)

    monkeypatch.setattr(model, "match_tokens", logits)
    found = [
        evaluate_retrieval(model, tokenizer, shapes, match_score=score, rerank=10, limit=14)
        for score in ("log_odds", "logit")
    ]
    assert found[0].itc == found[1].itc and found[0].itm != found[1].itm


def test_chance_with_several_captions(model_and_tokenizer, shapes):
    """Drawing 5 of 29 captions without replacement misses an image with 2 captions with (27 over 5) / (29 over 5)."""
    model, tokenizer = model_and_tokenizer
    samples = [shapes.read(i) for i in range(14)]
    source = ListSource([Sample(s.key, s.image, [f"a {i}", "b"] + ["c"] * (i == 3)) for i, s in enumerate(samples)])
    chance = evaluate_retrieval(model, tokenizer, source, rerank=0).chance  # of all captions, the default
    expected = 1 - (13 * comb(27, 5) + comb(26, 5)) / comb(29, 5) / 14
    assert chance["image_to_text"]["recall@5"] == pytest.approx(expected)
    assert chance["text_to_image"]["recall@5"] == pytest.approx(5 / 14)


def retrieval_and_its_pairs(rank=0):
    """The report, and the number of pairs that this process has matched."""
    source = small_source()
    model, tokenizer = model_of(source)
    matched, match = [], model.match_tokens
    model.match_tokens = lambda *inputs, **options: matched.append(len(inputs[1])) or match(*inputs, **options)
    return evaluate_retrieval(model, tokenizer, source, rerank=10, batch_size=5).as_dict(), sum(matched)


def test_ranks_share_the_pairs_of_retrieval(tmp_path):
    alone, pairs = retrieval_and_its_pairs()
    ranks = results_of_ranks(retrieval_and_its_pairs, 3, tmp_path)
    assert [report for report, _ in ranks] == 3 * [alone]
    assert sum(own for _, own in ranks) == pairs and all(own < pairs / 2 for _, own in ranks)


def test_retrieval_without_reranking_and_in_training_mode(model_and_tokenizer, shapes):
    model, tokenizer = model_and_tokenizer
    model.train()
    try:
        report = evaluate_retrieval(model, tokenizer, shapes, rerank=0, limit=12)
        assert model.training
    finally:
        model.eval()
    assert report.itm is report.both is None and report.images == 12
    assert "ITM" not in report.table()
    assert report == evaluate_retrieval(model, tokenizer, shapes, rerank=0, limit=12, batch_size=12)
    assert (report.captions, report.headline[0]) == (48, "mean recall of all captions")
    assert replace(report, both=report.itc).headline == ("mean recall of all captions, ITC + ITM", report.headline[1])


def test_every_seed_is_measured_on_the_same_scenes():
    configs = (make_config("tiny", seed=seed) for seed in (0, 1))
    first, second = (PretrainingEvaluation(config, "shapes:objects=3").source for config in configs)
    assert first.keys == second.keys and first.scene(0) == second.scene(0)


def test_figures_of_older_records_are_those_that_they_have():
    recalls = {"text_to_image": {"recall@1": 0.25}}
    figures = PretrainingEvaluation.figures
    for more, shown in (({"itm": recalls}, [0.25, 0.25]), ({"itm": None, "both": None}, [0.25]), ({}, [0.25])):
        assert list(figures(None, {"retrieval": {"itc": recalls} | more}).values()) == shown


def test_what_guesses_reach_comes_with_each_metric():
    chance = {way: {f"recall@{k}": k / 100 for k in (1, 5, 10)} for way in ("text_to_image", "image_to_text")}
    retrieval = SimpleNamespace(chance=chance, headline=("mean recall", 0.5))
    pointing = {"model": 0.4, "random": 0.3, "center": 0.5}
    grounding = SimpleNamespace(pointing_game=pointing, box_accuracy=None)
    floors = PretrainingEvaluation.floors(None, [retrieval, grounding])
    assert floors["mean recall"] == {"chance": pytest.approx(0.16 / 3)}
    assert floors["recall at 1 by contrast"] == floors["recall at 1 re-ranked"] == {"chance": 0.01}
    assert floors["pointing game"] == {"chance": 0.3, "image center": 0.5} and not floors["box accuracy"]


def test_an_image_listed_once_per_caption_is_one_image(model_and_tokenizer, shapes):
    model, tokenizer = model_and_tokenizer
    a, b, c = (shapes.read(i) for i in range(3))
    listed = ListSource(
        [
            Sample("a", a.image, ["a red circle"]),
            Sample("b", b.image, ["a blue square"]),
            Sample("a#2", a.image, ["a circle"]),
            Sample("c", c.image, ["green"]),
        ],
        image_ids=[7, 8, 7, 9],
    )
    merged = ListSource(
        [
            Sample("a", a.image, ["a red circle", "a circle"]),
            Sample("b", b.image, ["a blue square"]),
            Sample("c", c.image, ["green"]),
        ]
    )
    for captions, count in (("first", 3), ("all", 4)):
        report = evaluate_retrieval(model, tokenizer, listed, captions=captions)
        assert (report.images, report.captions) == (3, count)
        assert report == evaluate_retrieval(model, tokenizer, merged, captions=captions)


def test_unreadable_samples_are_skipped_and_named(model_and_tokenizer, shapes):
    model, tokenizer = model_and_tokenizer
    good = [shapes.read(i) for i in range(3)]
    damaged = Sample("not an image", b"GIF89a?", ["a circle"], good[0].phrases)
    source = ListSource([good[0], None, good[1], damaged, good[2]])
    for report in (evaluate_retrieval(model, tokenizer, source), evaluate_grounding(model, tokenizer, source)):
        assert list(report.skipped) == ["sample 1", "not an image"]
        assert report.skipped["sample 1"] == "damaged"
        assert report.images == 3
        assert "2 samples skipped" in report.table()
    with pytest.raises(UsageError, match="none of 1 samples.*damaged"):
        evaluate_retrieval(model, tokenizer, ListSource([None]))


def test_grounding_equals_its_definition(model_and_tokenizer, shapes):
    """One phrase at a time: the mean Grad-CAM of its tokens over the patches, scored by `grounding_score`."""
    model, tokenizer = model_and_tokenizer
    for layer in (None, 0):
        expected, others = [], []
        for i in range(8):
            sample = shapes.read(i)
            heats = []
            for phrase in sample.phrases:
                tokens = tokenize(model, tokenizer, [phrase.caption])
                relevance = model.word_relevance(
                    single_pixels(model, sample), tokens.input_ids, tokens.attention_mask, layer
                )
                words = range(phrase.first_word, phrase.first_word + phrase.n_words)
                span = word_tokens(phrase.caption, tokens.offsets[0], words)
                heat = relevance[0, span].mean(0)[model.prefix_tokens :].reshape(model.grid_size)
                expected.append(grounding_score(heat.numpy(), phrase.boxes))
                heats.append((phrase, heat.numpy()))
            for phrase, _ in heats:
                neighbors = [heat for other, heat in heats if other.caption == phrase.caption and other != phrase]
                others.append(np.mean([grounding_score(heat, phrase.boxes).hit for heat in neighbors]))
        report = evaluate_grounding(model, tokenizer, shapes, layer=layer, limit=8, batch_size=3)
        assert report.flat_maps < len(expected)
        assert report.phrases == len(expected) > 8
        assert report.layer == (1 if layer is None else layer)
        for ours, field in (
            (report.pointing_game["model"], "hit"),
            (report.pointing_game["random"], "hit_random"),
            (report.pointing_game["center"], "hit_center"),
            (report.mass_inside["model"], "mass_inside"),
            (report.mass_inside["even"], "area_inside"),
            (report.mean_mask["inside"], "mask_inside"),
            (report.mean_mask["image"], "mask_image"),
        ):
            assert ours == pytest.approx(np.mean([getattr(score, field) for score in expected]), abs=1e-4), field
        assert report.pointing_beside_others["other_phrase"] == pytest.approx(np.mean(others), abs=1e-4)
        assert report.pointing_beside_others["phrases"] == len(expected)
        missed = [i for i, score in enumerate(expected) if not score.hit_center]
        assert 0 < len(missed) < len(expected)
        for name, field in (("model", "hit"), ("random", "hit_random")):
            hits = [getattr(expected[i], field) for i in missed]
            assert report.pointing_off_center[name] == pytest.approx(np.mean(hits), abs=1e-4), name
        assert report.pointing_off_center["phrases"] == len(missed)
        assert report.pointing_off_center["center"] == 0
        assert json.loads(json.dumps(report.as_dict()))["phrases"] == len(expected)
        assert "pointing game" in report.table()


def test_floors_that_a_sample_cannot_give_are_left_out(model_and_tokenizer, shapes):
    """A phrase alone in its caption has no other's map, and without a phrase off the center there is no such row."""
    model, tokenizer = model_and_tokenizer
    image = shapes.read(0).image
    alone = Phrase("a red circle", "circle", 2, 1, [(0.25, 0.25, 0.75, 0.75)])
    sample = Sample("alone", image, [alone.caption], [alone])
    report = evaluate_grounding(model, tokenizer, ListSource([sample]))
    assert report.pointing_beside_others is None and report.pointing_off_center is None
    assert "another phrase" not in report.table() and "off center" not in report.table()

    pair = [
        Phrase("a box, a bar", name, word, 2, [(0.0, 0.0, 0.25, 0.25)]) for name, word in (("a box", 0), ("a bar", 2))
    ]
    both = evaluate_grounding(model, tokenizer, ListSource([sample, Sample("pair", image, ["a box, a bar"], pair)]))
    hits = [
        evaluate_grounding(model, tokenizer, ListSource([Sample("one", image, ["a box, a bar"], [one])]))
        for one in pair
    ]
    mean = np.mean([hit.pointing_game["model"] for hit in hits])
    # the phrase that is alone does not count, and the others have the same boxes: each map hits as its phrase's does
    beside = {"phrases": 2, "model": mean, "other_phrase": mean}
    assert {name: both.pointing_beside_others[name] for name in beside} == pytest.approx(beside)
    assert "map of another phrase" in both.table() and "off center" in both.table()


def test_phrases_beyond_the_token_limit_are_counted(model_and_tokenizer, shapes):
    model, tokenizer = model_and_tokenizer
    sample = shapes.read(0)
    caption = "red " * 40 + "circle"
    boxes = [(0.0, 0.0, 0.5, 0.5)]
    phrases = [Phrase(caption, "red", 0, 1, boxes), Phrase(caption, "circle", 40, 1, boxes)]
    report = evaluate_grounding(model, tokenizer, ListSource([Sample("long", sample.image, [caption], phrases)]))
    assert (report.phrases, report.skipped_phrases) == (1, 1)
    assert "1 phrases beyond the token limit" in report.table()


def test_unusable_phrases_are_errors(model_and_tokenizer, shapes):
    model, tokenizer = model_and_tokenizer
    image = shapes.read(0).image
    without = ListSource([Sample("bare", image, ["a circle"]), None])
    with pytest.raises(UsageError, match="source: expected phrases with boxes, .*; skipped sample 1: damaged$"):
        evaluate_grounding(model, tokenizer, without)
    outside = [Phrase("a circle", "circle", 1, 2, [(0.0, 0.0, 1.0, 1.0)])]
    with pytest.raises(UsageError, match="key 5: phrase 'circle'"):
        evaluate_grounding(model, tokenizer, ListSource([Sample("key 5", image, ["a circle"], outside)]))


def test_a_phrase_map_is_the_mean_of_its_words(model_and_tokenizer, shapes):
    model, tokenizer = model_and_tokenizer
    sample, caption = shapes.read(0), "red circle"
    phrases = [Phrase(caption, "", 0, 1, []), Phrase(caption, "", 1, 1, []), Phrase(caption, "", 0, 2, [])]
    [maps], [spans] = phrase_maps(model, tokenizer, [(sample, caption, phrases)])
    weights = [len(span) for span in spans]
    assert weights[0] + weights[1] == weights[2]
    np.testing.assert_allclose(maps[2], np.average(maps[:2], axis=0, weights=weights[:2]), rtol=1e-5, atol=1e-12)


def test_the_map_of_a_whole_caption_is_the_mean_of_all_tokens(model_and_tokenizer, shapes):
    """As in ALBEF's script for RefCOCO+: [CLS] and [SEP] count like words, padding does not."""
    model, tokenizer = model_and_tokenizer
    sample, captions = shapes.read(0), ["red circle", "red circle left of a small green heart"]
    queries = [(sample, text, [Phrase(text, text, 0, len(text.split()), [], whole=True)]) for text in captions]
    maps, spans = phrase_maps(model, tokenizer, queries)
    for caption, [heat], [span] in zip(captions, maps, spans, strict=True):
        alone = tokenize(model, tokenizer, [caption])
        relevance = model.word_relevance(single_pixels(model, sample), alone.input_ids, alone.attention_mask)
        assert span == list(range(alone.input_ids.shape[1]))
        expected = relevance[0].mean(0)[model.prefix_tokens :].reshape(model.grid_size).numpy()
        np.testing.assert_allclose(heat, expected, rtol=1e-4, atol=1e-9)
    maps, _ = phrase_maps(model, tokenizer, queries, layer=2)  # the last: [CLS] alone has a map there
    assert all(heat.max() > 0 for [heat] in maps)
    with pytest.raises(UsageError, match="from 0 to 1, got 2; in the last of 3 layers no word reaches"):
        phrase_maps(model, tokenizer, [(sample, "red", [Phrase("red", "red", 0, 1, [])])], layer=2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"captions": "some"}, "captions: expected 'first' or 'all', got 'some'"),
        ({"match_score": "odds"}, "match_score: expected 'log_odds' or 'logit', got 'odds'"),
        ({"rerank": 5}, "rerank: expected 0, or at least 10"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"limit": 0}, "limit: expected at least 1 or None, got 0"),
    ],
)
def test_retrieval_checks_its_options(model_and_tokenizer, shapes, options, message):
    with pytest.raises(UsageError, match=message):
        evaluate_retrieval(*model_and_tokenizer, shapes, **options)


def test_grounding_checks_its_options(model_and_tokenizer, shapes):
    for layer in (-1, 2, 3):
        with pytest.raises(UsageError, match=f"layer: expected a fusion layer from 0 to [12], got {layer}"):
            evaluate_grounding(*model_and_tokenizer, shapes, layer=layer)
    with pytest.raises(UsageError, match="source: expected at least one sample"):
        evaluate_grounding(*model_and_tokenizer, ListSource([]))


def test_batches():
    assert list(batches(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(batches([], 2)) == []


def test_format_table():
    table = format_table("Title", {"odd": 2, "even": 0}, ["name", "x"], [["a", "1.0"], ["long", "10.0"]])
    assert table.splitlines() == ["Title (2 odd)", "name     x", "----  ----", "a      1.0", "long  10.0"]
