"""One thread of torch per pytest worker: two workers share a machine, and idle OpenMP threads spin.

Tests of several threads ask for them with torch.set_num_threads.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
