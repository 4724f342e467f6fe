# syntax=docker/dockerfile:1
# A CPU image: docker build -t embstore . && docker run -p 8000:8000 -v "$PWD/demo/store:/store:ro" embstore
# For CUDA: --build-arg PIP_ARGS="" --build-arg EXTRAS="[gpu]"

FROM python:3.11-slim-bookworm AS build
ARG PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
ARG EXTRAS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/embstore
COPY constraints.txt ./
RUN /opt/embstore/bin/pip install ${PIP_ARGS} --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY embstore ./embstore
COPY server ./server
COPY loadtest ./loadtest
RUN /opt/embstore/bin/pip install ${PIP_ARGS} --constraint constraints.txt ".${EXTRAS}"
# Kernels are compiled for the processor that builds; another one compiles its own at start. What a table
# needs beside these is compiled when it is first loaded, before the server is ready, and kept.
RUN cd / && NUMBA_CACHE_DIR=/opt/embstore/kernels /opt/embstore/bin/python -m embstore.kernels.warm

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin embstore
COPY --from=build --chown=10001:10001 /opt/embstore /opt/embstore
ENV PATH=/opt/embstore/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NUMBA_CACHE_DIR=/opt/embstore/kernels \
    EMBSTORE_STORE=/store \
    EMBSTORE_HOST=0.0.0.0
USER 10001
VOLUME /store
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=2s --start-period=30s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=1)"]
ENTRYPOINT ["embstore"]
CMD ["serve"]
