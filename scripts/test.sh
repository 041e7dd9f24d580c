#!/usr/bin/env bash
# Runs the tests, making .venv first if needed.
#
#   scripts/test.sh              the default tests, about nine minutes on two cores
#   scripts/test.sh --oldest     the same with the lower bounds of requirements.txt, in .venv-oldest
#   scripts/test.sh --slurm      the tests on a one-node SLURM that they bring up (Debian, root)
#   scripts/test.sh --faults     200 random kills (KILLS=10: ten) and other long trials; half an hour
#   scripts/test.sh --gpu        does the GPU work with this project? Where nothing can be installed, with python3 as it is
#   scripts/test.sh ...          anything else goes to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh

export OMP_NUM_THREADS=1
workers=(-n "${WORKERS:-2}" --dist loadgroup) # test processes
python=python
case "${1:-}" in
  --oldest)
    shift
    mkdir -p .venv-oldest
    sed 's/>=/==/' requirements.txt > .venv-oldest/requirements.txt
    use_venv .venv-oldest .venv-oldest/requirements.txt tests/requirements.txt
    ;;
  --slurm | --faults)
    layer=${1#--}
    shift
    use_venv .venv requirements.txt tests/requirements.txt
    set -- -m "$layer" "$@"
    if [ "$layer" = slurm ]; then workers=(-n "${WORKERS:-3}"); else workers=(); fi # jobs mostly wait
    ;;
  --gpu)
    shift
    # in a shell of its own, since in a condition a failing command would not end it
    if PIP_RETRIES=0 bash -euc '. scripts/venv.sh; use_venv .venv requirements.txt tests/requirements.txt'; then
      use_venv .venv requirements.txt tests/requirements.txt
    else
      python=${PYTHON:-python3}
      echo "nothing can be installed here: testing with $(command -v "$python") and the packages that it has" >&2
    fi
    "$python" tests/gpu/ready.py
    set -- -m gpu tests/gpu "$@"
    workers=()
    if "$python" -c 'import xdist' 2> /dev/null; then workers=(-n "${WORKERS:-4}" --dist loadgroup); fi
    ;;
  *)
    use_venv .venv requirements.txt tests/requirements.txt
    ruff check .
    ruff format --check .
    ;;
esac
"$python" -m pytest ${workers[@]+"${workers[@]}"} "$@" # an empty array is unset to bash 3.2, which macOS has
