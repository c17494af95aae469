"""The agent on a machine whose count of processes that the kernel has ended for want of memory stands in a file that a test writes.

`python tests/counted_agent.py FILE --config FILE`. The real count rises only where a machine really lacks memory.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edge_agent import runner
from edge_agent.agent import main

if __name__ == "__main__":
    counted = Path(sys.argv[1])
    runner._oom_kills = lambda: int(counted.read_text())
    sys.exit(main(sys.argv[2:]))
