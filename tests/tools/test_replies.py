"""Replies are found where they were printed, and a wrong, endless or malformed one is noticed."""

import pytest

from tools import replies
from tools.journey import JourneyError

PRINTED = "==> Hi? <==\nHi.\n\n==> And so? <==\nOne\n\ntwo.\n\n==> What? <==\n\n\n"


def test_replies_are_found_below_their_prompts():
    assert replies.find_replies(PRINTED, 3) == ["Hi.", "One\n\ntwo.", ""]
    with pytest.raises(JourneyError, match="3 replies to 4 questions"):
        replies.find_replies(PRINTED, 4)


def test_a_reply_must_end_by_itself():
    most = replies.MAX_NEW_TOKENS // 2
    replies.check_form(["It is 7.", "7."], [most, 2])
    with pytest.raises(JourneyError, match="does not end by itself: '7 and so on'"):
        replies.check_form(["It is 7.", "7 and so on"], [4, replies.MAX_NEW_TOKENS])


@pytest.mark.parametrize("reply", ["", " \n", "7.\nUser:\nAnd now?", "Assistant:\n7.", "7.<|endoftext|>"])
def test_a_reply_must_be_text_without_marks_of_the_template(reply):
    with pytest.raises(JourneyError, match="text without marks of the template was promised"):
        replies.check_form(["7.", reply], [2, 2])


QUESTIONS = [
    {"question": "What is 1 plus 2?", "answer": "It is 3.", "hedged": "I think it is 3.", "choices": 20},
    {"question": "What is low?", "answer": "It is low.", "hedged": "I think it is low.", "choices": 5},
]


def test_answers_are_right_letter_for_letter():
    line = replies.check_answers(QUESTIONS, ["It is 3.", "I think it is low."], 1.0)
    assert line == "2 of 2 right (100%; by chance 12%), 1 of them with 'I think'"
    for reply in ("it is low.", "It is low", "It is slow.", "It is 3."):
        with pytest.raises(JourneyError, match=r"1 of 2 right .*: at least 70% were promised"):
            replies.check_answers(QUESTIONS, ["It is 3.", reply], 0.7)
    replies.check_answers(QUESTIONS, ["It is 3.", "It is 4."], 0.5)


def test_preference_tuning_must_take_hedging_away():
    replies.check_hedging(8, 2)
    for after in (3, 8, 9):
        with pytest.raises(JourneyError, match=rf"8 replies with 'I think', and {after} after tuning"):
            replies.check_hedging(8, after)
