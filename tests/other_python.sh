#!/usr/bin/env bash
# The fast tests of data work under another Python than that of .venv, in an environment of its own without torch:
#
#   tests/other_python.sh [PYTHON]      PYTHON: python3.12, /opt/python3.13/bin/python, ...; else the first that is here
#
# constraints.txt names the CPU release of torch, which is for Python 3.11 alone; so what runs here is what needs none.
# Says why, and succeeds, where there is no such Python. PYTEST_OPTIONS are given to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() {
    echo "check-other: skipped, because $*; name another with OTHER_PYTHON=..."
    exit 0
}

if [ -n "${1:-}" ]; then
    candidates=("$1")
else
    candidates=(python3.12 python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23].*/bin/python)
fi
python=''
for candidate in "${candidates[@]}"; do
    "$candidate" -c '' 2>/dev/null || continue
    python=$candidate
    break
done
[ -n "$python" ] || skip "${1:-Python 3.12 or 3.13} does not run here"
"$python" -c 'import ensurepip, venv' 2>/dev/null || skip "$python makes no virtual environments (its -venv package)"
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    skip "$python has no Python.h to build the extension with (its -dev package)"

environment=.venv-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ -z "$(find "$environment/.installed" -newer constraints.txt -newer requirements-data.txt 2>/dev/null)" ]; then
    "$python" -m venv --clear "$environment"
    pip=("$environment/bin/python" -m pip install --quiet -c constraints.txt)
    "${pip[@]}" --upgrade pip setuptools wheel pybind11
    "${pip[@]}" -r requirements-data.txt pytest pytest-timeout pytest-xdist hypothesis psutil sentencex zstandard
    touch "$environment/.installed"
fi
"$environment/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e .
echo "check-other: $("$environment/bin/python" --version), fast tests of data work"
# shellcheck disable=SC2086  # several words
"$environment/bin/python" -m pytest -q ${PYTEST_OPTIONS:-} -m "not slow" \
    tests/data tests/data_tools tests/init tests/test_cli.py
