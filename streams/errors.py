"""What a caller is told when an input cannot be taken, or a training cannot go on."""


class Refused(ValueError):
    """An input that is not taken: what is wrong, where, what to do; at most three lines."""

    def __init__(self, what: str, where: str = "", remedy: str = ""):
        super().__init__("\n".join(printable(line) for line in (what, where, remedy) if line))


class TrainingFailed(RuntimeError):
    """A number is not finite; the last checkpoint is as it was."""


def printable(text: str) -> str:
    """Show control characters, line breaks and lone surrogates as escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
