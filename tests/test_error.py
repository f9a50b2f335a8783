"""Mistakes of a user are told in one line; all others keep their traceback."""

import json

import pytest

from megalite.config.section import ConfigError
from megalite.data.error import DataError
from megalite.error import UserError, run_command, told_to_users
from megalite.tokenizer.error import TokenizerError


def raising(error):
    def command():
        raise error

    return command


def test_the_status_is_the_commands_own(capsys):
    assert [run_command(lambda status=status: status) for status in (None, 0, 3)] == [0, 0, 3]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [UserError, ConfigError, DataError, TokenizerError])
def test_a_users_mistake_is_one_line_and_status_2(kind, capsys):
    assert run_command(raising(kind("steps: expected 1, found 0: give --steps"))) == 2
    assert capsys.readouterr() == ("", "error: steps: expected 1, found 0: give --steps\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "a.txt: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ConnectionError("the Hub does not answer"), "the Hub does not answer"),
    ],
)
def test_the_system_is_quoted_without_its_number(error, line, capsys):
    assert told_to_users(error) == line
    assert run_command(raising(error)) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def bugs():
    yield from (ValueError("bare"), KeyError("x"), AssertionError(), ZeroDivisionError())
    for spoil in (lambda: json.loads("{"), lambda: b"\xff".decode()):
        try:
            spoil()
        except ValueError as error:
            yield error


@pytest.mark.parametrize("error", list(bugs()), ids=lambda error: type(error).__name__)
def test_a_bug_is_raised_on_with_its_traceback(error, capsys):
    assert told_to_users(error) is None
    with pytest.raises(type(error)) as caught:
        run_command(raising(error))
    assert caught.value is error and capsys.readouterr().err == ""


def test_an_interruption_is_told_with_status_130(capsys):
    assert run_command(raising(KeyboardInterrupt())) == 130
    assert run_command(raising(KeyboardInterrupt()), interrupted="half is kept") == 130
    assert capsys.readouterr().err == (
        "error: interrupted: nothing was written\nerror: interrupted: half is kept\n"
    )


def test_a_command_that_leaves_by_itself_is_not_held_back():
    with pytest.raises(SystemExit) as left:
        run_command(raising(SystemExit(143)))
    assert left.value.code == 143
