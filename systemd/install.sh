#!/bin/sh
# Installs flawline from the folder of wheels that this file lies in, without a network: sh install.sh [/opt/flawline]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
target=${1:-/opt/flawline}
cd "$here" && sha256sum --check --quiet SHA256SUMS
"${PYTHON:-python3}" -m venv "$target"
"$target/bin/pip" install --quiet --upgrade --no-index --find-links "$here" --requirement "$here/requirements.txt"
# pip keeps what has the same version number, and a checkout's number seldom changes.
"$target/bin/pip" install --quiet --no-index --no-deps --force-reinstall "$here"/flawline-*.whl
"$target/bin/flawline" --version
if [ "$(id -u)" = 0 ] && [ "$target" = /opt/flawline ]; then
    ln -sf "$target/bin/flawline" /usr/local/bin/flawline
fi
echo "next: $target/bin/flawline service install"
