# The image that experiments.gke runs:
#   docker build --build-arg EXTRAS=tpu,gcs,zstd,sentencepiece --tag IMAGE .
FROM python:3.12-slim

ARG EXTRAS=tpu,gcs,zstd,sentencepiece
WORKDIR /mobilellm_jax
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# The library alone first, so that a change of a config or of a record does not install everything anew.
COPY setup.py pyproject.toml README.md ./
COPY mobilellm_jax mobilellm_jax
RUN python -m pip install -e ".[${EXTRAS}]"
COPY configs configs
COPY experiments experiments

CMD ["python", "-m", "experiments.sweep", "--list"]
