"""The text of tokens as they come, one after another."""

from collections.abc import Collection, Sequence

from megalite.tokenizer.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character are shown as


class Continuation:
    """What a model adds to one prompt, up to a token or a text that ends it, neither of which is shown.

    Attributes:
        text: all of it so far.
        is_complete: whether it has ended; what is added then is ignored.
    """

    def __init__(
        self, tokenizer: Tokenizer, end_tokens: Collection[int] = (), stop_texts: Sequence[str] = ()
    ) -> None:
        self.tokenizer, self.end_tokens, self.stop_texts = tokenizer, end_tokens, stop_texts
        self.text, self.is_complete = "", False
        self._tokens: list[int] = []
        self._num_told = 0

    def add(self, token: int) -> None:
        """One more token."""
        if self.is_complete:
            return
        if token in self.end_tokens:
            self.is_complete = True
            return
        self._tokens.append(token)
        self.text = self.tokenizer.decode(self._tokens)
        stops = [place for stop in self.stop_texts if (place := self.text.find(stop)) >= 0]
        if stops:
            self.text, self.is_complete = self.text[: min(stops)], True

    def end(self) -> None:
        """No more tokens will come."""
        self.is_complete = True

    def news(self) -> str:
        """What has come since the last call and stays: whole characters, and no beginning of a stop text."""
        stop = len(self.text) if self.is_complete else self._settled()
        told, self._num_told = self._num_told, max(stop, self._num_told)
        return self.text[told:stop]

    def _settled(self) -> int:
        """How much of the text no later token takes back."""
        text = self.text.rstrip(UNFINISHED)
        begun = [
            size for stop in self.stop_texts for size in range(1, len(stop)) if text.endswith(stop[:size])
        ]
        return len(text) - max(begun, default=0)
