"""The number of torch's threads on a CPU, and the way in which they wait for one another.

OpenMP reads its environment variables once, when torch loads it, so this module is imported before torch. By default
OpenMP takes one thread for each CPU and lets threads spin for milliseconds while they wait. That is right on a machine
of one's own. Where another process holds a CPU, or a container may use less time than its CPUs offer, the spinning
threads take the time that the thread they wait for needs.
"""

import os
import sys

from noisepolicy.control_groups import cpu_quota

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Some tens of microseconds, which bridges the gap between two operations and is little to lose where a thread waits for
# one that does not run. OpenMP's own default is 300000; 0 sleeps at once.
_SPIN_COUNT = "1000"


def configure_threads() -> None:
    """Set OpenMP's environment variables, except those that the user has set. Do nothing once torch is imported.

    Threads sleep after a short wait. There are no more of them than the control group's quota lets run; the CPUs that
    the process is bound to are counted by OpenMP itself.
    """
    if "torch" in sys.modules:
        return
    if not any(os.environ.get(name) for name in _WAITING):
        # libgomp, which torch's own builds bring, knows both. LLVM's and Intel's OpenMP know the first and never spin.
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": _SPIN_COUNT}
    quota = cpu_quota()
    if quota is not None and quota < len(os.sched_getaffinity(0)) and not os.environ.get("OMP_NUM_THREADS"):
        os.environ["OMP_NUM_THREADS"] = str(quota)
