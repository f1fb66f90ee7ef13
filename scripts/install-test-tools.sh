#!/usr/bin/env bash
# Install what make install, lint, test and test-faults need and this machine lacks.
# Needs root, and a Debian or Ubuntu that has it.
set -euo pipefail

missing=()
# Without venv's package, Debian's Python cannot make a virtual environment.
python3.11 -c 'import ensurepip' 2>/dev/null || missing+=(python3.11)
tools=(make curl git npm prometheus prometheus-alertmanager nginx haproxy faketime)
for tool in "${tools[@]}" chromium chromedriver; do
  command -v "$tool" >/dev/null || missing+=("$tool")
done
[ "${#missing[@]}" -gt 0 ] || exit 0
apt-get update -q
# The tests start the services that they need; packages must not.
[ -e /usr/sbin/policy-rc.d ] || install -m 755 <(printf '#!/bin/sh\nexit 101\n') /usr/sbin/policy-rc.d
for tool in "${missing[@]}"; do
  case $tool in
    python3.11) apt-get install -qy python3.11 python3.11-venv libpython3.11 ;;
    chromedriver) apt-get install -qy --no-install-recommends chromium-driver ;;
    *) apt-get install -qy --no-install-recommends "$tool" ;;
  esac
done
