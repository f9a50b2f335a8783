"""A conversation: messages come in a line each, answers go out as they are made."""

from collections.abc import Callable
from queue import Empty

from megalite.error import UserError
from megalite.generation.conversation import Conversation
from megalite.generation.inbox import Inbox
from megalite.generation.place import Place
from megalite.generation.printer import Printer
from megalite.generation.writer import Writer

NEW = "/new"
# While nobody writes, the first process tells the others so: no collective may wait as long as a person does.
WAITING_SECONDS = 30.0


def converse(
    writer: Writer, conversation: Conversation, inbox: Inbox, tell: Callable[[str], object], place: Place
) -> None:
    """Answer message after message, until there are no more; on every process of the place.

    conversation, inbox, tell: only those of the first process are used. `tell` gets a line for the person.
    """
    while (prompt := place.from_first(lambda: next_prompt(conversation, inbox, tell))) is not None:
        if prompt:
            [reply] = writer.write([prompt], Printer([""], place.is_first))
            if place.is_first:
                conversation.answer(reply.text)


def next_prompt(conversation: Conversation, inbox: Inbox, tell: Callable[[str], object]) -> list[int] | None:
    """Token ids to go on from; [] when there is nothing to answer yet, None when nothing more will come."""
    try:
        line = inbox.next(WAITING_SECONDS)
    except Empty:
        return []
    if line is None:
        return None
    if line == NEW:
        conversation.clear()
    if line == NEW or not line.strip():
        return []
    was_cut = conversation.is_cut
    try:
        prompt = conversation.ask(line)
    except UserError as error:
        tell(f"error: {error}")
        return []
    if conversation.is_cut and not was_cut:
        tell("note: the context is full: the oldest messages are left out from here on")
    return prompt
