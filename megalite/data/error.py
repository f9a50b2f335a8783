"""What a user can do wrong with data."""


class DataError(ValueError):
    """One line for a person: which file and field, what was expected, what was found, the remedy."""
