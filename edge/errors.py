"""Every error a user can meet, with the exit code of its command.

EdgeError             1  our bug, when raised bare
  UsageError          2  a flag or a combination of flags is wrong
    MissingPart       2  an optional package is not installed
      MissingElement  2    an element of GStreamer is not
  OverBudget          3  does not fit the memory
  ParityError         4  an exported model gives other answers than the trained one
  BadFile             5  a file is damaged, hostile, missing or cannot be written
  SourceLost          6  a camera or stream is gone for longer than the user's patience. What it suffered from:
    NoCamera          6    it is not there
    BusyCamera        6    another program has it
    NoFrame           6    its frames stopped
    ShortFrame        6    a frame ended early
    TornFrame         6    bytes of a frame are missing or too many
    WrongSize         6    its frames have another size than they began with
    FrozenFrames      6    the same bytes again and again
    BlackFrames       6    nothing but black
    DecoderExit       6    GStreamer ended
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


class MissingElement(MissingPart):
    def __init__(self, name, install):
        UsageError.__init__(self, "this needs GStreamer's %s, which is not installed. %s" % (name, install))


class OverBudget(EdgeError):
    exit_code = 3


class ParityError(EdgeError):
    exit_code = 4


class BadFile(EdgeError):
    exit_code = 5


class SourceLost(EdgeError):
    exit_code = 6
    kind = "source lost"  # the word for it in results.jsonl


class NoCamera(SourceLost):
    kind = "no camera"


class BusyCamera(SourceLost):
    kind = "busy camera"


class NoFrame(SourceLost):
    kind = "no frame"


class ShortFrame(SourceLost):
    kind = "short frame"


class TornFrame(SourceLost):
    kind = "torn frame"


class WrongSize(SourceLost):
    kind = "wrong size"


class FrozenFrames(SourceLost):
    kind = "frozen"


class BlackFrames(SourceLost):
    kind = "black"


class DecoderExit(SourceLost):
    kind = "decoder exit"


class EngineMismatch(EdgeError):
    exit_code = 7


def raise_all(problems, heading, cure, shown=20):
    """Raise one BadFile that names every problem (a list of lines), or return when there is none."""
    if problems:
        lines = ["%s (%d):" % (heading, len(problems))] + ["  " + p for p in problems[:shown]]
        if len(problems) > shown:
            lines.append("  ... and %d more" % (len(problems) - shown))
        raise BadFile("\n".join(lines + [cure]))
