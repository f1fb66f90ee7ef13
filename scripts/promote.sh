#!/bin/bash
# Give a tested image further tags, without building or changing it: the registry gets the same manifest under another name.
# Usage: promote.sh REPOSITORY DIGEST TAG...   Credentials are docker's. SKOPEO_OPTIONS: further options of skopeo copy.
set -euo pipefail
repository=$1 digest=$2
shift 2
[[ $digest =~ ^sha256:[0-9a-f]{64}$ ]] || { echo "not a digest: $digest" >&2; exit 2; }

options=${SKOPEO_OPTIONS:-}
# Docker takes loopback registries without TLS by itself, and skopeo does not.
case $repository in 127.* | localhost:*) options+=" --src-tls-verify=false --dest-tls-verify=false" ;; esac
for tag; do
  [[ $tag =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*[A-Za-z0-9_]$ ]] || { echo "not a tag: '$tag'" >&2; exit 2; }
  # --all: every architecture, and attestations too. --preserve-digests: fail rather than write another manifest.
  # shellcheck disable=SC2086  # one word per option
  skopeo copy --quiet --all --preserve-digests $options "docker://$repository@$digest" "docker://$repository:$tag"
  echo "$repository:$tag is $digest"
done
