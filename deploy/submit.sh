#!/usr/bin/env bash
# Submit the checkout as a job:  RAY_API_SERVER_ADDRESS=http://HEAD:8265 deploy/submit.sh conf/quickstart.yaml run.dir=/shared/runs/first
#
# The cluster's nodes need this project's dependencies (the same Python environment, or its image), and run.dir must be storage that
# every node sees. Where the cluster asks for a token, RAY_AUTH_TOKEN_PATH names the file that holds it.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${RAY_API_SERVER_ADDRESS:=http://127.0.0.1:8265}"
exec ray job submit --address "$RAY_API_SERVER_ADDRESS" --working-dir . \
  --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}' \
  -- python -m async_rlhf train "$@"
