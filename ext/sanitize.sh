#!/usr/bin/env bash
# Builds the extension with ASan and UBSan in a scratch directory, and runs its tests there.
#
# PYTHON names the interpreter. More arguments go to pytest. The interpreter itself frees little
# when it ends, so leaks are not looked for; its allocator is malloc, so that ASan sees its buffers.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[[ $python == */* ]] && python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

cp -r ext flexkv setup.py pyproject.toml README.md "$scratch"
mkdir -p "$scratch/tests/unit" "$scratch/tests/property"
cp tests/unit/test_ext_*.py tests/unit/xxh3.py tests/unit/test_foreign_keys.py \
    tests/unit/{leaves,test_leaves,test_reach,test_spent_leaves}.py "$scratch/tests/unit"
cp tests/property/{*index*,test_hints}.py "$scratch/tests/property"
touch "$scratch/tests/__init__.py" "$scratch/tests/property/__init__.py"
rm -f "$scratch"/flexkv/_ext*.so
cd "$scratch"
EXT_SANITIZE=1 "$python" setup.py --quiet build_ext --inplace

LD_PRELOAD=$("${CC:-gcc}" -print-file-name=libasan.so) \
PYTHONMALLOC=malloc PYTHONPATH=$scratch HYPOTHESIS_STORAGE_DIRECTORY=$scratch/.hypothesis \
ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
    "$python" -m pytest -q -p no:cacheprovider tests "$@"
