#!/bin/bash
# Build the sdist, and the wheel from it, and check their metadata. The same commit gives the same bytes. Needs uv and twine.
# Usage: build-dist.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-dist}
rm -rf "$folder"
SOURCE_DATE_EPOCH=$(git log -1 --pretty=%ct) uv build --quiet --no-build-logs --build-constraint model/web/build.in --out-dir "$folder" .
rm -f "$folder/.gitignore"
twine check --strict "$folder"/*
