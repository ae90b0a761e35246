#!/bin/bash
# The same run on nodes without a scheduler. On a machine that is not lost with a node, a login node for one:
#
#   launch/bare_nodes.sh rendezvous                       # serves the store at port 29400, until it is stopped
#
# then on every node, in any order, now or later:
#
#   launch/bare_nodes.sh node LOGIN_NODE:29400 2:4 train_configs/llama3_debug.toml [--section.key=value ...]
#
# 2:4 is the least and the most nodes. JOB tells runs at the same store apart: give each run another one, and a run
# that is started again after its end too.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
rendezvous)
    root=$PWD
    # shellcheck source=bootstrap.sh
    . ./bootstrap.sh
    bootstrap core
    exec "$python" -m torchtitan_lite rendezvous --port "${2:-29400}"
    ;;
node)
    [ $# -ge 4 ] || { echo "usage: $0 node HOST:PORT MIN:MAX RECIPE.toml [--section.key=value ...]" >&2; exit 2; }
    export RDZV_ENDPOINT=$2 NNODES=$3
    export RDZV_ID=${JOB:-torchtitan_lite}
    # Failures of this node's ranks and of its peers after which it goes on. A node that joins costs none.
    export MAX_RESTARTS=${MAX_RESTARTS:-10}
    shift 3
    exec ./run_train.sh "$@"
    ;;
*)
    echo "usage: $0 rendezvous [PORT] | $0 node HOST:PORT MIN:MAX RECIPE.toml [--section.key=value ...]" >&2
    exit 2
    ;;
esac
