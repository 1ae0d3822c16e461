#!/usr/bin/env bash
# Runs the C++ code under sanitizers, in build/sanitize; the result of `python setup.py build_ext --inplace` is kept.
#
#   csrc/tests/sanitize.sh address            library and its tests, AddressSanitizer + UndefinedBehaviorSanitizer
#   csrc/tests/sanitize.sh thread             the same with ThreadSanitizer
#   csrc/tests/sanitize.sh extension [ARG...] the extension with both, and pytest ARG... (default: tests/data) on it
#
# The first finding ends the run with a report and a non-zero exit status.
set -euo pipefail
cd "$(dirname "$0")/../.."
CXX=${CXX:-g++}
PYTHON=${PYTHON:-python}
BUILD=${BUILD:-build/sanitize}
export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=1}
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export TSAN_OPTIONS=halt_on_error=1
# A hostile case may request more memory than there is: that must be std::bad_alloc, as without a sanitizer.
ASAN_OPTIONS+=:allocator_may_return_null=1
TSAN_OPTIONS+=:allocator_may_return_null=1
ADDRESS="-fsanitize=address,undefined -fno-sanitize-recover=all"

# Every source file in csrc/tests is a separate program.
library() {
    local folder=$BUILD/$1 flags="-std=c++17 -O1 -g -fno-omit-frame-pointer -Wall -Wextra -Icsrc/include -Icsrc $2"
    mkdir -p "$folder"
    rm -f "$folder"/*.o
    find csrc -name '*.cpp' -not -path 'csrc/bindings/*' -not -path 'csrc/tests/*' -print0 |
        xargs -0 -P "${JOBS:-2}" -I{} bash -c "$CXX $flags -c {} -o $folder/\$(tr / - <<<{}).o"
    for source in csrc/tests/*.cpp; do
        local program=$folder/${source##*/}
        # shellcheck disable=SC2086
        $CXX $flags "$source" "$folder"/*.o -pthread -o "${program%.cpp}"
        "${program%.cpp}" "${@:3}"
        echo "$1: ${source##*/}: no finding"
    done
}

# A copy of the packages with an instrumented extension; PYTHONPATH puts it before the installed ones.
extension() {
    local copy=$BUILD/packages
    rm -rf "$copy"
    TACO_CXXFLAGS="-O1 -g -fno-omit-frame-pointer $ADDRESS" $PYTHON setup.py -q build --build-base "$BUILD/base" --build-lib "$copy"
    # Python itself is not instrumented: the runtime must be preloaded, and Python's own leaks are not ours.
    local runtime
    runtime="$($CXX -print-file-name=libasan.so) $($CXX -print-file-name=libstdc++.so)"
    export PYTHONPATH=$PWD/$copy PYTHONSAFEPATH=1 ASAN_OPTIONS=$ASAN_OPTIONS:detect_leaks=0
    LD_PRELOAD=$runtime $PYTHON -c "
from pretrain.data.sample_index import native
assert native().__file__.startswith('$PWD/$copy'), 'tested would be ' + native().__file__"
    LD_PRELOAD=$runtime $PYTHON -m pytest -q -p no:cacheprovider "${@:-tests/data}"
    echo "extension: no finding"
}

case ${1:-} in
    address) library address "$ADDRESS" ;;
    thread) library thread -fsanitize=thread 500 ;;  # cases of random input: threads meet in the last one
    extension) shift && extension "$@" ;;
    *) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2 && exit 2 ;;
esac
