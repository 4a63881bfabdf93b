"""What happens to the data: load, attack, relabel, shard, train, evaluate.

Plain functions over arrays, bytes and paths, each told by a frozen recipe what to do. Nothing in here
knows of Ray, of the store or of the command line: a stage can be called from a notebook.
"""

import os

# Threads that wait for each other spin. By default they do so for milliseconds, and wherever something else computes on
# the same cores they take the processor from the thread that they wait for (docs/performance.md). GNU's OpenMP reads
# this when torch is loaded; a user's own choice of either variable stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
