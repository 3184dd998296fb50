# syntax=docker/dockerfile:1
# Two images from one file:
#   docker build --target gpu -t trtserve .         on NVIDIA's TensorRT-LLM image, for amd64 and arm64
#   docker build --target cpu -t trtserve:cpu .     the embedded engine on CPUs, to try it out
# Another TensorRT-LLM:  --build-arg TENSORRT_LLM_VERSION=1.2.0
# An experimental one:   --build-arg TENSORRT_LLM_IMAGE=registry.example/tensorrt-llm:mine
# docs/operations.md tells how to run them.
ARG TENSORRT_LLM_VERSION=1.2.1
ARG TENSORRT_LLM_IMAGE=nvcr.io/nvidia/tensorrt-llm/release:${TENSORRT_LLM_VERSION}

FROM python:3.11-slim AS cpu
RUN useradd --create-home --uid 1000 trtserve
WORKDIR /opt/trtserve
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
COPY pyproject.toml README.md LICENSE ./
COPY settings settings
COPY plugins plugins
COPY server server
# This project's own source, whose requirements have their bounds in pyproject.toml.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[embedded,ucx]' && install -d -o trtserve /home/trtserve/.cache
USER 1000
ENV TRTSERVE_HOST=0.0.0.0 \
    TRTSERVE_CACHE_DIR=/home/trtserve/.cache/trtserve \
    HF_HOME=/home/trtserve/.cache/huggingface
VOLUME /home/trtserve/.cache
EXPOSE 8000
HEALTHCHECK --start-period=300s CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/live', timeout=3)"]
ENTRYPOINT ["trtserve"]

# hadolint ignore=DL3006
FROM ${TENSORRT_LLM_IMAGE} AS gpu
# The image may have a user 1000 already.
RUN useradd --create-home --uid 10001 trtserve && install -d -o trtserve /home/trtserve/.cache
WORKDIR /opt/trtserve
COPY pyproject.toml README.md LICENSE ./
COPY settings settings
COPY plugins plugins
COPY server server
# The image has torch, transformers, UCX and NIXL; their versions stay, or pip refuses.
# hadolint ignore=DL3013
RUN python3 -c "from importlib.metadata import version as v; print('\n'.join(f'{n}=={v(n)}' for n in ('torch', 'transformers', 'numpy')))" > /tmp/constraints.txt \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt . \
    && rm /tmp/constraints.txt
USER 10001
ENV TRTSERVE_ENGINE=tensorrt_llm \
    TRTSERVE_HOST=0.0.0.0 \
    TRTSERVE_CACHE_DIR=/home/trtserve/.cache/trtserve \
    HF_HOME=/home/trtserve/.cache/huggingface
VOLUME /home/trtserve/.cache
EXPOSE 8000
HEALTHCHECK --start-period=1800s CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/live', timeout=3)"]
ENTRYPOINT ["trtserve"]
