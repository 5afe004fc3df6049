"""What a user can get wrong: each message says what, with the numbers, and what to do about it."""


class MoneError(Exception):
    """A problem the user can mend; the command line prints it as one line and exits with 1."""
