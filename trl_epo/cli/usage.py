"""What the user can mend."""


class UsageError(ValueError):
    """A setting that cannot work; the command ends with its message, without a traceback."""
