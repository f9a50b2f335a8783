"""Text as its tokens come: whole characters, up to what ends it."""

import pytest

from megalite.tokenizer.continuation import Continuation
from megalite.tokenizer.load import load_tokenizer


def told(tokens, stop_texts=(), end_tokens=(256,)):
    """What is news after each token and at the end, and the whole text."""
    continuation = Continuation(load_tokenizer("bytes"), end_tokens, stop_texts)
    news = []
    for token in tokens:
        continuation.add(token)
        news.append(continuation.news())
    continuation.end()
    return [*news, continuation.news()], continuation.text


def test_text_appears_when_its_characters_are_whole():
    assert told([*"aé".encode(), 256]) == (["a", "", "é", "", ""], "aé")


def test_bytes_that_are_no_character_appear_at_the_end():
    assert told([97, 0xC3]) == (["a", "", "\N{REPLACEMENT CHARACTER}"], "a\N{REPLACEMENT CHARACTER}")


def test_nothing_follows_an_end_token():
    assert told([97, 256, 98], end_tokens={256}) == (["a", "", "", ""], "a")


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("one. two", ["."], "one"),
        ("aab", ["ab"], "a"),
        ("aaab", ["aab"], "a"),
        ("xyz", ["z", "y"], "x"),
        ("abc", ["bcd"], "abc"),
        ("né\n\nb", ["\n\n"], "né"),
        ("stop", ["stop"], ""),
    ],
)
def test_a_stop_text_is_never_shown_nor_any_part_of_it_before(text, stops, shown):
    news, whole = told(text.encode(), stops)
    assert "".join(news) == whole == shown
    for count in range(len(news) + 1):
        assert shown.startswith("".join(news[:count]))


def test_what_begins_no_stop_text_is_shown_at_once():
    assert told(b"ab-c", ["--"]) == (["a", "b", "", "-c", ""], "ab-c")
