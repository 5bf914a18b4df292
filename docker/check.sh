#!/usr/bin/env bash
# Builds the image without a Docker engine and tests it. Needs root and a Debian with buildah:
#
#   docker/check.sh [cpu|cuda]
#
# The base image is pulled if a registry can be reached; otherwise Debian's own Python replaces it (debootstrap).
# BUILD_ARGS: more arguments of the build, such as --build-arg TORCH_INDEX=... or --secret id=pip,src=pip.conf.
# OUT: a folder for the generated images. hadolint, shellcheck, docker-compose, promtool and prometheus are used if
# they are installed.
#
# The image runs almost as in a container: a read-only root, its own process and mount namespaces, ldm as process 1,
# the image's user, command and environment. Only the network is that of the host.
set -euo pipefail
cd "$(dirname "$0")/.."

variant=${1:-cpu}
image=localhost/ldm-check:$variant
port=${PORT:-18000}
url=http://127.0.0.1:$port
work=$(mktemp -d)
out=${OUT:-$work/out}
mkdir -p "$out"
container=
trap 'stop || true; [ -z "$container" ] || buildah rm "$container" >/dev/null; rm -rf "$work"' EXIT

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null; }

# Makes the Dockerfile's base image available.
base() {
  local python name
  python=$(sed -n 's/^ARG PYTHON=//p' Dockerfile)
  name=docker.io/library/python:$python
  if buildah inspect --type image "$name" >/dev/null 2>&1; then
    echo "$name is here"
  elif ! buildah pull -q "$name" 2>/dev/null; then
    echo "$name cannot be pulled: using Debian's Python instead"
    debian_base "${python##*-}" "$name"
  fi
}

# A base image with Debian's Python. Like the official one it has Python's headers and no compiler.
debian_base() {
  local root=$work/base made
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip,libpython3-dev "$1" "$root" >"$work/log"
  ln -s /usr/bin/python3 "$root/usr/local/bin/python3"
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
  made=$(buildah from scratch)
  buildah add -q "$made" "$root" / >/dev/null
  buildah config --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin "$made"
  buildah commit -q --format docker "$made" "$2" >/dev/null
  buildah rm "$made" >/dev/null
  rm -rf "$root"
}

build() {
  # shellcheck disable=SC2086 # BUILD_ARGS are several words
  buildah bud --isolation chroot --pull-never --format docker --layers -t "$image" \
    --build-arg VARIANT="$variant" ${BUILD_ARGS:-} . >"$work/build" 2>&1 || { tail -40 "$work/build"; fail build; }
}

# Prints a value of the image's configuration; each item ends with NUL, since items may contain newlines.
config() {
  buildah inspect --type image "$image" | python3 -c '
import json, sys
value = json.load(sys.stdin)["Docker"]["config"]
for key in sys.argv[1].split("."):
    value = value[key]
for item in value if isinstance(value, list) else [value]:
    print(item, end="\0")' "$1"
}

# enter COMMAND...: runs the command in the image, as its user (or AS), with its environment and that in `given`.
enter() {
  local environment
  mapfile -d '' environment < <(config Env)
  # shellcheck disable=SC2016 # the inner shell expands them
  exec unshare --mount --pid --ipc --uts --fork --kill-child --propagation private bash -euc '
    root=$1 as=$2 weights=$3; shift 3
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o mode=1777,noexec,nosuid,nodev tmpfs "$root/tmp"
    mount -t tmpfs -o "uid=10001,gid=0,mode=0775" tmpfs "$root/cache"
    [ -z "$weights" ] || mount --bind -o ro "$weights" "$root/weights"
    mount -o remount,bind,ro "$root"
    exec chroot "$root" setpriv --reuid "${as%:*}" --regid "${as#*:}" --clear-groups --no-new-privs \
      --inh-caps=-all --bounding-set=-all "$@"' \
    bash "$root" "${AS:-$(config User | tr -d '\0')}" "${WEIGHTS:-}" \
    env -i -C "$(config WorkingDir | tr -d '\0')" "${environment[@]}" LDM_PORT="$port" "${given[@]}" "$@"
}

# serve [NAME=VALUE...]: starts the image's command as `docker run -e ...` does; returns when it is healthy.
serve() {
  local command started=$SECONDS
  given=("$@")
  mapfile -d '' command < <(config Entrypoint; config Cmd)
  mapfile -d '' health < <(config Healthcheck.Test)
  enter "${command[@]}" >"$work/serve" 2>&1 &
  server=$!
  until healthy; do
    kill -0 "$server" 2>/dev/null || { cat "$work/serve"; fail "it exited before it was ready"; }
    [ $((SECONDS - started)) -lt 300 ] || fail "not healthy after 300 s"
    sleep 1
  done
  first=$(pgrep -P "$server") # process 1 of its namespace
  echo "healthy after $((SECONDS - started)) s"
}

# Runs the image's HEALTHCHECK inside the container, as Docker does.
healthy() {
  [ "${health[0]}" = CMD ] || fail "the health check is not a CMD"
  local pid
  pid=$(pgrep -P "$server") || return 1
  nsenter --target "$pid" --mount --root --pid env -i LDM_PORT="$port" "PATH=$path" "${health[@]:1}" 2>/dev/null
}

# Sends SIGTERM to process 1, as Docker does.
stop() {
  [ -n "${server:-}" ] || return 0
  kill -TERM "$first" 2>/dev/null || true
  local code=0
  wait "$server" || code=$?
  server=
  return "$code"
}

request() { curl -sS -m 300 -H 'content-type: application/json' "$@"; }

image_of() {
  request "$url/generate" -H 'accept: image/png' -o "$out/$1.png" --fail-with-body \
    -d "{\"prompt\": \"$2\", \"seed\": 1, \"model\": \"$3\"}" || fail "no image: $(cat "$out/$1.png")"
  file "$out/$1.png" | grep 'PNG image data, 128 x 128' || fail "not an image of 128x128"
}

# Static checks.
lint() {
  say "static checks"
  if have hadolint; then hadolint Dockerfile && echo "hadolint: passed"; fi
  if have shellcheck; then shellcheck docker/check.sh && echo "shellcheck: passed"; fi
  if have docker-compose; then
    docker-compose -f docker/compose.yaml config -q
    docker-compose -f docker/compose.yaml -f docker/compose.cpu.yaml config -q
    echo "docker-compose: both files are valid"
  fi
  if have promtool; then promtool check config docker/prometheus.yml; fi
}

contents() {
  say "contents of the image"
  local found command
  found=$(cd "$root" && find . -xdev \( -name .git -o -name conftest.py -path '*tests*' -o -name check.sh \
    -o -path './opt/ldm/*' -name pip \) -print -quit)
  [ -z "$found" ] || fail "$found is in the image"
  found=$(cd "$root" && find . -xdev -mindepth 2 -regex '\./\(root/.cache\|cache\|tmp\|src\|build\)/.*' -print -quit)
  [ -z "$found" ] || fail "$found was left over by the build"
  found=$(find "$root/opt/ldm" "$root/cache" ! -user 0 ! -path "$root/cache" -print -quit)
  [ -z "$found" ] || fail "$found is writable by the service"
  for command in apt apt-get dpkg pip pip3; do
    [ -z "$(find "$root/usr" "$root/opt" -path '*bin/*' -name "$command" -print -quit)" ] || fail "$command is in the image"
  done
  if [ "$variant" = cpu ]; then
    for command in gcc cc make; do
      [ ! -e "$root/usr/bin/$command" ] || fail "a compiler in the CPU image"
    done
  fi
  echo "no tests, .git, caches, secrets or pip; user $(config User | tr '\0' ' ')"
  echo "$(buildah images --format '{{.Size}}' "$image"), torch $(given=(); (enter python -c 'import torch; print(torch.__version__)'))"
  comm -23 <(frozen | sort) <(sort docker/constraints.txt) >"$work/unpinned"
  if [ -s "$work/unpinned" ]; then echo "not in docker/constraints.txt: $(tr '\n' ' ' <"$work/unpinned")"; fi
}

frozen() {
  chroot "$root" /opt/ldm/bin/python -c \
    "from importlib.metadata import distributions as d; print(*(f'{p.name}=={p.version}' for p in d()), sep='\n')" |
    grep -viE '^(torch|triton|nvidia|cuda|latent)' || true
}

# Checks that Triton's launchers can be compiled; there is no GPU driver here to run them with.
compiles() {
  say "compiling as Triton does at run time"
  given=()
  (enter python -c '
from pathlib import Path
from triton.runtime.build import compile_module_from_src
source = """#include <Python.h>
static struct PyModuleDef probe = {PyModuleDef_HEAD_INIT, "probe", 0, -1, 0};
PyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(&probe); }"""
print(compile_module_from_src(source, "probe").__file__)') || fail "compilation failed"
}

one_shot() {
  say "docker run IMAGE models"
  given=()
  local entry
  mapfile -d '' entry < <(config Entrypoint)
  (enter "${entry[@]}" models)
}

bundled() {
  say "docker run --read-only --tmpfs /tmp --cap-drop ALL -p $port:8000 IMAGE"
  serve
  grep -E '^(Uid|Gid|CapEff|NoNewPrivs)' "/proc/$first/status" | tr -s '\t\n' ' ' && echo
  [ "$(stat -c %u "/proc/$first")" != 0 ] || fail "it runs as root"
  [ "$(awk '/^NSpid/ {print $NF}' "/proc/$first/status")" = 1 ] || fail "it is not process 1"
  image_of apple "red apple on a blue background" emoji
  request "$url/upscale" -H 'accept: image/png' -o "$out/large.png" --fail-with-body \
    -d "{\"image\": \"$(base64 -w0 "$out/apple.png")\", \"seed\": 1}"
  file "$out/large.png" | grep '512 x 512' || fail "not an image of 512x512"
}

queries() {
  # shellcheck disable=SC2016 # a variable of Grafana, not of the shell
  python3 -c '
import json
for panel in json.load(open("docker/grafana/dashboards/ldm.json"))["panels"]:
    for target in panel["targets"]:
        print(target["expr"].replace("$__rate_interval", "30s"), end="\0")'
}

# Runs every query of the dashboard on a Prometheus that scrapes the service.
dashboard() {
  have prometheus && have promtool || return 0
  say "queries of the dashboard on Prometheus"
  local expression seed count=0
  sed "s/ldm:8000/127.0.0.1:$port/; s/scrape_interval: .*/scrape_interval: 1s/" docker/prometheus.yml >"$work/p.yml"
  prometheus --config.file="$work/p.yml" --storage.tsdb.path="$work/tsdb" \
    --web.listen-address="127.0.0.1:$((port + 1))" >"$work/prometheus" 2>&1 &
  watcher=$!
  sleep 4
  for seed in 1 2 3; do request "$url/generate" -o /dev/null -d "{\"prompt\": \"ghost\", \"seed\": $seed}"; done
  request "$url/generate" -o /dev/null -d '{"steps": 0}'                                # rejected
  request "$url/generate" -o /dev/null -m 1 -d '{"prompt": "ghost", "steps": 200}' || true # the client disconnects
  sleep 4
  while IFS= read -r -d '' expression; do
    count=$((count + 1))
    promtool query instant "http://127.0.0.1:$((port + 1))" "$expression" >"$work/answer" || fail "$expression"
    grep -q '=>' "$work/answer" || fail "no data: $expression"
  done < <(queries)
  kill "$watcher"
  wait "$watcher" || true
  echo "$count queries, all returned data"
}

drains() {
  say "SIGTERM during a request (docker stop)"
  local code=0 during
  request "$url/generate" -o "$work/long" -w '%{http_code}' -d '{"prompt": "ghost", "steps": 200}' >"$work/code" &
  local client=$!
  sleep 1
  kill -TERM "$first"
  sleep 0.5
  during=$(request "$url/generate" -o /dev/null -w '%{http_code}' -d '{"prompt": "ghost"}')
  wait "$client"
  wait "$server" || code=$?
  server=
  echo "running request: $(cat "$work/code"); later request: $during; exit code $code"
  [ "$(cat "$work/code") $during $code" = "200 503 0" ] || fail "expected 200, 503 and 0"
}

another() {
  say "docker run --user 12345:0 -v weights:/weights -e LDM_MODEL=/weights/mine IMAGE"
  cp -r weights/emoji "$work/mine" && mkdir "$work/weights" && mv "$work/mine" "$work/weights/mine"
  chmod 755 "$work" && chmod -R a+rX "$work/weights"
  mkdir "$root/weights" # as Docker creates it
  AS=12345:0 WEIGHTS=$work/weights serve LDM_MODEL=/weights/mine
  image_of mine "rocket on a black background" mine
  stop || fail "exit code $?"
  echo "exit code 0"
}

lint
say "$variant: base and build"
base
build
grep -E '^(Successfully tagged|\[.*COMMIT)' "$work/build" | cut -c1-100
container=$(buildah from --pull-never "$image")
root=$(buildah mount "$container")
path=$(config Env | tr '\0' '\n' | sed -n 's/^PATH=//p')
contents
if [ "$variant" = cuda ]; then compiles; fi
one_shot
bundled
dashboard
drains
another
say "$variant: all checks passed"
