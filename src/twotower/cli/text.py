"""Text that is safe to show: on one line, or in a terminal."""

_LONGEST = 2000  # characters of a line


def one_line(message: object) -> str:
    """The text of an error or warning, which may quote a file: without line breaks, steering no
    terminal, and without the middle of a very long one (the remedy stands at the end).
    """
    line = printable(" ".join(str(message).split())) or type(message).__name__
    half = _LONGEST // 2
    return line if len(line) <= _LONGEST else f"{line[:half]} ... {line[-half:]}"


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters become U+FFFD, except line breaks and
    tabs.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
