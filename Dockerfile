# Images of the agent and of the coordinator. How to build and run them, and which steps have been executed how: docs/docker.md.
#   docker build --target agent-cpu --tag edge-agent:cpu .            any machine
#   docker build --target agent-cuda --tag edge-agent:cuda .          x86-64 with an NVIDIA GPU
#   docker build --target agent-jetson --tag edge-agent:jetson .      Jetson Orin with JetPack 6
#   docker build --target coordinator --tag edge-agent:coordinator .
ARG DEBIAN=debian:bookworm-20260518-slim
ARG JETPACK=nvcr.io/nvidia/l4t-jetpack:r36.4.0
ARG BITSANDBYTES=source

# What all images on Debian begin with: Python, the user, its state, and what is started.
FROM ${DEBIAN} AS base
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --system --gid 10001 edge-agent \
    && useradd --system --no-log-init --uid 10001 --gid 10001 --home-dir /var/lib/edge-agent edge-agent \
    && install --directory --mode=700 --owner=edge-agent --group=edge-agent /var/lib/edge-agent \
    && python3 -m venv /opt/edge-agent
ENV PATH=/opt/edge-agent/bin:$PATH HOME=/var/lib/edge-agent PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
VOLUME /var/lib/edge-agent
WORKDIR /var/lib/edge-agent
ENTRYPOINT ["edge-agent"]
CMD ["run"]
HEALTHCHECK --interval=60s --timeout=20s --start-period=120s CMD ["edge-agent", "health", "node"]

# What is installed: names of packages, which seldom change, and the wheel of the project, which changes with every line of it.
FROM base AS requirements
WORKDIR /requirements
COPY deploy/requirements.py deploy/constraints-debian.txt deploy/constraints-jetson.txt pyproject.toml ./
RUN python3 requirements.py judge >agent.txt \
    && python3 requirements.py coordinator postgresql s3 --without torch transformers peft bitsandbytes accelerate >coordinator.txt

FROM base AS wheel
WORKDIR /src
RUN --mount=type=bind,from=requirements,source=/requirements,target=/requirements \
    pip install --constraint /requirements/constraints-debian.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY edge_agent edge_agent
COPY quantization quantization
COPY profiles profiles
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

# Without PyTorch: a coordinator imports none.
FROM base AS coordinator
RUN --mount=type=bind,from=requirements,source=/requirements,target=/requirements \
    pip install --requirement /requirements/coordinator.txt --constraint /requirements/constraints-debian.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl
USER 10001:10001
CMD ["coordinator"]
HEALTHCHECK --interval=60s --timeout=20s --start-period=60s CMD ["edge-agent", "health", "coordinator"]

# The wheels of bitsandbytes hold no kernels for sm_87, the GPU of Orin: they are compiled. --build-arg BITSANDBYTES=wheel leaves that out;
# the agent then finds that they do not run, and computes NF4 in plain PyTorch.
FROM ${JETPACK} AS bitsandbytes-source
ARG BITSANDBYTES_TAG=0.50.2
# Of the tag, which its owners can move: given, another one ends the build; it says which it has.
ARG BITSANDBYTES_COMMIT=
ARG COMPUTE_CAPABILITY=87
# Compilers at once: each takes up to 2 GB, and a board of 8 GB builds too.
ARG BUILD_JOBS=2
ENV PATH=/usr/local/cuda/bin:$PATH CMAKE_BUILD_PARALLEL_LEVEL=${BUILD_JOBS}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential ca-certificates cmake git python3-dev python3-pip \
    && rm -rf /var/lib/apt/lists/* \
    && git clone --depth 1 --branch "${BITSANDBYTES_TAG}" https://github.com/bitsandbytes-foundation/bitsandbytes.git /src
WORKDIR /src
RUN commit="$(git rev-parse HEAD)" \
    && echo "bitsandbytes ${BITSANDBYTES_TAG} is ${commit}" \
    && { [ -z "${BITSANDBYTES_COMMIT}" ] || [ "${BITSANDBYTES_COMMIT}" = "${commit}" ]; }
# What builds the wheel is pinned by the variable: an option would not reach the environment that pip makes for it.
RUN --mount=type=bind,from=requirements,source=/requirements,target=/requirements \
    cmake -S . -B . -DCOMPUTE_BACKEND=cuda "-DCOMPUTE_CAPABILITY=${COMPUTE_CAPABILITY}" \
    && cmake --build . \
    && PIP_CONSTRAINT=/requirements/constraints-jetson.txt python3 -m pip wheel --no-deps --wheel-dir /wheels .

FROM base AS bitsandbytes-wheel
ARG BITSANDBYTES_TAG=0.50.2
RUN pip download --no-deps --dest /wheels "bitsandbytes==${BITSANDBYTES_TAG}"

# hadolint ignore=DL3006
FROM bitsandbytes-${BITSANDBYTES} AS bitsandbytes

FROM ${JETPACK} AS agent-jetson
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libopenblas0 python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --system --gid 10001 edge-agent \
    && useradd --system --no-log-init --uid 10001 --gid 10001 --groups video --home-dir /var/lib/edge-agent edge-agent \
    && install --directory --mode=700 --owner=edge-agent --group=edge-agent /var/lib/edge-agent \
    && python3 -m venv /opt/edge-agent
ENV PATH=/opt/edge-agent/bin:/usr/local/cuda/bin:$PATH HOME=/var/lib/edge-agent PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
ENV LD_LIBRARY_PATH=/opt/edge-agent/lib/python3.10/site-packages/nvidia/cu12/lib:/usr/local/cuda/lib64
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=all
ARG TORCH_INDEX=https://pypi.jetson-ai-lab.io/jp6/cu126
RUN pip install --no-deps --index-url "${TORCH_INDEX}" torch==2.8.0
RUN --mount=type=bind,from=bitsandbytes,source=/wheels,target=/wheels \
    --mount=type=bind,from=requirements,source=/requirements,target=/requirements \
    pip install --no-deps /wheels/*.whl \
    && pip install --no-deps --constraint /requirements/constraints-jetson.txt nvidia-cudss-cu12 \
    && pip install --requirement /requirements/agent.txt --constraint /requirements/constraints-jetson.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl
VOLUME /var/lib/edge-agent
WORKDIR /var/lib/edge-agent
# Without a group: then those of the user count, of which `video` has the GPU.
USER 10001
ENTRYPOINT ["edge-agent"]
CMD ["run"]
HEALTHCHECK --interval=60s --timeout=20s --start-period=120s CMD ["edge-agent", "health", "node"]

# PyTorch first and alone in each agent: the largest layer, and the one that changes least. The project last: a few megabytes.
FROM base AS agent-cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN --mount=type=bind,from=requirements,source=/requirements,target=/requirements \
    pip install --constraint /requirements/constraints-debian.txt torch==2.13.0
RUN --mount=type=bind,from=requirements,source=/requirements,target=/requirements \
    pip install --requirement /requirements/agent.txt --constraint /requirements/constraints-debian.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl
USER 10001:10001

FROM base AS agent-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-deps --index-url "${TORCH_INDEX}" torch==2.13.0+cpu
RUN --mount=type=bind,from=requirements,source=/requirements,target=/requirements \
    pip install --requirement /requirements/agent.txt --constraint /requirements/constraints-debian.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl
USER 10001:10001
