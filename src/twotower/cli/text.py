"""Text that is safe to show: on one line, or in a terminal."""


def one_line(message: object) -> str:
    """The text of an error or warning without line breaks."""
    return " ".join(str(message).split()) or type(message).__name__


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters become U+FFFD, except line breaks and
    tabs.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
