"""What a person can ask of a model that it cannot do."""

from megalite.error import UserError


class PromptError(UserError):
    """A prompt that the model cannot continue."""
