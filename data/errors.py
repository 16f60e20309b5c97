"""The one exception whose text is meant for the user."""


class InputError(Exception):
    """What the user gave cannot be used. The message is one line: what is wrong, where, what to do.

    The scripts print it and exit with code 2, without a traceback (utils/cli).
    """
