# syntax=docker/dockerfile:1
# Two images from one file:
#   docker build --target cpu -t trtserve:cpu .     the embedded engine on CPUs, to try it out
#   docker build --target gpu -t trtserve .         on NVIDIA's TensorRT-LLM image
# Run:  docker run --rm -p 8000:8000 trtserve:cpu
ARG TENSORRT_LLM_IMAGE=nvcr.io/nvidia/tensorrt-llm/release:1.2.0

FROM python:3.11-slim AS cpu
RUN useradd --create-home --uid 1000 trtserve
WORKDIR /opt/trtserve
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
COPY pyproject.toml README.md LICENSE ./
COPY settings settings
COPY plugins plugins
COPY server server
RUN pip install --no-cache-dir '.[embedded]'
USER trtserve
ENV TRTSERVE_HOST=0.0.0.0 TRTSERVE_CACHE_DIR=/home/trtserve/.cache/trtserve
VOLUME /home/trtserve/.cache
EXPOSE 8000
HEALTHCHECK --start-period=300s CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/live', timeout=3)"]
ENTRYPOINT ["trtserve"]

FROM ${TENSORRT_LLM_IMAGE} AS gpu
WORKDIR /opt/trtserve
COPY pyproject.toml README.md LICENSE ./
COPY settings settings
COPY plugins plugins
COPY server server
# The image has torch, transformers and tensorrt-llm already.
RUN pip install --no-cache-dir .
RUN useradd --create-home trtserve || true
USER trtserve
ENV TRTSERVE_HOST=0.0.0.0
EXPOSE 8000
HEALTHCHECK --start-period=1800s CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/live', timeout=3)"]
ENTRYPOINT ["trtserve"]
