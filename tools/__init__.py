"""Programs around pss that it does not need itself: the demo, studies, runs that are killed, all that a GPU is asked.
Nothing imports them.
"""

import os
import sys

# As the commands have it, for all that is measured here. Read once, when torch loads OpenMP: later it would say what is
# not so.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
