"""The commands' answers to mistakes."""

import pytest

from hrm.common.errors import UserError, run_command


def raiser(error: BaseException):
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("lr=x: give a number"), 2, "error: lr=x: give a number"),
        (
            PermissionError(13, "Permission denied", "/srv/data"),
            2,
            "error: /srv/data: Permission denied; check the path and its permissions",
        ),
        (KeyboardInterrupt(), 130, "interrupted: nothing was written"),
    ],
)
def test_a_mistake_is_one_line(error, status, line, capsys):
    assert run_command(raiser(error), "nothing was written") == status
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("a bug")])
def test_our_own_errors_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run_command(raiser(error), "")


def test_a_successful_command_prints_nothing(capsys):
    assert run_command(lambda: None, "") == 0
    assert capsys.readouterr().err == ""
