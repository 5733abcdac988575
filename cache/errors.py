"""Mistakes of the user, told apart from ours. Imports nothing, so the command line has it before anything heavy."""


class UserError(ValueError):
    """A mistake in the user's input: the command line shows its text without a traceback and exits with 2.

    The text is one paragraph and says which field, what was expected, what came, and what to do.
    """
