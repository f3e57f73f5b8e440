"""Errors of the user's making, which are told in one line and without a traceback."""


class UserError(Exception):
    """A mistake in the input: the message names the value, what was expected and a way out."""
