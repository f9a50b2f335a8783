"""What a user can do wrong with data."""

from megalite.error import UserError


class DataError(UserError):
    """One line for a person: which file and field, what was expected, what was found, the remedy."""
