# An image of this checkout for NVIDIA GPUs:   docker build -f launch/docker/cuda.Dockerfile -t moe-train:cuda .
#
# Purpose:  training on GPUs, as launch/jobset_gpu.yaml starts it; the wheels of JAX bring CUDA, so the host needs its driver alone.
# Needs:    a builder with a package index, or PIP_INDEX_URL as a build argument.
# Contents: Python 3.12, the package with the extras cuda,s3,gcs, its recipes, and a user without rights (10001).
# Use:      docker run --gpus all --shm-size 16g -v "$PWD:/work" moe-train:cuda train run.yaml
FROM python:3.12.12-slim-bookworm AS build
ARG PIP_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY launch/wheel.py launch/wheel.py
COPY configs configs
COPY moe_train moe_train
RUN python -m venv /opt/moe-train && /opt/moe-train/bin/pip install ".[cuda,s3,gcs]"

FROM python:3.12.12-slim-bookworm
COPY --from=build /opt/moe-train /opt/moe-train
ENV PATH=/opt/moe-train/bin:$PATH PYTHONUNBUFFERED=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --uid 10001 --create-home moe && mkdir /work && chown moe /work && moe-train --version
USER moe
WORKDIR /work
ENTRYPOINT ["moe-train"]
CMD ["--help"]
