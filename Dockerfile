# The two images of team mode: `worker` with torch, `api` without. Nothing in them is secret.
#
#   docker build --target api -t stillroom-api .
#   docker build --target worker -t stillroom-worker .
#
# TORCH_INDEX names a package index to take torch from, such as PyTorch's own for the CPU alone.
# Empty: the usual index, whose Linux build brings CUDA and runs without a GPU too.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PATH=/opt/venv/bin:$PATH

FROM base AS wheel
WORKDIR /build
COPY constraints.txt ./
RUN pip install -c constraints.txt setuptools
COPY pyproject.toml README.md ./
COPY api api
COPY client client
COPY core core
COPY migrations migrations
COPY workers workers
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /dist .

# pip stays outside: what runs as a service has nothing to install with.
FROM base AS api-venv
RUN python -m venv --without-pip /opt/venv
COPY constraints.txt /dist/
COPY --from=wheel /dist/*.whl /dist/
RUN pip --python /opt/venv/bin/python install -c /dist/constraints.txt \
    "$(echo /dist/stillroom-*.whl)[server,team,tracing]"

FROM base AS worker-venv
RUN python -m venv --without-pip /opt/venv
COPY constraints.txt /dist/
ARG TORCH_INDEX=""
# First and alone, with the CUDA libraries it asks for: a layer of gigabytes that a change of the
# source leaves as it is. An index of torch alone may lack the rest, which the next step brings.
RUN pip --python /opt/venv/bin/python install -c /dist/constraints.txt \
    ${TORCH_INDEX:+--no-deps --index-url="$TORCH_INDEX"} torch
COPY --from=wheel /dist/*.whl /dist/
RUN pip --python /opt/venv/bin/python install -c /dist/constraints.txt \
    "$(echo /dist/stillroom-*.whl)[llm,team,tracing]"

FROM ${PYTHON_IMAGE} AS runtime
# A fixed number, so that a folder of the host can be given to it.
RUN groupadd --gid 10001 still \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin still \
    && install -d -o 10001 -g 10001 -m 0750 /var/lib/stillroom
# PYTHONSAFEPATH: nothing in the data folder is ever imported.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp \
    OMP_WAIT_POLICY=PASSIVE \
    STILL_DATA_DIR=/var/lib/stillroom
WORKDIR /var/lib/stillroom
USER 10001:10001

FROM runtime AS worker
# Language models are read from STILL_MODEL_ROOTS alone; nothing is ever asked for elsewhere.
ENV HF_HUB_OFFLINE=1
COPY --from=worker-venv /opt/venv /opt/venv
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=4 \
    CMD ["python", "-m", "workers", "--check", "--device", "cpu"]
CMD ["python", "-m", "workers", "--device", "cpu"]

FROM runtime AS api
COPY --from=api-venv /opt/venv /opt/venv
ENV STILL_HOST=0.0.0.0 \
    STILL_PORT=8321
EXPOSE 8321
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as web; web.urlopen('http://127.0.0.1:' + os.environ['STILL_PORT'] + '/readyz', timeout=5)"]
CMD ["python", "-m", "api"]
