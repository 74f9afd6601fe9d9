"""Zero-shot evaluation of a pretrained model: retrieval and grounding, without fine-tuning.

Retrieval measures recall@k in both directions, by image-text contrast (ITC) alone and after image-text matching (ITM)
has re-ranked the best candidates of each query. Grounding measures how well word maps fall into the boxes of what the
words name, next to the scores of a random and an even map. Maps compares several ways to make such maps.
"""

from softmask_fast.evaluation.grounding import GroundingReport, evaluate_grounding
from softmask_fast.evaluation.map_methods import MapsReport, evaluate_maps
from softmask_fast.evaluation.retrieval import RetrievalReport, evaluate_retrieval

__all__ = [
    "GroundingReport", "MapsReport", "RetrievalReport", "evaluate_grounding", "evaluate_maps", "evaluate_retrieval",
]  # fmt: skip
