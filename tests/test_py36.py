"""Python 3.6 is checked, not remembered: grammar by the parser, the rest by a list of names."""
import ast
import os
import sys

import pytest

from conftest import ROOT

ABSENT_MODULES = {"dataclasses", "importlib.metadata", "importlib.resources", "graphlib", "zoneinfo"}
ABSENT_NAMES = {
    "typing": {"Literal", "Protocol", "TypedDict", "Final", "Annotated", "ParamSpec", "Self"},
    "contextlib": {"nullcontext", "aclosing"}, "math": {"prod", "dist", "isqrt", "comb", "perm"},
    "time": {"time_ns", "perf_counter_ns", "monotonic_ns"}, "asyncio": {"run"},
    "http.server": {"ThreadingHTTPServer"}, "functools": {"cache", "cached_property", "singledispatchmethod"},
    "datetime": {"fromisoformat"}, "statistics": {"fmean", "quantiles"}, "shlex": {"join"},
}
ABSENT_KEYWORDS = {"capture_output": None, "dirs_exist_ok": None, "missing_ok": None, "text": {"run", "Popen", "check_output"},
                   "initializer": {"ThreadPoolExecutor"}, "required": {"add_subparsers"}}
GENERIC = {"list", "dict", "tuple", "set", "frozenset", "type"}


def files():
    for top in ("jetson", "edge", "train_lite", "export", "scripts", "tests"):
        for folder, _dirs, names in os.walk(os.path.join(ROOT, top)):
            for name in names:
                if name.endswith(".py"):
                    yield os.path.join(folder, name)


def complaints(source):
    """What in `source` Python 3.6 does not have."""
    if sys.version_info >= (3, 8):
        try:
            tree = ast.parse(source, feature_version=(3, 6))
        except SyntaxError as exc:
            return ["grammar: %s" % exc]
    else:
        tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if node.module == "__future__" and "annotations" in names:
                found.append("from __future__ import annotations")
            found += ["%s.%s" % (node.module, n) for n in names & ABSENT_NAMES.get(node.module, set())]
            found += [m for m in ABSENT_MODULES if node.module == m or "%s" % node.module in m.split(".")[:1] and m.split(".")[-1] in names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in ABSENT_MODULES]
        elif isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.attr in ABSENT_NAMES.get(node.value.id, ()):
                found.append("%s.%s" % (node.value.id, node.attr))
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            for keyword in node.keywords:
                if keyword.arg in ABSENT_KEYWORDS and (ABSENT_KEYWORDS[keyword.arg] is None or name in ABSENT_KEYWORDS[keyword.arg]):
                    found.append("%s(%s=)" % (name, keyword.arg))
        elif isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__") and node in tree.body:
            found.append("module %s" % node.name)
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in GENERIC:
            found.append("%s[...]" % node.value.id)
        elif isinstance(node, ast.JoinedStr):
            # feature_version does not refuse f"{x=}": the parser turns it into the text 'x=' before a value
            parts = node.values
            for before, after in zip(parts, parts[1:]):
                if isinstance(after, ast.FormattedValue) and after.conversion == ord("r") and str(
                        getattr(before, "value", getattr(before, "s", ""))).endswith("="):
                    found.append("f'{x=}' or '=' before !r")
    return found


@pytest.mark.parametrize("path", sorted(files()), ids=lambda p: os.path.relpath(p, ROOT))
def test_file_is_python_36(path):
    with open(path, encoding="utf-8") as handle:
        assert complaints(handle.read()) == []


@pytest.mark.parametrize("source", [
    "from __future__ import annotations", "import dataclasses", "x: list[int] = []", "import subprocess\nsubprocess.run([], text=True)",
    "from contextlib import nullcontext", "import math\nmath.prod([1])", "def __getattr__(name): pass",
    pytest.param("if (n := 3): pass", marks=pytest.mark.skipif(sys.version_info < (3, 8), reason="no newer grammar here")),
])
def test_the_check_finds(source):
    try:
        assert complaints(source)
    except SyntaxError:
        assert sys.version_info < (3, 8)
