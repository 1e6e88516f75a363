#!/bin/sh
# Fashion-MNIST (Xiao et al. 2017, MIT licence) from Debian, for benchmarks/fashion_mnist.py.
set -e
folder=/usr/share/datasets/fashion-mnist
if [ ! -d "$folder" ]; then
    run() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
    run apt-get update -q
    run apt-get install -y -q dataset-fashion-mnist
fi
ls "$folder"/*-idx*-ubyte.gz
echo "use: --data 'idx:$folder?split=train'"
