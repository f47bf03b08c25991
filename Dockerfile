# Image of the server. It contains no exporter, no training code and no models.
#
#   docker build -t samovar .
#   docker run --gpus all -p 8001:8001 -p 8002:8002 -v "$PWD/models:/models:ro" samovar
#
# The wheels of torch and onnxruntime-gpu contain CUDA; the host needs NVIDIA's driver
# and container toolkit. Without --gpus the server runs on the CPU.

FROM python:3.12-slim AS build
WORKDIR /build
RUN python -m venv /opt/venv
COPY pyproject.toml ./
COPY clients/python clients/python
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/venv/bin/pip install ./clients/python ".[gpu]"

FROM python:3.12-slim
# Triton compiles the kernel of random numbers with a C compiler. Without one, the host draws them.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --system --uid 10001 --no-create-home samovar
COPY --from=build /opt/venv /opt/venv
COPY LICENSE /app/
COPY server /app/server
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=/tmp/triton
WORKDIR /app
USER 10001
EXPOSE 8001 8002
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-m", "server.rpc.health", "--address", "127.0.0.1:8001"]
ENTRYPOINT ["python", "-m", "server", "--models", "/models", "--host", "0.0.0.0"]
