"""Conversations as token ids, and which of those a model learns, by transformers' chat templates."""

import copy
import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from megalite.error import UnusableRecordError
from megalite.tokenizer.config_file import token_text
from megalite.tokenizer.error import TokenizerError
from megalite.tokenizer.tokenizer import Tokenizer

SHIPPED = Path(__file__).with_name("templates")
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TOKEN = re.compile(r"<\|\w+\|>")

Message = Mapping[str, Any]
Spans = list[tuple[int, int]]  # [begin, end) of characters


class ChatTemplate:
    """A Jinja template with the special tokens of a tokenizer.

    name: for messages. source: the text, in which `{% generation %}` may mark what is learnt.
    """

    def __init__(self, tokenizer: Tokenizer, source: str, name: str) -> None:
        self.tokenizer, self.source, self.name = tokenizer, source, name
        special = tokenizer.special_tokens() | {"eos_token": tokenizer.eos_token}
        special.pop("chat_template", None)
        self._special = {key: token_text(value) for key, value in special.items() if value is not None}
        self.has_marks = bool(_MARK.search(source))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the ids of a conversation."""
        made_from = [self.source, self._special, self.tokenizer.fingerprint()]
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation; with the generation prompt, up to where an answer begins.

        Raises UnusableRecordError when the template does not take it.
        """
        return self._render(messages, add_generation_prompt)[0]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where an answer begins. Raises as `render`, or for none."""
        ids = self._backend.encode(self.render(messages, True), add_special_tokens=False).ids
        if not ids:
            raise UnusableRecordError(f"messages that chat template {self.name} makes no text of")
        return ids

    def encode(
        self, messages: Sequence[Message], num_prompt_messages: int = 0
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and of each whether it is learnt: what the assistant says, to its end.

        num_prompt_messages: so many messages at the beginning are not learnt, whoever says them.

        Raises UnusableRecordError when nothing of it is learnt or the template does not take it, and
        TokenizerError when what is learnt cannot be told from the template.
        """
        text, spans = self._learnt(messages, num_prompt_messages)
        encoding = self._backend.encode(text, add_special_tokens=False)
        begins, ends = zip(*encoding.offsets, strict=True) if encoding.ids else ((), ())
        is_learnt = [False] * len(encoding.ids)
        for begin, end in spans:  # all tokens with a character in the span
            tokens = range(bisect_right(ends, begin), bisect_left(begins, end))
            is_learnt[tokens.start : tokens.stop] = [True] * len(tokens)
        if not any(is_learnt):
            raise UnusableRecordError("no assistant text", "the chat template marks none")
        return encoding.ids, is_learnt

    def _learnt(self, messages: Sequence[Message], num_prompt_messages: int) -> tuple[str, Spans]:
        """The text, and the spans of it that are learnt: those that the template marks, or each answer."""
        if self.has_marks:
            text, marked = self._render(messages, False, marks=True)
            begin = self._begin(messages, num_prompt_messages, text) if num_prompt_messages else 0
            return text, [(max(start, begin), end) for start, end in marked if max(start, begin) < end]
        text = self.render(messages)
        answers = [i for i in range(num_prompt_messages, len(messages)) if _is_answer(messages[i])]
        return text, [(self._begin(messages, i, text), self._end(messages, i, text)) for i in answers]

    def _begin(self, messages: Sequence[Message], index: int, text: str) -> int:
        """Where message `index` begins: an answer behind the prompt that a model is given for it."""
        prompted = index < len(messages) and _is_answer(messages[index])
        return self._prefix_length(messages[:index], text, prompted)

    def _end(self, messages: Sequence[Message], index: int, text: str) -> int:
        return self._prefix_length(messages[: index + 1], text, False)

    def _prefix_length(self, messages: Sequence[Message], text: str, prompted: bool) -> int:
        prefix = self.render(messages, prompted)
        if not text.startswith(prefix):
            found = f"the first {len(messages)} messages alone do not begin the whole conversation"
            raise TokenizerError(
                f"chat template {self.name}: {found}, so what is learnt cannot be told: mark it "
                "in the template with {% generation %} and {% endgeneration %}"
            )
        return len(prefix)

    def _render(self, messages: Sequence[Message], prompted: bool, marks: bool = False) -> tuple[str, Spans]:
        from jinja2 import TemplateError, TemplateSyntaxError  # slow to import, as transformers is
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # whose annotation says less than it returns
        options = {"add_generation_prompt": prompted, "return_assistant_tokens_mask": marks, **self._special}
        try:
            texts, spans = render([list(messages)], chat_template=self.source, **options)
        except TemplateSyntaxError as error:
            raise TokenizerError(
                f"chat template {self.name}: line {error.lineno}: {error.message}"
            ) from error
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise UnusableRecordError(
                f"messages that chat template {self.name} does not take", reason
            ) from error
        return texts[0], spans[0] if marks else []

    @cached_property
    def _backend(self) -> Backend:
        """The tokenizer without its last part, which may take spaces away from where tokens begin and end."""
        backend = copy.deepcopy(self.tokenizer.to_backend())
        backend.post_processor = None
        return backend


def open_template(tokenizer: Tokenizer, template: str | None = None) -> ChatTemplate | None:
    """A template by the name of one of ours or as a Jinja file; None stands for the tokenizer's own, if any.

    Raises TokenizerError when there is no such template, or it needs tokens that the tokenizer does not have.
    """
    shipped = shipped_templates()
    if template is None:
        source = _own_source(tokenizer)
        return ChatTemplate(tokenizer, source, f"of {tokenizer.name}") if source else None
    if template in shipped:
        source = (SHIPPED / f"{template}.jinja").read_text(encoding="utf-8")
        missing = [token for token in _TOKEN.findall(source) if tokenizer.token_to_id(token) is None]
        if missing or tokenizer.eos_token is None:
            lacks = f"no token {missing[0]!r}" if missing else "no end of text"
            remedy = "choose 'plain', which needs an end of text only, or a tokenizer that has it"
            raise TokenizerError(f"chat template {template}: {tokenizer.name} has {lacks}: {remedy}")
        return ChatTemplate(tokenizer, source, template)
    if not Path(template).is_file():
        expected = f"expected a Jinja file or one of {', '.join(shipped)}"
        raise TokenizerError(f"chat template {template}: {expected}, found no such file: name another")
    return ChatTemplate(tokenizer, Path(template).read_text(encoding="utf-8"), template)


def shipped_templates() -> list[str]:
    """The names of ours."""
    return sorted(path.stem for path in SHIPPED.glob("*.jinja"))


def _own_source(tokenizer: Tokenizer) -> str | None:
    source = tokenizer.special_tokens().get("chat_template")
    if isinstance(source, list):  # several with names, as transformers 4 wrote them
        return next((one["template"] for one in source if one["name"] == "default"), None)
    return source


def _is_answer(message: Message) -> bool:
    return message.get("role") == "assistant"
