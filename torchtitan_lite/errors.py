"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """A mistake in a recipe, a path or an environment.

    Commands print it as one line (what, where, the mend) and exit with code 2. Anything else that is
    raised is a defect of ours and keeps its traceback.
    """

    def line(self) -> str:
        """The message as commands print it."""
        return f"error: {' '.join(str(self).splitlines())}"
