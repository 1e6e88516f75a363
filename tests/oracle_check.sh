#!/usr/bin/env bash
# Prune two networks and let an independent checker prove the cuts, where that checker is at hand.
set -euo pipefail
cd "$(dirname "$0")/.."
oracle=../shared/oracle/oracle.py
bin=${VENV:-.venv}/bin
if [ ! -f "$oracle" ]; then
  echo "oracle check skipped: there is no $oracle"
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for name in mobilenet_v2 resnet20; do
  "$bin/onnxslim-kd" export "$name" -o "$folder/$name.onnx"
  "$bin/onnxslim-kd" prune "$folder/$name.onnx" --pattern '.*' --round-to 1 -o "$folder/pruned.onnx" --force
  "$bin/python" "$oracle" "$folder/$name.onnx" "$folder/pruned.onnx" --seeds 1
done
