#!/bin/bash
# Print the images that Dockerfile.cpu builds on, by the digests that their tags have now, as outputs of a workflow's step. All architectures
# of a build take the same ones, and a build can be repeated from them.
set -euo pipefail
cd "$(dirname "$0")/.."
for stage in nvidia ubuntu; do
  image=$(sed -nE "s/^FROM (.+) AS $stage\$/\1/p" model/api/Dockerfile.cpu)
  digest=$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$image")
  echo "$stage=$image@$digest"
done
