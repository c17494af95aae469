"""MLflow's own tracking server over a directory: `mlflow_server.py DIRECTORY PORT`. Says when it serves."""

from __future__ import annotations

import os
import sys


def main() -> None:
    directory, port = sys.argv[1:]
    # Its newer stores take seconds to make their tables; requests and answers are the same.
    os.environ |= {
        "_MLFLOW_SERVER_FILE_STORE": directory, "_MLFLOW_SERVER_ARTIFACT_ROOT": directory, "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }  # fmt: skip
    from mlflow.server import app
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", int(port), app, threaded=True)
    print("serves", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
