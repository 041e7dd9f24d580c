# Sourced by the other scripts: `use_venv FOLDER REQUIREMENTS...` makes a virtual environment if needed, installs what
# the requirement files list whenever they have changed, and puts its programs first on PATH.

use_venv() {
  local folder=$1 stamp
  shift
  stamp=$(cat "$@" | cksum)
  if [ ! -x "$folder/bin/python" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      { echo "needs Python 3.11 or newer; PYTHON=/path/to/python3.11 selects one" >&2; return 2; }
    # Debian ships Python without ensurepip; virtualenv needs none
    "${PYTHON:-python3}" -m venv "$folder" 2>/dev/null || {
      rm -rf "$folder"
      echo "this Python has no venv: installing virtualenv for the user (pip install --break-system-packages)" >&2
      "${PYTHON:-python3}" -m pip install --quiet --break-system-packages virtualenv
      "${PYTHON:-python3}" -m virtualenv --quiet "$folder"
    }
  fi
  if [ "$(cat "$folder/installed" 2>/dev/null)" != "$stamp" ]; then
    local files=()
    for file in "$@"; do files+=(-r "$file"); done
    echo "installing torch and others in $folder: up to 6 GB, some minutes" >&2
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "${files[@]}"
    echo "$stamp" > "$folder/installed"
  fi
  PATH=$(cd "$folder/bin" && pwd):$PATH
}
