"""What every section of a run's configuration has in common, and how its mistakes are told."""

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megalite.error import UserError

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class ConfigError(UserError):
    """A mistake in a configuration, told to its author in one line."""


class Section(BaseModel):
    """A frozen group of settings: an unknown key or a value of another type is an error, never a guess."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


_EXPECTED = {
    "missing": "a value, which is required",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text (put it in quotes)",
    "list_type": "a list",
    "model_type": "a section of 'key: value' lines",
    "literal_error": "one of {expected}",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le}",
}


def explain(error: ValidationError, where: dict[str, str] | None = None, default: str = "") -> str:
    """Tell in one line what pydantic found: the key, what was given, what is expected, where it stands.

    `where` maps a dotted key to the place that states it ("in FILE"); `default` serves the others.
    """
    return "; ".join(_explain_one(dict(e), where or {}, default) for e in error.errors())


def _explain_one(error: dict[str, Any], where: dict[str, str], default: str) -> str:
    key = ".".join(str(part) for part in error["loc"])
    place = next((where[k] for k in (key, key.rpartition(".")[0]) if k in where), default)
    text = _mistake(error, key) + (f" ({place})" if place else "")
    return " ".join(text.split())


def _mistake(error: dict[str, Any], key: str) -> str:
    if error["type"] == "value_error":
        own_words = str(error["ctx"]["error"])
        return f"{key}: {own_words}" if key else own_words
    if error["type"] == "extra_forbidden":
        return f"unknown key '{key}'"
    expected = _EXPECTED.get(error["type"])
    expected = expected.format(**error.get("ctx", {})) if expected else error["msg"]
    expected = expected.replace("False", "false").replace("True", "true")
    if error["type"] == "missing":
        return f"{key}: expected {expected}"
    return f"{key} is {json.dumps(error['input'], default=repr)}: expected {expected}"
