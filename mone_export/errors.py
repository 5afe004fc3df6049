"""What a user can get wrong: each message says what, with the numbers, and what to do about it."""

_LONGEST_REASON = 200  # some list every tensor of a model


class MoneError(Exception):
    """A problem the user can mend; the command line prints it as one line and exits with 1."""


def first_line(error: BaseException) -> str:
    """Return the first line of what another library's error says, to be part of a message of ours."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}..."
