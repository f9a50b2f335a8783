"""Lines as somebody writes them, waited for no longer than one likes."""

from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import TextIO

from megalite.generation.error import PromptError


class Inbox:
    """The lines of a stream, read beside the work from when the first is waited for.

    ask: called once for each line, when it begins to be waited for.
    """

    def __init__(self, stream: TextIO, ask: Callable[[], object]) -> None:
        self._stream, self._ask, self._is_asked = stream, ask, False
        self._lines: SimpleQueue[str | PromptError | None] = SimpleQueue()
        self._reader = Thread(target=self._read, daemon=True)

    def next(self, seconds: float) -> str | None:
        """The next line without its end, None when there is none. Raises queue.Empty when none comes in time.

        Raises PromptError when the stream cannot be read.
        """
        if self._reader.ident is None:
            self._reader.start()
        if not self._is_asked:
            self._ask()
        self._is_asked = True
        line = self._lines.get(timeout=seconds)
        self._is_asked = False
        if isinstance(line, PromptError):
            raise line
        return line

    def _read(self) -> None:
        try:
            for line in self._stream:
                line.encode()  # Python lets bytes that are no text through where the locale is C
                self._lines.put(line.rstrip("\r\n"))
            self._lines.put(None)
        except (OSError, UnicodeError) as error:
            self._lines.put(PromptError(f"standard input cannot be read: {error}"))
