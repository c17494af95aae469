"""The command `edge-agent`. The daemon comes up without the command line's libraries, which would cost memory for as long as it runs.

So does who looks every minute whether it lives: there they would cost time.
"""

from __future__ import annotations

import gc
import os
import sys

# bitsandbytes asks for compiled functions while it is imported, and with them for PyTorch's compiler: seconds and 40 MB of every trainer,
# for functions that need none of it.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

# CUDA would begin with the fastest GPU, NVML and nvidia-smi with the first on the bus.
os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"


def main() -> None:
    """Entry point of the console script."""
    wants_help = {"--help", "-h"} & set(sys.argv)
    if sys.argv[1:2] == ["run"] and not wants_help:
        from edge_agent.agent import main as run

        sys.exit(run(sys.argv[2:]))
    if sys.argv[1:3] == ["health", "node"] and not wants_help:
        from edge_agent.alive import main as look

        sys.exit(look(sys.argv[3:]))
    from edge_agent.cli import app

    try:
        app()
    finally:
        gc.freeze()  # or the interpreter looks through all that was imported once more before it ends


if __name__ == "__main__":
    main()
