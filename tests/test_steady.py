"""The runtime over many frames: it holds at the end what it held after a tenth of them."""
import os
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, "scripts", "bench"))
from steady import steady  # noqa: E402 (scripts are no package)


@pytest.mark.parametrize("frames", [1000, pytest.param(10000, marks=pytest.mark.slow)])
def test_no_memory_is_gained(frames, tmp_path):
    found = steady(frames, 0, 32, str(tmp_path))
    assert found["rss_gained_mib"] < 1 and found["blocks_gained"] < 500  # a byte string held for each frame would be `frames` blocks
    with open(str(tmp_path / "results.jsonl")) as handle:
        assert sum(1 for _line in handle) == frames
