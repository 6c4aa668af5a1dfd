#!/usr/bin/env bash
# Train on all hosts of a TPU slice: launch/tpu_pod.sh NAME ZONE FOLDER [arguments of train_gpt.py]
# FOLDER is the path of this repository on the hosts; docs/many-machines.md explains the rest.
set -euo pipefail
gcloud compute tpus tpu-vm ssh "$1" --zone="$2" --worker=all \
    --command="cd $(printf %q "$3") && exec python3 train_gpt.py$(printf ' %q' "${@:4}")"
