"""The one error that a caller can act on."""


class MpqError(Exception):
    """The caller can fix this: bad input, a wrong option, a file that is not what it should be.

    The message is one line (one for each fault where several were looked for): where, what was expected, what was got,
    and what to do about it. The command line prints it without a traceback and exits with status 2.
    """
