"""What can be wrong with a tokenizer."""


class TokenizerError(ValueError):
    """One line for a person: what is wrong with a tokenizer, and the remedy."""
