"""The model that comes with the library shows something true."""

from softmask_fast.data.sources import open_source
from softmask_fast.evaluation import evaluate_grounding, evaluate_retrieval
from softmask_fast.hub import DEMO
from softmask_fast.model.export import read_model


def test_the_demo_points_at_what_words_name_and_finds_scenes():
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5 * 2**20
    model, tokenizer = read_model(DEMO)
    source = open_source("shapes:objects=3", split="val", image_size=model.config.image_size)
    grounding = evaluate_grounding(model, tokenizer, source, limit=64)
    assert grounding.pointing_game["model"] > 0.7 and grounding.box_accuracy["model"] > 0.75
    retrieval = evaluate_retrieval(model, tokenizer, source, limit=64)
    assert min(ranked["text_to_image"]["recall@1"] for ranked in (retrieval.itc, retrieval.both)) > 0.6
