"""What can be wrong with a tokenizer."""

from megalite.error import UserError


class TokenizerError(UserError):
    """One line for a person: what is wrong with a tokenizer, and the remedy."""
