# An image of this checkout for Cloud TPUs:   docker build -f launch/docker/tpu.Dockerfile -t moe-train:tpu .
#
# Purpose:  training on TPU hosts, as launch/jobset_tpu.yaml starts it; libtpu comes as a wheel.
# Needs:    a builder with a package index, or PIP_INDEX_URL as a build argument.
# Contents: Python 3.12, the package with the extras tpu,gcs, its recipes; the user is root, who owns the devices of TPUs.
# Use:      docker run --privileged --net host -v "$PWD:/work" moe-train:tpu train run.yaml
FROM python:3.12.12-slim-bookworm AS build
ARG PIP_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY launch/wheel.py launch/wheel.py
COPY configs configs
COPY moe_train moe_train
RUN python -m venv /opt/moe-train && /opt/moe-train/bin/pip install ".[tpu,gcs]"

FROM python:3.12.12-slim-bookworm
COPY --from=build /opt/moe-train /opt/moe-train
ENV PATH=/opt/moe-train/bin:$PATH PYTHONUNBUFFERED=1
RUN mkdir /work && moe-train --version
WORKDIR /work
ENTRYPOINT ["moe-train"]
CMD ["--help"]
