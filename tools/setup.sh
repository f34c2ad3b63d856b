#!/usr/bin/env bash
# Make .venv with everything pss uses. Safe to run again: it does nothing when .venv is up to date.
#   PSS_PYTHON   the interpreter to use (default: the first of python3, python3.13, python3.12, python3.11 that is new enough)
#   PSS_NO_APT=1 never call apt-get
#   CI           set: install Chromium too (300 MB), in which a test opens the report; it is skipped where there is none
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/.pss-setup
fingerprint=$(cat pyproject.toml constraints.txt tools/setup.sh | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$fingerprint" ]; then exit 0; fi

say() { printf '\033[1m%s\033[0m\n' "setup: $*"; }

new_enough() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }
python=${PSS_PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && new_enough "$candidate"; then python=$candidate; break; fi
  done
fi
if [ -z "$python" ] || ! new_enough "$python"; then
  echo "setup: no Python 3.11, 3.12 or 3.13 found; install one (on Debian: apt-get install python3) or name it in PSS_PYTHON" >&2
  exit 2
fi

# System packages: a C++ compiler with Python's, OpenCV's and TurboJPEG's headers, all of them for FFCV only, and venv itself.
apt() {
  [ -z "${PSS_NO_APT:-}" ] && command -v apt-get >/dev/null || return 1
  if [ "$(id -u)" = 0 ]; then local as_root=(env)
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then local as_root=(sudo env)
  else return 1; fi
  "${as_root[@]}" DEBIAN_FRONTEND=noninteractive apt-get -qq update >/dev/null &&
    "${as_root[@]}" DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@" >/dev/null
}
headers_present() {
  command -v g++ >/dev/null && command -v pkg-config >/dev/null && pkg-config --exists opencv4 libturbojpeg 2>/dev/null &&
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
}
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  say "installing python3-venv"
  apt python3-venv || { echo "setup: Python's venv module is missing; run: apt-get install python3-venv" >&2; exit 2; }
fi
if ! headers_present; then
  say "installing the OpenCV and TurboJPEG headers that FFCV compiles against"
  apt g++ pkg-config libopencv-dev libturbojpeg0-dev python3-dev || true
fi

if [ -n "${CI:-}" ] && ! command -v chromium >/dev/null; then
  say "installing Chromium for the test of the report"
  apt chromium fonts-dejavu-core || true
fi

if ! .venv/bin/python -c 'import pip' 2>/dev/null; then "$python" -m venv --clear .venv; fi
pip=(.venv/bin/python -m pip --disable-pip-version-check)
say "installing torch, timm, DALI and the rest into .venv (several GB the first time)"
"${pip[@]}" install -q --progress-bar off -c constraints.txt -e '.[dali,dev]'
if headers_present; then
  say "building FFCV"
  "${pip[@]}" install -q --progress-bar off -c constraints.txt -e '.[ffcv]'
else
  say "FFCV left out: its headers are missing. Everything else works. To add it, run as root:
       apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev python3-dev
       and then: rm $stamp && make setup"
fi
echo "$fingerprint" >"$stamp"
say "done"
