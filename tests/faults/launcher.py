"""`python -m megatron.launch.start`, whose ranks FAULTS_PYTHON starts in place of this Python."""

import os
import runpy
import sys

if __name__ == "__main__":
    sys.executable = os.environ["FAULTS_PYTHON"]
    runpy.run_module("megatron.launch.start", run_name="__main__", alter_sys=True)
