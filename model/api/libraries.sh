#!/bin/sh
# The shared libraries of Triton's programs, between the stages of Dockerfile.cpu: "collect FOLDER" copies all that they load here,
# "complete FOLDER" installs those of them that are missing here, and fails where one stays missing.
set -eu

server=/opt/tritonserver
programs="$server/bin/tritonserver $server/backends/python/libtriton_python.so
  $server/backends/python/triton_python_backend_stub $server/caches/local/libtritoncache_local.so"

resolve() {
  # shellcheck disable=SC2086  # one word per program
  ldd $programs
}

case $1 in
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
