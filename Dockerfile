# One image for every service of docker-compose.yml; the command decides what a container is.
# torch brings its CUDA libraries as wheels, so the host needs the NVIDIA driver (580 or newer) and the container toolkit only.
FROM python:3.11-slim

# Triton compiles its launchers with a C compiler when a kernel is first used.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir uv

WORKDIR /app
# The dependencies alone first: they change seldom, and this layer is most of the image. Byte code is made here: the services' user may
# not write it, and without it every process, an engine that is started again too, compiles torch and transformers anew, for seconds.
COPY pyproject.toml README.md ./
COPY headrace/__init__.py headrace/__init__.py
RUN uv pip install --system --no-cache --compile-bytecode -e ".[embedded]"

COPY . .
RUN python -m compileall -q headrace engine kernels worker api migrations \
    && useradd --create-home --uid 10001 headrace && mkdir -p /data && chown headrace:headrace /data
USER headrace
ENV HEADRACE_HOME=/data HEADRACE_SPOOL_DIR=/data/spool PYTHONUNBUFFERED=1
EXPOSE 8000
CMD ["headrace", "doctor"]
