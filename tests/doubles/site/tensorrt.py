"""`import tensorrt` in a child process: becomes the double that the environment names."""
import os
import sys

sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from doubles import child_gpu  # noqa: E402
from doubles.tensorrt_double import make_tensorrt  # noqa: E402

sys.modules[__name__] = make_tensorrt(*child_gpu())
