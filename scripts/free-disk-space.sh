#!/bin/bash
# Make room for NVIDIA's image, of 15 GB and as much again unpacked, on a runner of GitHub's; where there is enough, do nothing.
set -euo pipefail
needed_gb=45

free_gb() { df --output=avail --block-size=1G / | tail -n 1 | tr -d ' '; }

for unused in /usr/share/dotnet /usr/local/lib/android /opt/ghc /usr/local/.ghcup /opt/hostedtoolcache/CodeQL /usr/share/swift; do
  [ "$(free_gb)" -lt $needed_gb ] || break
  sudo rm -rf "$unused"
done
echo "$(free_gb) GB are free"
