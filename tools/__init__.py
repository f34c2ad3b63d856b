import os
import sys

# As the commands have it, for all that is measured here. Read once, when torch loads OpenMP: later it would say what is
# not so.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
