"""python -m jetson COMMAND: the board, seen and set up from a terminal."""
import importlib
import sys

COMMANDS = {  # a module of this package each, loaded only when it is wanted
    "doctor": "look at the board and the installation, and name the cure for what is wrong",
    "profile": "run a command and record what memory it takes, phase by phase",
    "setup": "swap, power mode and desktop: show what would help, do it, take it back",
}


def main(argv):
    """Hand over to a command. Returns its exit code; 2 for none or an unknown one."""
    if argv and argv[0] in COMMANDS:
        return importlib.import_module("jetson." + argv[0]).main(argv[1:])
    asked = argv[:1] in (["--help"], ["-h"])
    out = sys.stdout if asked else sys.stderr
    if argv and not asked:
        out.write("error: there is no command %r\n" % argv[0])
    out.write("Type one of these, with --help for its flags:\n")
    for name, text in COMMANDS.items():
        out.write("  python -m jetson %-8s %s\n" % (name, text))
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
