# One image in two variants:
#   docker build -t ldm .
#   docker build -t ldm:cuda --build-arg VARIANT=cuda .
# How to run it: docker/README.md. docker/check.sh builds and tests it.

# A tag of docker.io/library/python: Python's version and Debian's release.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS base
# The environment has no pip of its own; the base image's pip installs into it.
RUN python3 -m venv --without-pip /opt/ldm
ENV PATH=/opt/ldm/bin:$PATH

# Installs the package alone; the last stage copies the resulting environment.
FROM base AS package
WORKDIR /src
COPY . .
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip --python /opt/ldm/bin/python install --no-cache-dir --no-deps .

FROM base
ARG VARIANT=cpu
# Triton compiles kernel launchers at run time: it needs a C compiler, and Python's headers of the base image.
# hadolint ignore=DL3008
RUN case "$VARIANT" in \
      cpu) ;; \
      cuda) apt-get update \
        && apt-get install -y --no-install-recommends gcc libc6-dev \
        && rm -rf /var/lib/apt/lists/* ;; \
      *) echo "VARIANT is '$VARIANT'; expected cpu or cuda" >&2; exit 2 ;; \
    esac
# TORCH_INDEX: a mirror, or an index of PyTorch (https://download.pytorch.org/whl/cu...) with torch for an older CUDA.
# The optional secret `pip` is a pip.conf; it is not stored in the image.
ARG TORCH=2.13.0
ARG TORCH_INDEX
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    case "$VARIANT" in \
      cpu) index=https://download.pytorch.org/whl/cpu ;; \
      cuda) index=https://pypi.org/simple ;; \
    esac \
    && pip --python /opt/ldm/bin/python install --no-cache-dir --no-deps \
      --index-url "${TORCH_INDEX:-$index}" "torch==$TORCH"
# Dependencies change less often than the code, so they are a layer of their own. EXTRAS: names of optional ones.
ARG EXTRAS=redis
COPY pyproject.toml docker/constraints.txt /build/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -c "import tomllib; p = tomllib.load(open('/build/pyproject.toml', 'rb'))['project']; \
      print(*p['dependencies'], *(d for e in '$EXTRAS'.split(',') for d in p['optional-dependencies'][e]), sep='\n')" \
      > /build/requirements.txt \
    && pip --python /opt/ldm/bin/python install --no-cache-dir -r /build/requirements.txt -c /build/constraints.txt \
    && rm -r /build
COPY --from=package /opt/ldm /opt/ldm
# A numeric user, so that Kubernetes can verify that it is not root; group 0, so that any other user id can write too.
RUN pip --python /opt/ldm/bin/python check \
    && useradd --uid 10001 --gid 0 --home-dir /cache --no-create-home ldm \
    && install -d -o 10001 -g 0 -m 0775 /cache \
    # Nothing installs packages in the running image. /var/lib/dpkg/status stays, for scanners.
    && find / -xdev -type d -path '*/python3*' \( -name pip -o -name 'pip-*.dist-info' -o -name ensurepip \) \
      -prune -exec rm -rf {} + \
    && rm -rf /usr/bin/apt* /usr/bin/dpkg* /usr/lib/apt /usr/lib/dpkg /usr/bin/pip* /usr/local/bin/pip*
# The service writes to /cache and /tmp only; the rest may be read-only.
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
# Loading large weights may take minutes, at start and again if the worker is replaced.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=12 CMD ["python", "-c", "\
import http.client, os, sys\n\
server = http.client.HTTPConnection('127.0.0.1', int(os.environ['LDM_PORT']), timeout=4)\n\
server.request('GET', '/health/ready')\n\
sys.exit(server.getresponse().status != 200)"]
# Exec form, so that SIGTERM reaches ldm. It finishes running jobs, for up to LDM_DRAIN_SECONDS (docker stop -t 320).
ENTRYPOINT ["ldm"]
CMD ["serve"]
