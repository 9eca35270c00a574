"""The one exception a user of the commands can cause."""


class UserError(Exception):
    """A mistake in what the user gave: a key, a value, a file.

    Its text is one line that names the thing, says what was expected, and gives the remedy. Commands print
    it as `error: ...` on standard error and exit with status 2; nothing else is shown.
    """
