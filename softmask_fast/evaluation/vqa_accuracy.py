"""The official accuracy of VQA v2 (Antol et al., ICCV 2015; Goyal et al., CVPR 2017).

An answer scores min(annotators who gave it / 3, 1), averaged over all subsets that leave out one annotator. If the
annotators differ, all answers are normalized first, by the rules of GT-Vision-Lab's evaluation code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from softmask_fast.errors import UsageError

FEWEST_ANNOTATORS = 4  # with fewer, no answer could score 1
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = ("a", "an", "the")
NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                   "0 0 1 2 3 4 5 6 7 8 9 10".split(), strict=True))  # fmt: skip
# each of these is also meant if one of its apostrophes is missing
_WITH_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {
    word[:index] + word[index + 1 :]: word for word in _WITH_APOSTROPHES for index, c in enumerate(word) if c == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # reversed in the official table


def vqa_accuracy(answer: str, annotated: Sequence[str]) -> float:
    """The accuracy of an answer, in [0, 1], given the answers of the annotators (ten in VQA v2).

    Raises UsageError for fewer than FEWEST_ANNOTATORS answers.
    """
    if len(annotated) < FEWEST_ANNOTATORS:
        raise UsageError(f"annotated: expected the answers of at least {FEWEST_ANNOTATORS} people, got {annotated!r}")
    answer, annotated = _stripped(answer), [_stripped(other) for other in annotated]
    if len(set(annotated)) > 1:
        answer, annotated = normalize_answer(answer), [normalize_answer(other) for other in annotated]
    matches = [answer == other for other in annotated]
    subsets = [min(1.0, (sum(matches) - match) / 3) for match in matches]
    return sum(subsets) / len(subsets)


def normalize_answer(answer: str) -> str:
    """The answer in lower case, without punctuation and articles, with numbers as digits and whole contractions."""
    joined = re.search(r"\d,\d", answer) is not None
    text = answer
    for mark in PUNCTUATION:
        apart = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if apart or joined else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _stripped(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
