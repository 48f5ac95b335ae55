"""Text that is safe to show: on one line, or in a terminal."""

_LONGEST = 2000  # characters of a line


def one_line(message: object) -> str:
    """An error's text on one line that steers no terminal, a very long one without its middle."""
    line = printable(" ".join(str(message).split())) or type(message).__name__
    half = _LONGEST // 2
    return line if len(line) <= _LONGEST else f"{line[:half]} ... {line[-half:]}"


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters become U+FFFD, not breaks and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
