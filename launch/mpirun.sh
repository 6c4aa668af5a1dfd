#!/usr/bin/env bash
# Train under Open MPI: launch/mpirun.sh NUMBER_OF_PROCESSES [arguments of train_gpt.py]
# docs/many-machines.md explains each option.
set -euo pipefail
exec mpirun -n "$1" --bind-to none --mca odls_base_sigkill_timeout 10 \
    python3 train_gpt.py "${@:2}"
