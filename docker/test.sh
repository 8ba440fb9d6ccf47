#!/usr/bin/env bash
# Runs a mesh of containers as docker/compose.yaml describes it, on the shipped tiny model, and checks what it answers.
#
#   docker/test.sh             # serves over TCP and over UCX, scales from 3 to 6 expert nodes
#   docker/test.sh drill       # then disturbs it under load: scaling, a kill, a cut network, a roll of all nodes;
#                              # and restarts the router
#   docker/test.sh STEP...     # serves, then these: scale_up scale kill partition roll router
#
# Programs come from target/release (make binaries). Base images are not pulled: a stand-in is made of this machine's
# own files, unless BASE_IMAGE names an image that the engine has. All that is made here has names of its own and is
# removed again, also after Ctrl-C; nothing else on the engine is touched. DOCKER_TEST_LIMIT_S (1500) bounds it all.
set -euo pipefail
cd "$(dirname "$0")/.."

project=expert-mesh-test-$$
image=$project:image
base=$project:base
meshctl=$PWD/target/release/meshctl
programs=(router-svc attention-svc expert-svc meshctl)
limit_s=${DOCKER_TEST_LIMIT_S:-1500}
attention=2
experts=3
# What becomes healthy or serves: loading, the first probe and a view.
serve_max_s=120
# A lost node is noticed when its lease of 10 s is over, and is back after a restart or two.
recover_max_s=150
answer_max_s=60
load_workers=4
tokens_max=200
prompts=(57,280,718 5,6,7 100,101,102,103 9,300,12,44,871)

# What docker/compose.yaml reads; port 0 takes a free one.
export MESH_IMAGE=$image MESH_MODEL=$PWD/fixtures/tiny-moe MESH_PUBLISH=127.0.0.1:0 MESH_THREADS=1
export MESH_ATTENTION=$attention MESH_EXPERTS=$experts

work=$(mktemp -d)
workers=()
watchdog=
grpc=
results=()
failed=0

say() { printf 'docker test: %s\n' "$*"; }
fail() {
  say "$*" >&2
  exit 1
}
# bounded SECONDS COMMAND...: in the foreground, so that Ctrl-C reaches the command.
bounded() { timeout --foreground -k 5 "$@"; }

# within SECONDS WHAT COMMAND...: until the command succeeds.
within() {
  local limit=$1 what=$2 begun=$SECONDS
  shift 2
  until "$@"; do
    if [ $((SECONDS - begun)) -ge "$limit" ]; then
      say "not within $limit s: $what"
      return 1
    fi
    sleep 0.5
  done
}

# --- the engine ------------------------------------------------------------------------------------------------------

find_tools() {
  command -v docker >/dev/null || fail "docker is not installed"
  bounded 20 docker info >/dev/null 2>&1 || fail "the Docker engine does not answer (docker info)"
  if bounded 20 docker compose version >/dev/null 2>&1; then
    compose_tool=(docker compose)
  elif command -v docker-compose >/dev/null; then
    compose_tool=(docker-compose)
  else
    fail "neither 'docker compose' nor 'docker-compose' is installed"
  fi
  local program
  for program in "${programs[@]}"; do
    [ -x "target/release/$program" ] || fail "target/release/$program is missing: run 'make binaries' first"
  done
}

# compose SECONDS ARGUMENTS...
compose() {
  local limit=$1
  shift
  bounded "$limit" "${compose_tool[@]}" -p "$project" -f docker/compose.yaml "$@"
}

# containers SERVICE: ids of those that run.
containers() {
  bounded 20 docker ps -q --no-trunc --filter "label=com.docker.compose.project=$project" \
    --filter "label=com.docker.compose.service=$1"
}

# Images made from ours: what a build that did not come to its end leaves behind.
descendants() {
  local all
  all=$(bounded 30 docker image ls -aq --no-trunc | sort -u)
  [ -n "$all" ] || return 0
  # shellcheck disable=SC2086
  bounded 60 docker image inspect -f '{{.Id}} {{.Parent}}' $all | awk -v root="$1" '
    { parent[$1] = $2 }
    END { for (id in parent) for (up = parent[id]; up != ""; up = parent[up]) if (up == root) { print id; break } }'
}

clean_up() {
  local status=$? group root rest
  trap '' INT TERM HUP
  trap - EXIT
  set +e
  # A signal may come while output goes elsewhere.
  exec >&3
  touch "$work/stop"
  for group in $watchdog "${workers[@]}"; do kill -- "-$group" 2>/dev/null; done
  if [ -n "${compose_tool[*]-}" ]; then
    say "removing what was made"
    compose 180 down -v --remove-orphans -t 10 >"$work/down" 2>&1 || cat "$work/down" >&2
    bounded 60 docker rm -f "$project-probe" >/dev/null 2>&1
    root=$(bounded 20 docker image inspect -f '{{.Id}}' "$base" 2>/dev/null)
    bounded 60 docker rmi -f "$image" >/dev/null 2>&1
    rest=$([ -z "$root" ] || descendants "$root")
    # shellcheck disable=SC2086
    [ -z "$rest" ] || bounded 60 docker rmi -f $rest >/dev/null 2>&1
    bounded 60 docker rmi -f "$base" >/dev/null 2>&1
  fi
  rm -rf "$work"
  exit "$status"
}

# beside COMMAND...: in the background, in a process group of its own, so that it ends with its children.
beside() {
  set -m
  "$@" &
  set +m
}

time_out() {
  sleep "$limit_s"
  say "not done after $limit_s s (DOCKER_TEST_LIMIT_S)" >&2
  kill -TERM $$
}

watch_time() {
  beside time_out
  watchdog=$!
}

# --- the image -------------------------------------------------------------------------------------------------------

# take ROOT FILE...: files and the libraries that they need, to where a merged /usr has them.
take() {
  local root=$1 file to
  shift
  for file in "$@" $(ldd "$@" 2>/dev/null | awk '/=> \//{print $3} /^\t\/lib.*ld-/{print $1}' | sort -u); do
    case $file in
      /usr/*) to=$root$file ;;
      *) to=$root/usr$file ;;
    esac
    [ -e "$to" ] || install -D "$(readlink -f "$file")" "$to"
  done
}

stand_in_base() {
  local root=$work/root tool ucp
  say "STAND-IN: no base image is pulled. $base is made of THIS MACHINE's shell, tools, C library and UCX,"
  say "STAND-IN: and its apt-get installs nothing. That tests our stage, not Debian's packages."
  mkdir -p "$root"/{etc,tmp,proc,sys,dev,var/lib,var/cache} "$root"/usr/{bin,sbin,lib,lib64}
  chmod 1777 "$root/tmp"
  for tool in bin sbin lib lib64; do ln -s "usr/$tool" "$root/$tool"; done
  for tool in sh mkdir chown rm cat ls id sleep env; do take "$root" "$(command -v "$tool")"; done
  for tool in "${programs[@]}"; do take "$root" "$PWD/target/release/$tool"; done
  # The programs themselves come with the image's own stage.
  rm -rf "${root:?}/usr$PWD"
  ucp=$(PATH=$PATH:/usr/sbin:/sbin ldconfig -p | awk '/libucp\.so\.0/ && !found++ {print $NF}')
  if [ -n "$ucp" ]; then
    # shellcheck disable=SC2046
    take "$root" "$ucp" $(find "$(dirname "$(readlink -f "$ucp")")/ucx" -name 'lib*.so.0' 2>/dev/null)
  else
    say "NOT RUN: UCX in containers: this machine has no libucp.so.0 to make the stand-in of"
  fi
  printf 'root:x:0:0:root:/root:/bin/sh\n' >"$root/etc/passwd"
  printf 'root:x:0:\n' >"$root/etc/group"
  printf 'hosts: files dns\n' >"$root/etc/nsswitch.conf"
  printf '#!/bin/sh\necho "STAND-IN: apt-get %s: nothing is installed"\n' '$*' >"$root/usr/bin/apt-get"
  chmod 755 "$root/usr/bin/apt-get"
  tar -C "$root" --owner=0 --group=0 -c . | bounded 120 docker import - "$base" >/dev/null
  rm -rf "$root"
}

build() {
  local program base_image=${BASE_IMAGE:-}
  if [ -z "$base_image" ]; then
    stand_in_base
    base_image=$base
  fi
  mkdir "$work/context"
  for program in "${programs[@]}"; do
    strip --strip-debug -o "$work/context/$program" "target/release/$program" 2>/dev/null ||
      cp "target/release/$program" "$work/context/$program"
  done
  bounded 300 docker build -q --force-rm --target prebuilt --build-arg "BASE_IMAGE=$base_image" \
    -f docker/Dockerfile -t "$image" "$work/context" >"$work/build" 2>&1 || {
    cat "$work/build" >&2
    fail "the image could not be built"
  }
  rm -rf "$work/context"
  say "image built: $(($(bounded 20 docker image inspect -f '{{.Size}}' "$image") / 1000000)) MB"
  bounded 60 docker run --rm --name "$project-probe" --network none --read-only "$image" \
    sh -c 'id -u; meshctl doctor --json' >"$work/probe"
  [ "$(head -n 1 "$work/probe")" = 10001 ] || fail "the image's user is $(head -n 1 "$work/probe"), not 10001"
}

has_ucx() { grep -q '"ucx":{[^}]*"usable":true' "$work/probe"; }

# --- the mesh --------------------------------------------------------------------------------------------------------

# up TRANSPORT
up() {
  export MESH_TRANSPORT=$1
  compose 180 up -d >"$work/up" 2>&1 || {
    cat "$work/up" >&2
    return 1
  }
  find_router
}

find_router() {
  grpc=$(compose 30 port router 50051) && [ -n "$grpc" ]
}

scaled_to() {
  compose 240 up -d --no-recreate --scale "attention=$attention" --scale "expert=$1" >"$work/up" 2>&1 || {
    cat "$work/up" >&2
    return 1
  }
}

down() {
  compose 180 down -v -t 20 >"$work/down" 2>&1 || {
    cat "$work/down" >&2
    return 1
  }
}

# serves ATTENTION EXPERTS: whether so many are there, and every expert node holds experts.
serves() {
  bounded 20 "$meshctl" status --grpc "$grpc" >"$work/status" 2>&1 || return 1
  grep -q '^serving' "$work/status" || return 1
  [ "$(grep -c '^attention-' "$work/status")" -eq "$1" ] || return 1
  [ "$(grep -c '^expert-' "$work/status")" -eq "$2" ] || return 1
  [ "$(grep -cE '^expert-.*: [1-9][0-9]* experts held' "$work/status")" -eq "$2" ]
}

# healthy COUNT: whether so many containers run and the engine calls all of them healthy.
healthy() {
  local ids
  ids=$(bounded 20 docker ps -q --filter "label=com.docker.compose.project=$project" --filter health=healthy) ||
    return 1
  [ "$(wc -w <<<"$ids")" -eq "$1" ]
}

# generate PROMPT-NUMBER: the tokens of an answer.
generate() {
  bounded $((answer_max_s + 10)) "$meshctl" generate --grpc "$grpc" --token-ids "${prompts[$1]}" --ignore-eos --json \
    --max-new-tokens "$tokens_max" --timeout "$answer_max_s" >"$work/answer.$BASHPID" || return 1
  grep -o '"token_ids":\[[^]]*\]' "$work/answer.$BASHPID"
}

# answers_as_before: every prompt once; the first time, what comes is what is expected from then on.
answers_as_before() {
  local i tokens
  for i in "${!prompts[@]}"; do
    tokens=$(generate "$i") || return 1
    [ -e "$work/expected.$i" ] || printf '%s\n' "$tokens" >"$work/expected.$i"
    [ "$tokens" = "$(cat "$work/expected.$i")" ] || {
      say "prompt ${prompts[$i]} got other tokens than before: $tokens"
      return 1
    }
  done
}

show_logs() {
  say "the containers' last warnings:"
  compose 60 logs --no-color --tail=100 2>&1 | grep -E ' (WARN|ERROR) |error:' | cut -c 1-200 | tail -n 15
} >&2

# --- load ------------------------------------------------------------------------------------------------------------

# One stream of requests until it is told to stop, one line of outcome for each.
worker() {
  local number=$1 n=$1 i tokens outcome
  while [ ! -e "$work/stop" ]; do
    i=$((n++ % ${#prompts[@]}))
    if ! tokens=$(generate "$i" 2>"$work/words.$number"); then
      outcome="failed $(head -n 1 "$work/words.$number")"
      sleep 0.2
    elif [ "$tokens" != "$(cat "$work/expected.$i")" ]; then
      outcome="other tokens for ${prompts[$i]}: $tokens"
    else
      outcome=right
    fi
    printf '%s\n' "$outcome" >>"$work/load.$number"
  done
}

under_way() { [ "$(cat "$work"/load.* 2>/dev/null | wc -l)" -ge "$load_workers" ]; }

# under_load COMMAND...: runs it while requests stream; every one of them must be answered, with the tokens expected.
under_load() {
  local i right wrong status=0
  rm -f "$work"/load.* "$work/stop"
  workers=()
  for ((i = 0; i < load_workers; i++)); do
    beside worker "$i"
    workers+=($!)
  done
  within 60 "the load is under way" under_way && "$@" || status=1
  sleep 2
  touch "$work/stop"
  # Each ends with its request, which is bounded.
  wait "${workers[@]}" || true
  workers=()
  right=$(cat "$work"/load.* | grep -c '^right$') || true
  wrong=$(cat "$work"/load.* | grep -vc '^right$') || true
  say "  $right requests answered with the tokens expected, $wrong not"
  [ "$wrong" -eq 0 ] || {
    cat "$work"/load.* | grep -v '^right$' | cut -c 1-200 | sort | uniq -c | sort -rn | head -n 5
    status=1
  }
  [ "$right" -gt 0 ] && [ "$status" -eq 0 ]
}

# --- steps -----------------------------------------------------------------------------------------------------------

serve_over() {
  up "$1" && within "$serve_max_s" "all nodes serve" serves "$attention" "$experts" &&
    within "$serve_max_s" "all containers are healthy" healthy $((1 + attention + experts)) &&
    { [ "$1" = auto ] || [ "$(grep -c " $1://" "$work/status")" -eq "$experts" ]; } && answers_as_before
}

step_scale_up() {
  scaled_to 6 && within "$recover_max_s" "six expert nodes serve" serves "$attention" 6 &&
    within "$serve_max_s" "all containers are healthy" healthy $((1 + attention + 6)) && answers_as_before &&
    scaled_to "$experts" && within "$recover_max_s" "three expert nodes serve" serves "$attention" "$experts"
}

scaling() {
  local to
  for to in 6 2 "$experts"; do
    scaled_to "$to" && within "$recover_max_s" "$to expert nodes serve" serves "$attention" "$to" || return 1
  done
}
step_scale() { under_load scaling; }

a_kill() {
  local victim
  victim=$(containers expert | sed -n 1p)
  bounded 30 docker kill "$victim" >/dev/null || return 1
  within "$recover_max_s" "the others serve without it" serves "$attention" $((experts - 1)) || return 1
  bounded 30 docker start "$victim" >/dev/null || return 1
  within "$recover_max_s" "it serves again" serves "$attention" "$experts"
}
step_kill() { under_load a_kill; }

a_partition() {
  local victim network=${project}_default
  victim=$(containers expert | sed -n 1p)
  bounded 30 docker network disconnect "$network" "$victim" || return 1
  within "$recover_max_s" "the others serve without it" serves "$attention" $((experts - 1)) || return 1
  bounded 30 docker network connect --alias expert "$network" "$victim" || return 1
  within "$recover_max_s" "it serves again" serves "$attention" "$experts"
}
step_partition() { under_load a_partition; }

a_roll() {
  local each
  for each in $(containers expert) $(containers attention); do
    bounded 90 docker restart -t 45 "$each" >/dev/null || return 1
    within "$recover_max_s" "all nodes serve again" serves "$attention" "$experts" || return 1
  done
}
step_roll() { under_load a_roll; }

# The router is one: requests end with it, but its nodes come back to the next by themselves.
step_router() {
  local router
  router=$(containers router)
  bounded 60 docker restart -t 15 "$router" >/dev/null && find_router &&
    within "$recover_max_s" "all nodes came back" serves "$attention" "$experts" && answers_as_before
}

# run WORDS COMMAND...
run() {
  local words=$1 begun=$SECONDS
  shift
  say "$words"
  if "$@"; then
    results+=("passed  $words ($((SECONDS - begun)) s)")
  else
    failed=1
    results+=("FAILED  $words ($((SECONDS - begun)) s)")
    [ ! -e "$work/status" ] || cut -c 1-160 "$work/status" >&2
    show_logs
  fi
}

settle() {
  serves "$attention" "$experts" && return
  say "starting the mesh anew for the next step"
  down && up "$1" && within "$serve_max_s" "the mesh serves" serves "$attention" "$experts" ||
    fail "the mesh cannot be started any more"
}

steps=("$@")
[ $# -gt 0 ] || steps=(scale_up)
[ "${steps[*]}" != drill ] || steps=(scale_up scale kill partition roll router)
for step in "${steps[@]}"; do
  declare -F "step_$step" >/dev/null || fail "there is no step '$step'; see the head of this file"
done

exec 3>&1
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
find_tools
watch_time
build
transport=tcp
run "serves over tcp" serve_over tcp
if has_ucx; then
  down
  transport=ucx
  run "serves over ucx, with the same tokens" serve_over ucx
fi
for step in "${steps[@]}"; do
  settle "$transport"
  run "$step over $transport" "step_$step"
done
say "results:"
printf '  %s\n' "${results[@]}"
exit "$failed"
