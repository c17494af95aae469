"""Runs commands in processes that are forked from this one, which has imported what takes every one of them seconds.

Each line of standard input is a JSON object of `arguments`, `environment`, `directory`, and the files `out` and `err` for what it says; its
exit status is written as a line of standard output.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import importlib.util
import json
import os
import runpy
import sys
import traceback
from typing import NoReturn

# The first one alone where there is no torch: commands that need none run there too.
IMPORTED = (
    "edge_agent.cli", "edge_agent.training.run", "quantization.dry_run", "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip


def _become(request: dict[str, object]) -> NoReturn:
    """Have this process be the command from its first line to its last."""
    for number, name, mode in ((0, os.devnull, os.O_RDONLY), (1, request["out"], os.O_WRONLY), (2, request["err"], os.O_WRONLY)):
        file = os.open(str(name), mode)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[call-overload]
    os.chdir(str(request["directory"]))
    sys.argv[1:] = request["arguments"]  # type: ignore[index]
    code: object = 0
    try:
        runpy.run_module("edge_agent", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    # To take all that was imported apart would take longer than most commands.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else code is not None)


def main() -> None:
    for name in IMPORTED if importlib.util.find_spec("torch") else IMPORTED[:1]:
        importlib.import_module(name)
    gc.freeze()  # what is never collected is never copied
    said = os.fdopen(os.dup(1), "w", buffering=1)
    while line := sys.stdin.buffer.raw.readline():  # type: ignore[attr-defined]
        child = os.fork()
        if not child:
            said.close()
            _become(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=said)


if __name__ == "__main__":
    main()
