"""What a command is at, for a profiler that watches it from outside."""
import os
import time

VARIABLE = "NANOPATCH_PHASES"  # the file that `python -m jetson profile` reads


def mark(name):
    """A phase begins. One line in the profiler's file; nothing when no profiler is there."""
    path = os.environ.get(VARIABLE)
    if path:
        try:
            with open(path, "a", encoding="utf-8") as handle:
                handle.write("%.4f %d %s\n" % (time.time(), os.getpid(), name))
        except OSError:  # a profiler that cannot be told must not stop what it watches
            pass
