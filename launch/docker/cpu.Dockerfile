# An image of this checkout for CPUs:   docker build -f launch/docker/cpu.Dockerfile -t moe-train:cpu .
#
# Purpose:  small runs, data preparation, export and verification on machines without accelerators.
# Needs:    a builder with a package index, or PIP_INDEX_URL as a build argument.
# Contents: Python 3.12, the package with the extras s3,gcs, its recipes, and a user without rights (10001).
# Use:      docker run -v "$PWD:/work" moe-train:cpu train run.yaml
FROM python:3.12.12-slim-bookworm AS build
ARG PIP_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY launch/wheel.py launch/wheel.py
COPY configs configs
COPY moe_train moe_train
RUN python -m venv /opt/moe-train && /opt/moe-train/bin/pip install ".[s3,gcs]"

FROM python:3.12.12-slim-bookworm
COPY --from=build /opt/moe-train /opt/moe-train
ENV PATH=/opt/moe-train/bin:$PATH PYTHONUNBUFFERED=1 JAX_PLATFORMS=cpu
RUN useradd --uid 10001 --create-home moe && mkdir /work && chown moe /work && moe-train --version
USER moe
WORKDIR /work
ENTRYPOINT ["moe-train"]
CMD ["--help"]
