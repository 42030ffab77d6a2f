"""The one error that a user's input can cause."""


class PairtuneError(ValueError):
    """One sentence that names the thing, the value and the mend; the command line prints it without a traceback."""
