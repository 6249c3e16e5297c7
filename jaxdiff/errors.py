"""The one exception that a user's mistake ends in."""


class UserError(Exception):
    """A mistake of the user's, told in one sentence: what is wrong, what was expected, what to do.

    The command line prints it without a traceback and exits with status 2.
    """
