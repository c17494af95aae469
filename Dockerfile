# The agent in a container, as an ordinary user. CPU by default:
#   docker build -t edge-agent .
# On an NVIDIA GPU, with PyTorch from the CUDA index of its makers and a CUDA base image:
#   docker build -t edge-agent:cuda --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

RUN if ! command -v python3 >/dev/null || ! python3 -m venv --help >/dev/null 2>&1; then \
        apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*; \
    fi \
    && python3 -m venv /opt/edge-agent

ENV PATH=/opt/edge-agent/bin:$PATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HOME=/var/lib/edge-agent

# PyTorch first and alone: the largest layer, and the one that changes least.
RUN pip install --no-cache-dir torch --index-url "${TORCH_INDEX}"

COPY pyproject.toml README.md LICENSE /src/
COPY edge_agent /src/edge_agent
COPY quantization /src/quantization
COPY profiles /src/profiles
RUN pip install --no-cache-dir /src

RUN useradd --system --create-home --home-dir /var/lib/edge-agent edge-agent
USER edge-agent
WORKDIR /var/lib/edge-agent
ENTRYPOINT ["edge-agent"]
CMD ["--help"]
