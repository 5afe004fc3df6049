"""What a user can get wrong: each message says what, with the numbers, and what to do about it."""

_LONGEST_REASON = 200  # some list every tensor of a model


class MoneError(Exception):
    """A problem the user can mend; the command line prints it as one line and exits with 1."""


def first_line(error: BaseException) -> str:
    """Return the first line of what another library's error says, to be part of a message of ours.

    A first line that only announces the next one brings it along.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if isinstance(error, KeyError):  # it holds the key alone
        line = f"there is no {line}"
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}..."
