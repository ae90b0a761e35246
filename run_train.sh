#!/usr/bin/env bash
# Train a recipe with torchrun; sets up what it needs on the first start.
#
#   ./run_train.sh [RECIPE.toml] [--section.key=value ...]
#
# RECIPE.toml       default: train_configs/llama3_debug.toml
# --section.key=..  overrides, as in --training.steps=100; docs/configuration.md lists all keys
#
# Environment:
#   NPROC           ranks on this node; default: its accelerators, else 2
#   NNODES          nodes; default 1; MIN:MAX where they come and go (docs/elastic.md)
#   MAX_RESTARTS    failures after which ranks are started again; default 0, and 3 with MIN:MAX
#   RDZV_ENDPOINT   HOST:PORT of the rendezvous, for more than one node
#   RDZV_ID         tells runs at the same rendezvous apart; default torchtitan_lite
#   RDZV_CONF       KEY=VALUE,... for torchrun's --rdzv-conf
#   LOG_RANK        ranks whose log is shown, as in 0,3; default 0
#   OMP_NUM_THREADS threads of a rank; default: cores over ranks
#   PYTORCH_ALLOC_CONF  settings of torch's allocator on GPUs; default: expandable_segments:True
#   PYTHON          interpreter for the first set-up; default: python3
#
# Exit codes: 0 done, 1 a rank failed, 2 a mistake in recipe, overrides or environment, 128 + n stopped by signal n.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for argument in "$@"; do
  case $argument in
    -h | --help)
      sed -n '2,/^set /{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
  esac
done
# shellcheck source=bootstrap.sh
. "$root/bootstrap.sh"
bootstrap core
# This checkout's code, whatever an environment has installed, for the launcher and for the ranks.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m torchtitan_lite.launch "$@"
