"""What a model writes, on standard output."""

from collections.abc import Sequence

from megalite.tokenizer.continuation import Continuation


class Printer:
    """Prints continuations: that of one prompt as it is made, those of several each below its prompt.

    prompts: all of them, in the order in which they come to be complete.
    speaks: whether this rank is the one that prints.
    """

    def __init__(self, prompts: Sequence[str], speaks: bool) -> None:
        self.speaks, self.is_alone = speaks, len(prompts) == 1
        self._prompts = iter(prompts)

    def show(self, texts: Sequence[Continuation]) -> None:
        """What is new."""
        if self.is_alone:
            self._say(texts[0].news())

    def finish(self, texts: Sequence[Continuation]) -> None:
        """The rest, when a batch has had all its tokens."""
        for text in texts:
            text.end()
            prompt, rest = next(self._prompts), text.news()
            self._say(f"{rest}\n" if self.is_alone else f"==> {prompt} <==\n{rest}\n\n")

    def _say(self, text: str) -> None:
        if self.speaks:
            print(text, end="", flush=True)
