#!/usr/bin/env bash
# Submit the checkout as a job:  RAY_API_SERVER_ADDRESS=http://HEAD:8265 deploy/submit.sh train conf/quickstart.yaml run.dir=/shared/first
#
# Everything after it is the command line of `python -m async_rlhf`; `--no-wait` in front of it returns at once. The cluster's nodes
# need this project's dependencies (the same environment, or its image), and run.dir must be storage that every node sees.
# The token of the cluster: RAY_AUTH_TOKEN_PATH names its file, else ~/.ray/auth_token is read.
set -euo pipefail
cd "$(dirname "$0")/.."
options=()
while [[ "${1:-}" == --* ]]; do
  options+=("$1")
  shift
done
[[ $# -gt 0 ]] || { echo "usage: $0 [--no-wait] train CONF.yaml run.dir=/shared/NAME [key=value ...]" >&2; exit 2; }
command -v ray > /dev/null || { echo "$0: the command ray is not on PATH: source .venv/bin/activate" >&2; exit 2; }
exec ray job submit --address "${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}" --working-dir . --runtime-env deploy/runtime-env.yaml \
  ${options[@]+"${options[@]}"} -- python -m async_rlhf "$@"
