#!/usr/bin/env bash
# Builds the image without a Docker engine and tries what it promises. As root, on a Debian with buildah:
#
#   docker/check.sh [cpu|cuda]
#
# The base image is pulled where a registry can be reached; else Debian's own Python stands in for it (debootstrap).
# BUILD_ARGS has what the build needs here, such as --build-arg TORCH_INDEX=... or --secret id=pip,src=pip.conf.
# OUT is a folder that keeps the pictures. hadolint, shellcheck, docker-compose, promtool and prometheus are used
# where they are installed.
#
# What runs is as near to a container as can be had: a root that cannot be written, process and mount namespaces of
# its own, ldm as process 1, the image's user, command and environment. Only the network is this machine's.
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

# The image the Dockerfile starts from.
base() {
  local python name
  python=$(sed -n 's/^ARG PYTHON=//p' Dockerfile)
  name=docker.io/library/python:$python
  if buildah inspect --type image "$name" >/dev/null 2>&1; then
    echo "$name is here"
  elif ! buildah pull -q "$name" 2>/dev/null; then
    echo "$name cannot be pulled: Debian's Python stands in"
    stand_in "${python##*-}" "$name"
  fi
}

# Debian's Python where the official image has its own; headers like there, no compiler like there.
stand_in() {
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

# A value of the image's configuration, one item a line; items may hold newlines and end with NUL.
config() {
  buildah inspect --type image "$image" | python3 -c '
import json, sys
value = json.load(sys.stdin)["Docker"]["config"]
for key in sys.argv[1].split("."):
    value = value[key]
for item in value if isinstance(value, list) else [value]:
    print(item, end="\0")' "$1"
}

# enter COMMAND...: becomes the command in the image, as its user, or AS, with its environment and that in `given`.
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

# serve [NAME=VALUE...]: the image's own command, as `docker run -e ...` starts it; returns when it is healthy.
serve() {
  local command started=$SECONDS
  given=("$@")
  mapfile -d '' command < <(config Entrypoint; config Cmd)
  mapfile -d '' health < <(config Healthcheck.Test)
  enter "${command[@]}" >"$work/serve" 2>&1 &
  server=$!
  until healthy; do
    kill -0 "$server" 2>/dev/null || { cat "$work/serve"; fail "it ended before it was ready"; }
    [ $((SECONDS - started)) -lt 300 ] || fail "not healthy after 300 s"
    sleep 1
  done
  first=$(pgrep -P "$server") # process 1 of its namespace
  echo "healthy after $((SECONDS - started)) s"
}

# What HEALTHCHECK says, run where Docker runs it: in the container.
healthy() {
  [ "${health[0]}" = CMD ] || fail "the health check is no CMD"
  local pid
  pid=$(pgrep -P "$server") || return 1
  nsenter --target "$pid" --mount --root --pid env -i LDM_PORT="$port" "PATH=$path" "${health[@]:1}" 2>/dev/null
}

# SIGTERM as the engine sends it: to process 1.
stop() {
  [ -n "${server:-}" ] || return 0
  kill -TERM "$first" 2>/dev/null || true
  local code=0
  wait "$server" || code=$?
  server=
  return "$code"
}

ask() { curl -sS -m 300 -H 'content-type: application/json' "$@"; }

picture() {
  ask "$url/generate" -H 'accept: image/png' -o "$out/$1.png" --fail-with-body \
    -d "{\"prompt\": \"$2\", \"seed\": 1, \"model\": \"$3\"}" || fail "no picture: $(cat "$out/$1.png")"
  file "$out/$1.png" | grep 'PNG image data, 128 x 128' || fail "no picture of 128x128"
}

# What can be seen without running anything.
lint() {
  say "what can be seen without building"
  if have hadolint; then hadolint Dockerfile && echo "hadolint: nothing"; fi
  if have shellcheck; then shellcheck docker/check.sh && echo "shellcheck: nothing"; fi
  if have docker-compose; then
    docker-compose -f docker/compose.yaml config -q
    docker-compose -f docker/compose.yaml -f docker/compose.cpu.yaml config -q
    echo "docker-compose: both files are read"
  fi
  if have promtool; then promtool check config docker/prometheus.yml; fi
}

contents() {
  say "what is in it"
  local found command
  found=$(cd "$root" && find . -xdev \( -name .git -o -name conftest.py -path '*tests*' -o -name check.sh \
    -o -path './opt/ldm/*' -name pip \) -print -quit)
  [ -z "$found" ] || fail "$found is in the image"
  found=$(cd "$root" && find . -xdev -mindepth 2 -regex '\./\(root/.cache\|cache\|tmp\|src\|build\)/.*' -print -quit)
  [ -z "$found" ] || fail "$found is left over"
  found=$(find "$root/opt/ldm" "$root/cache" ! -user 0 ! -path "$root/cache" -print -quit)
  [ -z "$found" ] || fail "$found can be changed by the service"
  if [ "$variant" = cpu ]; then
    for command in gcc cc make; do
      [ ! -e "$root/usr/bin/$command" ] || fail "a compiler in the CPU image"
    done
  fi
  echo "neither tests nor .git, caches, secrets' places or a pip of its own; user $(config User | tr '\0' ' ')"
  echo "$(buildah images --format '{{.Size}}' "$image"), torch $(given=(); (enter python -c 'import torch; print(torch.__version__)'))"
  comm -23 <(frozen | sort) <(sort docker/constraints.txt) >"$work/unpinned"
  if [ -s "$work/unpinned" ]; then echo "not in docker/constraints.txt: $(tr '\n' ' ' <"$work/unpinned")"; fi
}

frozen() {
  chroot "$root" pip --python /opt/ldm/bin/python freeze 2>/dev/null |
    grep -viE '^(torch|triton|nvidia|cuda|latent)' || true
}

# A compiler and headers that make what Triton makes at run time; the driver's library is the host's.
compiles() {
  say "what Triton compiles when it runs"
  given=()
  (enter python -c '
from pathlib import Path
from triton.runtime.build import compile_module_from_src
source = """#include <Python.h>
static struct PyModuleDef made = {PyModuleDef_HEAD_INIT, "made", 0, -1, 0};
PyMODINIT_FUNC PyInit_made(void) { return PyModule_Create(&made); }"""
print(compile_module_from_src(source, "made").__file__)') || fail "nothing was compiled"
}

one_shot() {
  say "docker run IMAGE models"
  given=()
  local entry
  mapfile -d '' entry < <(config Entrypoint)
  (enter "${entry[@]}" models)
}

box() {
  say "docker run --read-only --tmpfs /tmp --cap-drop ALL -p $port:8000 IMAGE"
  serve
  grep -E '^(Uid|Gid|CapEff|NoNewPrivs)' "/proc/$first/status" | tr -s '\t\n' ' ' && echo
  [ "$(stat -c %u "/proc/$first")" != 0 ] || fail "it runs as root"
  [ "$(awk '/^NSpid/ {print $NF}' "/proc/$first/status")" = 1 ] || fail "it is not process 1"
  picture apple "red apple on a blue background" emoji
  ask "$url/upscale" -H 'accept: image/png' -o "$out/large.png" --fail-with-body \
    -d "{\"image\": \"$(base64 -w0 "$out/apple.png")\", \"seed\": 1}"
  file "$out/large.png" | grep '512 x 512' || fail "no picture of 512x512"
}

questions() {
  # shellcheck disable=SC2016 # Grafana's word, not the shell's
  python3 -c '
import json
for panel in json.load(open("docker/grafana/dashboards/ldm.json"))["panels"]:
    for target in panel["targets"]:
        print(target["expr"].replace("$__rate_interval", "30s"), end="\0")'
}

# Each question of the dashboard, asked of a Prometheus that watches the service.
dashboard() {
  have prometheus && have promtool || return 0
  say "the dashboard's questions, asked of Prometheus"
  local expression seed asked=0
  sed "s/ldm:8000/127.0.0.1:$port/; s/scrape_interval: .*/scrape_interval: 1s/" docker/prometheus.yml >"$work/p.yml"
  prometheus --config.file="$work/p.yml" --storage.tsdb.path="$work/tsdb" \
    --web.listen-address="127.0.0.1:$((port + 1))" >"$work/prometheus" 2>&1 &
  watcher=$!
  sleep 4
  for seed in 1 2 3; do ask "$url/generate" -o /dev/null -d "{\"prompt\": \"ghost\", \"seed\": $seed}"; done
  ask "$url/generate" -o /dev/null -d '{"steps": 0}'                                   # is refused
  ask "$url/generate" -o /dev/null -m 1 -d '{"prompt": "ghost", "steps": 200}' || true # leaves
  sleep 4
  while IFS= read -r -d '' expression; do
    asked=$((asked + 1))
    promtool query instant "http://127.0.0.1:$((port + 1))" "$expression" >"$work/answer" || fail "$expression"
    grep -q '=>' "$work/answer" || fail "no data: $expression"
  done < <(questions)
  kill "$watcher"
  wait "$watcher" || true
  echo "$asked asked, all answered with data"
}

drains() {
  say "SIGTERM while it works (docker stop)"
  local code=0 during
  ask "$url/generate" -o "$work/long" -w '%{http_code}' -d '{"prompt": "ghost", "steps": 200}' >"$work/code" &
  local client=$!
  sleep 1
  kill -TERM "$first"
  sleep 0.5
  during=$(ask "$url/generate" -o /dev/null -w '%{http_code}' -d '{"prompt": "ghost"}')
  wait "$client"
  wait "$server" || code=$?
  server=
  echo "what ran: $(cat "$work/code"); what came later: $during; exit code $code"
  [ "$(cat "$work/code") $during $code" = "200 503 0" ] || fail "expected 200, 503 and 0"
}

another() {
  say "docker run --user 12345:0 -v weights:/weights -e LDM_MODEL=/weights/mine IMAGE"
  cp -r weights/emoji "$work/mine" && mkdir "$work/weights" && mv "$work/mine" "$work/weights/mine"
  chmod 755 "$work" && chmod -R a+rX "$work/weights"
  mkdir "$root/weights" # as Docker makes it
  AS=12345:0 WEIGHTS=$work/weights serve LDM_MODEL=/weights/mine
  picture mine "rocket on a black background" mine
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
box
dashboard
drains
another
say "$variant: all of it is as it should be"
