"""Every error a user can meet, with the exit code of its command.

EdgeError             1  our bug, when raised bare
  UsageError          2  a flag or a combination of flags is wrong
    MissingPart       2  an optional package is not installed
  OverBudget          3  does not fit the memory
  ParityError         4  an exported model gives other answers than the trained one
  BadFile             5  a file is damaged, hostile, missing or cannot be written
  SourceLost          6  a camera or stream is gone
  EngineMismatch      7  the engine was built for another device or TensorRT
"""


class EdgeError(Exception):
    """Message: what is wrong, what was got, what was expected, what to type next."""
    exit_code = 1


class UsageError(EdgeError):
    exit_code = 2


class MissingPart(UsageError):
    def __init__(self, name, install):
        super().__init__("this needs the package %r, which is not installed. Type: %s" % (name, install))


class OverBudget(EdgeError):
    exit_code = 3


class ParityError(EdgeError):
    exit_code = 4


class BadFile(EdgeError):
    exit_code = 5


class SourceLost(EdgeError):
    exit_code = 6


class EngineMismatch(EdgeError):
    exit_code = 7


def raise_all(problems, heading, cure, shown=20):
    """Raise one BadFile that names every problem (a list of lines), or return when there is none."""
    if problems:
        lines = ["%s (%d):" % (heading, len(problems))] + ["  " + p for p in problems[:shown]]
        if len(problems) > shown:
            lines.append("  ... and %d more" % (len(problems) - shown))
        raise BadFile("\n".join(lines + [cure]))
