"""Which words have a heat map."""

from softmask_fast.data.words import content_words


def chosen(text):
    words = text.split()
    return [words[i] for i in content_words(words)]


def test_words_that_name_nothing_are_left_out():
    assert chosen("A small dog, with the ball, runs while it rains.") == ["small", "dog,", "ball,", "runs", "rains."]
    assert chosen("the large red ring left of a blue star - above") == ["large", "red", "ring", "blue", "star"]
    assert chosen("ein roter Kreis") == ["ein", "roter", "Kreis"]


def test_a_text_without_such_a_word_keeps_all():
    assert chosen("with the") == ["with", "the"] and chosen("") == []
