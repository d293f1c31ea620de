"""The runtime over many frames: it holds at the end what it held after a tenth of them."""
import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT

MANY_FRAMES = """
import json, sys
from steady import steady
print(json.dumps(steady(int(sys.argv[1]), 0, 32, sys.argv[2])))
"""


@pytest.mark.parametrize("frames", [1000, pytest.param(10000, marks=pytest.mark.slow)])
def test_no_memory_is_gained(frames, tmp_path):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([ROOT, os.path.join(ROOT, "scripts", "bench")]))
    # a process of its own: pages that other tests left in the allocator come and go
    found = json.loads(subprocess.check_output([sys.executable, "-c", MANY_FRAMES, str(frames), str(tmp_path)], env=env).decode())
    assert found["rss_gained_mib"] < 1 and found["blocks_gained"] < 500  # a byte string held for each frame would be `frames` blocks
    with open(str(tmp_path / "results.jsonl")) as handle:
        assert sum(1 for _line in handle) == frames
