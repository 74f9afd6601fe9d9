"""What a pretrained model can do without fine-tuning: find images by text and text by images, and point at words.

Retrieval: recall@k in both directions, by image-text contrast (ITC) alone and after image-text matching (ITM) has
re-ranked the best k candidates of every query. Grounding: how well the word heat maps fall into the boxes of the words,
beside the floors that a map without any knowledge reaches.
"""

from softmask_fast.evaluation.grounding import GroundingReport, evaluate_grounding
from softmask_fast.evaluation.retrieval import RetrievalReport, evaluate_retrieval

__all__ = ["GroundingReport", "RetrievalReport", "evaluate_grounding", "evaluate_retrieval"]
