"""The words of a text that an image can show."""

from __future__ import annotations

from collections.abc import Sequence

# Articles, pronouns, prepositions, conjunctions, auxiliaries, and words for relative places.
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those there here
    i you he she it we they me him her us them my your his hers its our their
    who whom whose which what where when why how some any each every all both another other one ones
    about above across after against along among around as at away back before behind below beneath beside between
    beyond by down during for from front in inside into left like near next of off on onto out outside over past right
    side through to together top toward towards under underneath until up upon with within without
    and but or nor so yet if than then because while although though
    am is are was were be been being has have had having do does did doing done can could may might must shall should
    will would not no too very just only also still
    """.split()
)


def content_words(words: Sequence[str]) -> list[int]:
    """The indices of the words that name something; of all words if none does."""
    bare = ["".join(filter(str.isalnum, word)).lower() for word in words]
    return [i for i, word in enumerate(bare) if word and word not in FUNCTION_WORDS] or list(range(len(words)))
