#!/bin/bash
# Upload dist/ to PyPI. On GitHub, PyPI trusts the workflow itself, and no token exists. Files that are there already are passed over if they
# are the same, and refused otherwise. PUBLISH_URL and CHECK_URL name another index, UV another uv than the locked one.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-}
if [ -z "$uv" ]; then
  environment=$(mktemp -d)
  trap 'rm -rf "$environment"' EXIT
  python3 -m venv "$environment"
  "$environment/bin/pip" install --quiet --disable-pip-version-check --require-hashes --requirement scripts/requirements.txt
  uv=$environment/bin/uv
fi
# Only in GitHub's runs may PyPI be asked to trust anyone.
trust=never
[ -z "${ACTIONS_ID_TOKEN_REQUEST_URL:-}" ] || trust=always
"$uv" publish --trusted-publishing $trust \
  --publish-url "${PUBLISH_URL:-https://upload.pypi.org/legacy/}" --check-url "${CHECK_URL:-https://pypi.org/simple/}" \
  dist/*.whl dist/*.tar.gz
