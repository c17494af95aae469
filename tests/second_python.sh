#!/usr/bin/env bash
# The oldest supported Python: everything that imports no torch, installed without it, must import and pass its tests.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${SECOND_PYTHON:-python3.10}
venv=build/second-python
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    'msgspec>=0.20' 'tomli>=2' 'psutil>=6' 'nvidia-ml-py>=12' 'typer>=0.16' 'rich>=13.9' 'jinja2>=3.1' 'paho-mqtt>=2.2,<3' 'google-re2>=1.1' \
    'litestar>=2.15,<3' 'uvicorn>=0.34' 'httpx>=0.28' 'jsonschema>=4.23' 'pyyaml>=6' 'cryptography>=44' 'sacrebleu>=2.5' 'python-socks>=3,<4' \
    'safetensors>=0.8,<1' 'sqlalchemy>=2.0.36,<3' 'psycopg[binary]>=3.2,<4' 'prometheus-client>=0.21,<1' \
    pytest hypothesis websockets
PYTHONPATH=. "$venv/bin/python" -m pytest tests/test_verify.py tests/test_critic.py tests/test_problems.py tests/test_layers.py \
    tests/test_plan.py tests/test_messages.py tests/test_store.py tests/test_coordinator_store.py tests/test_transfer.py tests/test_config.py tests/test_sensors.py tests/test_devices.py \
    tests/test_supervised.py tests/test_answers.py tests/test_splitting.py tests/test_proxy.py tests/test_doctor.py tests/test_figures.py
