"""The memory of a process, as the system counts it."""

import gc
from pathlib import Path

import pytest

COUNTS = Path("/proc/self/smaps_rollup")
counted = pytest.mark.skipif(not COUNTS.exists(), reason="the system does not tell a process its memory")


def private_bytes() -> int:
    """What only this process holds, and has written."""
    gc.collect()  # which touches, and so copies, every object there is; better at once than some time
    return sum(int(line.split()[1]) * 1024 for line in COUNTS.read_text().splitlines() if line.startswith("Private_Dirty"))
