"""`import pycuda.driver` in a child process: becomes the double that the environment names."""
import os
import sys

sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))))

from doubles import child_gpu  # noqa: E402
from doubles.pycuda_double import make_pycuda  # noqa: E402

sys.modules[__name__] = _made = make_pycuda(child_gpu()[1])
sys.modules[__name__ + ".driver"] = _made.driver  # found there by the import system: no file of that name is needed
sys.modules[__name__ + ".compiler"] = _made.compiler
