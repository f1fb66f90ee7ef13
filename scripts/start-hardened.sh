#!/bin/bash
# The image alone, as it is meant to be run: no root, nothing writable but /tmp, no capabilities. It must become healthy, answer, and stop
# in order. Usage: start-hardened.sh IMAGE
set -euo pipefail
image=$1
healthy_within=${HEALTHY_WITHIN:-60}  # seconds

name=npair-hardened-$$
trap 'docker rm --force "$name" >/dev/null' EXIT
docker run --detach --name "$name" --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges --user 1000 \
  "$image" >/dev/null
for ((second = 1; ; second++)); do
  sleep 1
  state=$(docker inspect --format '{{.State.Status}} {{.State.Health.Status}}' "$name")
  [ "$state" != "running healthy" ] || break
  if [ "$second" -ge "$healthy_within" ] || [[ $state != running* ]]; then
    docker logs "$name" >&2
    echo "after $second s it is $state" >&2
    exit 1
  fi
done
echo "healthy after $second s"
# Without any capability, too, the secret can be overwritten in Triton's command line.
if docker logs "$name" 2>&1 | grep 'can read the secret' >&2; then exit 1; fi
# What HEALTHCHECK does, once more, from inside: a golden photo's embedding is the published one.
docker exec "$name" python /app/serve.py --health
docker exec "$name" python -c '
import os
assert os.getuid() == 1000
status = dict(line.split(":\t", 1) for line in open("/proc/1/status"))
assert int(status["CapEff"], 16) == 0, status["CapEff"]
assert status["NoNewPrivs"].strip() == "1"
for folder in ("/app", "/models", "/opt/npair", "/opt/tritonserver"):
    try:
        open(folder + "/written", "w")
    except OSError:
        continue
    raise SystemExit(folder + " is writable")
'
docker stop --time 15 "$name" >/dev/null
code=$(docker inspect --format '{{.State.ExitCode}}' "$name")
[ "$code" = 0 ] || { docker logs "$name" >&2; echo "it stopped with exit code $code" >&2; exit 1; }
echo "stopped in order"
