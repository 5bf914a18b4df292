# One image in two variants:
#   docker build -t ldm .
#   docker build -t ldm:cuda --build-arg VARIANT=cuda .
# docker/check.sh builds it and tries what it promises; README.md says how to run it.

# Debian's release and Python's version, as in the tags of docker.io/library/python.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS base
# Without pip: nothing in it can install more. The base image's pip fills it.
RUN python3 -m venv --without-pip /opt/ldm
ENV PATH=/opt/ldm/bin:$PATH

# The package alone, of which the last stage takes what came into the environment.
FROM base AS package
WORKDIR /src
COPY . .
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip --python /opt/ldm/bin/python install --no-cache-dir --no-deps .

FROM base
ARG VARIANT=cpu
# Triton compiles the launcher of each kernel when it runs, against the Python headers that the base image has.
# hadolint ignore=DL3008
RUN case "$VARIANT" in \
      cpu) ;; \
      cuda) apt-get update \
        && apt-get install -y --no-install-recommends gcc libc6-dev \
        && rm -rf /var/lib/apt/lists/* ;; \
      *) echo "VARIANT is '$VARIANT'; expected cpu or cuda" >&2; exit 2 ;; \
    esac
# TORCH_INDEX: a mirror, or an index of PyTorch (https://download.pytorch.org/whl/cu...) with torch for another CUDA,
# for older drivers. The secret `pip` is a pip.conf for whoever needs one; it is in no layer.
ARG TORCH=2.13.0
ARG TORCH_INDEX
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    case "$VARIANT" in \
      cpu) index=https://download.pytorch.org/whl/cpu ;; \
      cuda) index=https://pypi.org/simple ;; \
    esac \
    && pip --python /opt/ldm/bin/python install --no-cache-dir --no-deps \
      --index-url "${TORCH_INDEX:-$index}" "torch==$TORCH"
# Dependencies, torch's too, change less often than the code: a layer of their own.
COPY pyproject.toml docker/constraints.txt /build/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -c "import tomllib; print(*tomllib.load(open('/build/pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > /build/requirements.txt \
    && pip --python /opt/ldm/bin/python install --no-cache-dir -r /build/requirements.txt -c /build/constraints.txt \
    && rm -r /build
COPY --from=package /opt/ldm /opt/ldm
# A user by number, so that a cluster can see that it is not root; group 0, so that any other number can write too.
RUN pip --python /opt/ldm/bin/python check \
    && useradd --uid 10001 --gid 0 --home-dir /cache --no-create-home ldm \
    && install -d -o 10001 -g 0 -m 0775 /cache
# The only place that is written to, beside /tmp: the rest may be read-only.
ENV HOME=/cache \
    XDG_CACHE_HOME=/cache \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    PYTHONUNBUFFERED=1 \
    LDM_HOST=0.0.0.0 \
    LDM_PORT=8000
WORKDIR /cache
USER 10001:0
EXPOSE 8000
# A first loading of large weights may take minutes; a worker that is replaced loads again, and its jobs wait.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=12 CMD ["python", "-c", "\
import http.client, os, sys\n\
server = http.client.HTTPConnection('127.0.0.1', int(os.environ['LDM_PORT']), timeout=4)\n\
server.request('GET', '/health/ready')\n\
sys.exit(server.getresponse().status != 200)"]
# Exec form: SIGTERM reaches ldm itself. It finishes what runs: give it LDM_DRAIN_SECONDS (docker stop -t 320).
ENTRYPOINT ["ldm"]
CMD ["serve"]
