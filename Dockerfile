# syntax=docker/dockerfile:1
# eggroll in a container: --target cpu (the default) or --target cuda. See docs/docker.md.
#
#   docker build --target cpu -t eggroll .
#   docker run --rm -it -v "$PWD/runs:/work/runs" eggroll tune smollm2-135m --task one_sentence
#
# Layers from rarely to often changed: the system, PyTorch, the other libraries (only pyproject.toml and constraints.txt
# decide about those), then the source.

ARG PYTHON=3.12

# ---- libraries, in a virtual environment that the final images copy -------------------------------------------------
FROM python:${PYTHON}-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /src
RUN python -m venv /opt/eggroll
ENV PATH=/opt/eggroll/bin:$PATH
COPY scripts/requirements.py pyproject.toml constraints.txt ./

FROM base AS libraries-cpu
ARG EXTRAS=llm
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --extra-index-url "$TORCH_INDEX" "torch==2.13.0+cpu"
RUN python requirements.py "$EXTRAS" > requirements.txt && pip install -c constraints.txt -r requirements.txt
COPY README.md LICENSE ./
COPY src src
COPY recipes recipes
RUN pip install --no-deps .

FROM base AS libraries-cuda
ARG EXTRAS=llm
RUN pip install "torch==2.13.0"
RUN python requirements.py "$EXTRAS" > requirements.txt && pip install -c constraints.txt -r requirements.txt
COPY README.md LICENSE ./
COPY src src
COPY recipes recipes
RUN pip install --no-deps .

# ---- what both images share: a user without rights, and a C compiler for the compiled noise and products ------------
FROM python:${PYTHON}-slim-bookworm AS runtime
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 eggroll \
    && mkdir -p /work/runs /home/eggroll/.cache \
    && chown -R eggroll:eggroll /work /home/eggroll/.cache
ENV PATH=/opt/eggroll/bin:$PATH PYTHONUNBUFFERED=1
COPY --chown=eggroll:eggroll examples /work/examples
WORKDIR /work
USER 1000
ENTRYPOINT ["eggroll"]
CMD ["--help"]

FROM runtime AS cuda
COPY --from=libraries-cuda /opt/eggroll /opt/eggroll

FROM runtime AS cpu
COPY --from=libraries-cpu /opt/eggroll /opt/eggroll
