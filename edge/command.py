"""What every command does alike: flags from a NamedTuple, exit codes, the first line of output."""
import argparse
import contextlib
import ctypes
import difflib
import errno
import fcntl
import hashlib
import json
import os
import re
import signal
import sys
import traceback

from edge import __version__
from edge.errors import BadFile, EdgeError, OverBudget, UsageError

LONGEST_NAME = 200  # bytes
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)  # before any fork: the new process may not load anything
SECRET = r"(?i)([\w-]*(?:pass(?!through)|pwd|(?<![a-z])pw|token|secret|apikey|api_key)\w*\s*=\s*)(\"[^\"]*\"|[^&;\s/]+)"


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        words = [w for w in message.replace(":", " ").split() if w.startswith("--")]
        near = [m for w in words for m in difflib.get_close_matches(w, self._option_string_actions, 1)]
        hint = " Did you mean %s?" % near[0] if near and "unrecognized" in message else ""
        raise UsageError("%s.%s Type: %s --help" % (without_secrets(message), hint, self.prog))


def _yes_no(parser, flag, default, text):
    parser.add_argument(flag, dest=flag[2:].replace("-", "_"), action="store_true", default=None,
                        help="%s (default %s)" % (text, "yes" if default else "no"))
    parser.add_argument("--no-" + flag[2:], dest=flag[2:].replace("-", "_"), action="store_false",
                        default=None, help=argparse.SUPPRESS)


def parse(config_class, argv, prog, description, helps, choices=None, positional=None):
    """Turn a NamedTuple class with defaults into flags and argv into an instance of it.

    helps: dict field -> help text, one for every field; choices: dict field -> allowed values; positional: the
    field that is given without a flag. A bool gives --x and --no-x. `--config FILE` reads fields from JSON first.
    Raises UsageError for an unknown flag or key or a value of the wrong type."""
    choices = choices or {}
    defaults = config_class._field_defaults
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version="nanopatch " + __version__)
    parser.add_argument("--config", default=None, metavar="FILE", help="read flags from a JSON file (a run's config.json)")
    for name, default in defaults.items():
        flag, text = "--" + name.replace("_", "-"), helps[name]
        if isinstance(default, bool):
            _yes_no(parser, flag, default, text)
        elif name == positional:
            parser.add_argument(name, nargs="?", default=None, help=text)
        else:
            parser.add_argument(flag, type=type(default), default=None, choices=choices.get(name),
                                metavar=None if name in choices else type(default).__name__.upper(),
                                help="%s (default %s)" % (text, "none" if default == "" else default))
    given = vars(parser.parse_args(argv))
    values = dict(defaults)
    if given["config"]:
        values.update(from_json(given["config"], defaults, choices))
    values.update({k: v for k, v in given.items() if v is not None and k in defaults})
    return config_class(**values)


def from_json(path, defaults, choices):
    """Fields of a config class from a JSON file, checked. Raises BadFile for no JSON, UsageError for wrong content."""
    stored = read_json(path, "a config")
    if not isinstance(stored, dict):
        raise UsageError("%s holds no object of flags; expected a run's config.json" % path)
    for key, value in stored.items():
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, 1)
            raise UsageError("%s: unknown key %r%s" % (path, key, ", did you mean %r?" % near[0] if near else ""))
        kind = type(defaults[key])
        if kind is float and type(value) is int:
            stored[key] = float(value)
        elif type(value) is not kind:
            raise UsageError("%s: %s is %r, expected %s" % (path, key, value, kind.__name__))
        if key in choices and value not in choices[key]:
            raise UsageError("%s: %s is %r, expected one of %s" % (path, key, value, ", ".join(choices[key])))
    return stored


def read_json(path, what):
    """The object in a JSON file. Raises BadFile when it is missing, unreadable or no JSON."""
    try:
        with open(path, encoding="utf-8-sig") as handle:  # some editors begin with a mark
            return json.load(handle, parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as exc:
        raise BadFile("cannot read %s: %s: %s" % (what, path, exc)) from exc


def _no_constant(name):
    raise ValueError("%s is no number of JSON" % name)


def fitting_name(name):
    """`name`, or a shorter one of its own, so that there is room behind it: file systems take 255 bytes."""
    if len(os.fsencode(name)) <= LONGEST_NAME:
        return name
    return "%s-%s" % (hashlib.sha256(os.fsencode(name)).hexdigest()[:12], name[-40:])


@contextlib.contextmanager
def written(path, mode="w", **options):
    """An open file that becomes `path` when the block ends well: PATH is the old file or the whole new one, never a
    part, whatever stops us. A full disk is reported with the name of the file. options: of open()."""
    part = "%s.%d.part" % (path, os.getpid())
    try:
        with open(part, mode, **(options if "b" in mode else dict(options, encoding="utf-8"))) as handle:
            yield handle
        os.replace(part, path)
    except OSError as exc:
        exc.filename = exc.filename or path  # a failed write() does not know its file
        raise
    finally:
        if os.path.exists(part):
            os.remove(part)


def held(path, **options):
    """The file `path`, emptied and open for text, which nobody else gets from here until it is closed. Raises BlockingIOError where
    somebody has it; a file system without locks keeps nobody out."""
    handle = open(path, "a", encoding="utf-8", **options)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise
    except OSError:
        pass
    if os.path.isfile(path):
        handle.truncate(0)
    return handle


def sync_folder(folder):
    """What a folder lists reaches the disk; else a power cut could bring the old list back."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_home():
    """The folder for what can be made again: caches of images, engines, and files known to load."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "nanopatch")


def without_secrets(text):
    """Text with URIs or a pipeline as it may be shown: no user, no password, no token."""
    return re.sub(SECRET, r"\1***", re.sub(r"://\S*@", "://***@", text))


def say(text):
    """A line for the person at the terminal: stderr, so that stdout holds results only. Nobody reading it any more stops nothing."""
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except OSError:  # the pipe's reader, or the terminal, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def banner(command, device, backend):
    say("nanopatch %s %s | device %s | backend %s" % (__version__, command, device, backend))


def end_with_parent():
    """To be called in a process that was just forked: it is killed when its parent ends, however that ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def on_signals(handler, *numbers):
    """handler(number, frame) of the signals `numbers` while the block lasts. Others than SIGINT and SIGTERM stay ignored where they are, as
    SIGHUP is under nohup. Off the main thread, where Python allows no handlers, nothing changes."""
    try:
        before = [(number, signal.signal(number, handler)) for number in numbers
                  if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN]
    except ValueError:
        before = []
    try:
        yield
    finally:
        for number, old in before:
            signal.signal(number, old)


def ends_cleanly():
    """SIGTERM, and SIGHUP of a terminal that closes, leave as an exception with code 143 or 129, so that cameras are let go, files
    closed and what is half made is removed."""
    return on_signals(lambda number, _frame: sys.exit(128 + number), signal.SIGTERM, signal.SIGHUP)


def guarded(main):
    """Wrap main(argv) so that errors end in one message and the documented exit code, never in a traceback
    (unless --debug is among the arguments). Returns a function that returns the exit code."""
    def run(argv=None):
        argv = list(sys.argv[1:] if argv is None else argv)
        try:
            return main(argv) or 0
        except KeyboardInterrupt:
            say("interrupted")
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader of stdout has gone: nothing is lost
            return 0
        except Exception as exc:
            if "--debug" in argv:
                traceback.print_exc()
            known = _known(exc)
            say("error: %s" % known)
            return known.exit_code
    return run


def _known(exc):
    if isinstance(exc, EdgeError):
        return exc
    if isinstance(exc, OSError) and exc.errno in DISK_FULL:
        return BadFile("the disk is full, while writing %s. Free some space and type the command again"
                       % (exc.filename or "a file"))
    if isinstance(exc, OSError) and (exc.filename or exc.errno in (errno.EIO, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG)):
        return BadFile("cannot use %s: %s" % (exc.filename or "a file", exc.strerror))
    if isinstance(exc, MemoryError):
        return OverBudget("out of memory. Close other programs, or take smaller images, or a smaller net")
    return EdgeError("this is a bug in nanopatch: %s: %s. Type the command again with --debug and report it"
                     % (type(exc).__name__, exc))
