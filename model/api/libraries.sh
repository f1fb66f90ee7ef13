#!/bin/sh
# Triton's release, and the shared libraries of its programs, between the stages of Dockerfile.cpu: "at-least RELEASE" fails where NVIDIA's
# image here is older, "collect FOLDER" copies all that the programs load here, "complete FOLDER" installs those of them that are missing
# here, and fails where one stays missing.
set -eu

server=/opt/tritonserver
programs="$server/bin/tritonserver $server/backends/python/libtriton_python.so
  $server/backends/python/triton_python_backend_stub $server/caches/local/libtritoncache_local.so"

resolve() {
  # shellcheck disable=SC2086  # one word per program
  ldd $programs
}

case $1 in
  at-least)
    release=${NVIDIA_TRITON_SERVER_VERSION:-}  # set by NVIDIA's images
    if ! echo "$release" | grep -qE '^[0-9]{2}\.[0-9]{2}' || [ "$(printf '%s\n' "$2" "$release" | sort -V | head -n 1)" != "$2" ]; then
      echo "TRITON_IMAGE has Triton ${release:-of an unknown release}, and releases below $2 have known vulnerabilities" >&2
      echo "(docs/security.md); set TRITON_IMAGE to $2 or newer" >&2
      exit 1
    fi
    ;;
  collect)
    mkdir -p "$2"
    # "name => path (address)": the names that programs ask for, with links followed.
    resolve | awk '$2 == "=>" && $3 ~ /^\// {print $1, $3}' | sort -u | while read -r name path; do
      cp -L "$path" "$2/$name"
    done
    ;;
  complete)
    mkdir -p "$server/lib"
    echo "$server/lib" > /etc/ld.so.conf.d/tritonserver.conf
    ldconfig
    # A library that was just installed may need others.
    while missing=$(resolve 2>&1 | awk '/=> not found/ {print $1}' | sort -u) && [ -n "$missing" ]; do
      for name in $missing; do
        cp "$2/$name" "$server/lib/" || { echo "no $name, which Triton needs, in the image that Triton comes from" >&2; exit 1; }
      done
      ldconfig
    done
    # Found, but too old for what asks for it.
    if resolve 2>&1 | grep 'not found'; then exit 1; fi
    ;;
esac
