"""What ends an assistant's turn, found out from the chat template itself."""

from typing import NamedTuple

from megalite.error import UnusableRecordError
from megalite.tokenizer.error import TokenizerError
from megalite.tokenizer.template import ChatTemplate

# Messages whose places in the rendered text tell where a reply ends; words that no template says itself.
QUESTION, REPLY, NEXT_QUESTION = "question-8c1f", "reply-5b7e", "question-2d90"


class TurnEnd(NamedTuple):
    """How a model says that its turn is over: by a token, or by a text where the template has none."""

    token_ids: frozenset[int]
    texts: tuple[str, ...]


NO_TURN = TurnEnd(frozenset(), ())  # of a text that is no conversation


def find_turn_end(template: ChatTemplate) -> TurnEnd:
    """The first special token behind a reply, such as <|im_end|>, if nothing but spaces comes before it.

    Else the text that the template puts between a reply and the next message, up to such a token; where
    that is nothing but spaces, neither.

    Raises TokenizerError for a template that does not take a conversation.
    """
    behind = _text_behind_a_reply(template)
    added = template.tokenizer.to_backend().get_added_tokens_decoder()
    tokens = {token.content: token_id for token_id, token in added.items() if token.content.strip()}
    # At one place the longest counts, as it does where texts become tokens.
    places = sorted((behind.find(text), -len(text), text) for text in tokens if text in behind)
    if places and not behind[: places[0][0]].strip():
        return TurnEnd(frozenset({tokens[places[0][2]]}), ())
    text = behind[: places[0][0]] if places else behind
    return TurnEnd(frozenset(), (text,) if text.strip() else ())


def _text_behind_a_reply(template: ChatTemplate) -> str:
    contents = {"user": QUESTION, "assistant": REPLY}
    messages = [{"role": role, "content": content} for role, content in contents.items()]
    messages.append({"role": "user", "content": NEXT_QUESTION})
    try:
        _, _, behind = template.render(messages).partition(REPLY)
    except UnusableRecordError as error:
        raise TokenizerError(f"chat template {template.name} takes no conversation: {error}") from error
    return behind.partition(NEXT_QUESTION)[0]
