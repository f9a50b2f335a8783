"""What was said so far, as the tokens that a model goes on from."""

from collections.abc import Sequence

from megalite.config.model import ModelConfig
from megalite.generation.prompts import check_prompt
from megalite.tokenizer.template import ChatTemplate, Message


class Conversation:
    """Messages in turn, rendered anew for each answer: their tokens are those that the template gives them.

    max_new_tokens: of an answer, for which the model's context must have room behind the prompt.
    system: what is said first, and stays when older messages have to go.

    Attributes:
        is_cut: whether older messages had to go.

    Raises PromptError when the system message leaves no room, UnusableRecordError when the template does not
    take it.
    """

    def __init__(
        self, template: ChatTemplate, model: ModelConfig, max_new_tokens: int, system: str | None = None
    ) -> None:
        self.template, self.model, self.max_new_tokens = template, model, max_new_tokens
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.begin("?")
        self.clear()

    def clear(self) -> None:
        """Forget what was said, but for the system message."""
        self._turns: list[Message] = []
        self.is_cut = False

    def begin(self, message: str) -> list[int]:
        """As `ask`, of a new conversation."""
        self.clear()
        return self.ask(message)

    def ask(self, message: str) -> list[int]:
        """Token ids of the conversation with a user's message, up to where the answer begins.

        As many of the oldest pairs of message and answer as it takes are forgotten to make room. Raises
        PromptError when the message does not fit by itself, UnusableRecordError when the template does not
        take it; then nothing has been said.
        """
        turns = [*self._turns, {"role": "user", "content": message}]
        tokens = self._tokens(turns)
        while len(tokens) + self.max_new_tokens > self.model.max_position_embeddings and len(turns) > 1:
            turns = turns[2:]
            tokens = self._tokens(turns)
        check_prompt(tokens, self.template.tokenizer.name, self.model, self.max_new_tokens)
        self.is_cut |= len(turns) <= len(self._turns)
        self._turns = turns
        return tokens

    def answer(self, message: str) -> None:
        """What the model said to the last message."""
        self._turns = [*self._turns, {"role": "assistant", "content": message}]

    def _tokens(self, turns: Sequence[Message]) -> list[int]:
        return self.template.prompt([*self._system, *turns])
