#!/bin/bash
# Every version in the model repository is as it was published, and the one that config.pbtxt names is the one that is there.
set -euo pipefail
cd "$(dirname "$0")/.."
npair=${NPAIR:-npair}

for folder in model_repository/npair/[0-9]*/; do
  "$npair" verify "${folder%/}"
done
for version in $(sed -nE 's/^version_policy.*versions: \[ *([0-9, ]*)\].*/\1/p' model_repository/npair/config.pbtxt | tr ',' ' '); do
  hash=$(sha256sum < "model_repository/npair/$version/manifest.json")
  grep -q "${hash%% *}" model_repository/npair/config.pbtxt || {
    echo "config.pbtxt does not name the manifest_sha256 of version $version, which is ${hash%% *}" >&2
    exit 1
  }
done
