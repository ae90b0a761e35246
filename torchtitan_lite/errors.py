"""Exceptions that commands answer with one line."""


class UserError(ValueError):
    """A mistake in a recipe, a path or an environment.

    Commands print it as one line (what, where, the mend) and exit with code 2. Anything else that is
    raised is a defect of ours and keeps its traceback.
    """

    def line(self) -> str:
        """The message as commands print it."""
        return _line(self)


class Corruption(RuntimeError):
    """Hardware that computes wrong numbers: nobody's mistake. Training prints it as one line and exits with code 1."""

    def line(self) -> str:
        """The message as commands print it."""
        return _line(self)


def _line(error: Exception) -> str:
    return f"error: {' '.join(str(error).splitlines())}"
