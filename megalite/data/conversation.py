"""A record's columns to token sequences, and which tokens of them are learnt. Columns go by TRL's names.

    messages                    a conversation: what the assistant says is learnt
    prompt, completion          texts, or messages: the completion is learnt
    text                        all of it is learnt
    prompt, chosen, rejected    a pair of answers: texts, or messages
    chosen, rejected            a pair of whole conversations, or texts, whose common beginning is the prompt
    prompt, completion, label   an answer by itself, and whether it is desirable

A message is {"role": ..., "content": ...}. Texts get the end of text, which is learnt; conversations end as
their template ends them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from megalite.data.error import DataError
from megalite.data.rows import Row
from megalite.error import UnusableRecordError

ROLES = ("system", "developer", "user", "assistant", "tool")

Messages = list[dict[str, Any]]


class Encoder(Protocol):
    """What a tokenizer does here."""

    @property
    def eos_token_id(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def fingerprint(self) -> str: ...


class Template(Protocol):
    """What a chat template does here: ids of a conversation, and which are learnt behind its prompt."""

    @property
    def fingerprint(self) -> str: ...

    def encode(self, messages: Messages, num_prompt_messages: int = 0) -> tuple[list[int], list[bool]]: ...


class Learnt(NamedTuple):
    """A sequence of token ids, per token whether it is learnt, and whether that is to be said or avoided."""

    ids: list[int]
    is_learnt: list[bool]
    is_desirable: bool = True


@dataclass(frozen=True)
class RecordEncoder:
    """Turns records into sequences of at most `seq_length` tokens: two of a pair, one of any other.

    All raise UnusableRecordError for a record that cannot be learnt from, DataError for want of a template.
    """

    tokenizer: Encoder
    template: Template | None
    seq_length: int

    def conversation(self, row: Row) -> list[Learnt]:
        """The one sequence of a record with `messages`, `prompt` and `completion`, or `text`."""
        if "messages" in row:
            found = self._dialogue([], _messages(row["messages"], "messages"))
        elif "prompt" in row and "completion" in row:
            found = self._answer(row["prompt"], row["completion"], "completion")
        elif "text" in row:
            found = self._text("", _filled(row["text"], "text"))
        else:
            raise _no_columns(row, "messages, prompt and completion, or text")
        _refuse_tools(row)
        return [self._checked(found)]

    def pair(self, row: Row) -> list[Learnt]:
        """The two sequences, chosen and rejected, of a record with those columns."""
        if "chosen" not in row or "rejected" not in row:
            raise _no_columns(row, "chosen and rejected")
        _refuse_tools(row)
        chosen, rejected = row["chosen"], row["rejected"]
        if chosen == rejected:
            raise UnusableRecordError("equal chosen and rejected")
        prompt = row.get("prompt")
        if prompt is None or (isinstance(prompt, str) and isinstance(chosen, list)):
            prompt, chosen, rejected = _split_prompt(chosen, rejected)
        sides = (("chosen", chosen), ("rejected", rejected))
        return [self._checked(self._answer(prompt, answer, name)) for name, answer in sides]

    def unpaired(self, row: Row) -> list[Learnt]:
        """The one sequence of a record with `prompt`, `completion` and `label`."""
        if not {"prompt", "completion", "label"} <= row.keys():
            raise _no_columns(row, "prompt, completion and label")
        _refuse_tools(row)
        label = row["label"]
        if not isinstance(label, bool):
            raise UnusableRecordError("label that is neither true nor false", f"found {_kind(label)}")
        found = self._checked(self._answer(row["prompt"], row["completion"], "completion"))
        return [found._replace(is_desirable=label)]

    def _answer(self, prompt: Any, answer: Any, name: str) -> Learnt:
        if isinstance(prompt, str) and isinstance(answer, str):
            return self._text(prompt, _filled(answer, name))
        if answer == []:
            raise UnusableRecordError(f"empty {name}")
        return self._dialogue(_messages(prompt, "prompt", 0), _messages(answer, name))

    def _text(self, prompt: str, answer: str) -> Learnt:
        before, ids, eos = (
            self.tokenizer.encode(prompt),
            self.tokenizer.encode(answer),
            self.tokenizer.eos_token_id,
        )
        ids = ids if ids[-1:] == [eos] else [*ids, eos]
        return Learnt(before + ids, [False] * len(before) + [True] * len(ids))

    def _dialogue(self, prompt: Messages, answer: Messages) -> Learnt:
        if not any(message["role"] == "assistant" for message in answer):
            raise UnusableRecordError("no assistant turn")
        if self.template is None:
            remedy = "name a Jinja file or one of the shipped ones (data.chat_template)"
            raise DataError(f"the data has conversations, and the tokenizer no chat template: {remedy}")
        return Learnt(*self.template.encode(prompt + answer, len(prompt)))

    def _checked(self, found: Learnt) -> Learnt:
        if len(found.ids) > self.seq_length:
            raise UnusableRecordError(f"more than {self.seq_length} tokens", f"{len(found.ids)} tokens")
        if not any(found.is_learnt[1:]):  # the first token follows none, so that nothing predicts it
            raise UnusableRecordError("nothing to learn", f"{len(found.ids)} tokens")
        return found


def _messages(value: Any, name: str, at_least: int = 1) -> Messages:
    """Checked, without the fields that a table has filled with None."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UnusableRecordError(f"{name} that is no list of messages", f"found {_kind(value)}")
    if len(value) < at_least:
        raise UnusableRecordError(f"empty {name}")
    messages = [{key: field for key, field in message.items() if field is not None} for message in value]
    for message in messages:
        if message.get("role") not in ROLES:
            raise UnusableRecordError(
                "unknown role", f"{message.get('role')!r}, expected one of {', '.join(ROLES)}"
            )
        if not isinstance(message.get("content"), str):
            raise UnusableRecordError("a message without text", f"content is {_kind(message.get('content'))}")
    return messages


def _filled(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise UnusableRecordError(f"{name} that is no text", f"found {_kind(value)}")
    if not value.strip():
        raise UnusableRecordError(f"empty {name}")
    return value


def _split_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The common beginning and both rests; texts are not cut behind a space, which tokens begin with."""
    if not (_is_sequence(chosen) and type(chosen) is type(rejected)):
        raise UnusableRecordError(
            "chosen and rejected of two kinds", f"{_kind(chosen)} and {_kind(rejected)}"
        )
    cut = _common_length(chosen, rejected)
    if isinstance(chosen, str) and chosen[cut - 1 : cut] == " ":
        cut -= 1
    if cut == 0:
        raise UnusableRecordError("no prompt and no common beginning")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


def _is_sequence(value: Any) -> bool:
    return isinstance(value, str | list)


def _refuse_tools(row: Row) -> None:
    if row.get("tools"):
        raise UnusableRecordError("tools, which are not supported")


def _no_columns(row: Row, expected: str) -> UnusableRecordError:
    return UnusableRecordError(f"no {expected}", f"found {', '.join(map(str, row))[:200] or 'none'}")


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
