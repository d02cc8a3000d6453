# To be sourced: what the scripts need that isn't this project's.

# need COMMAND=PACKAGE...: installs the Debian packages of the commands that are missing, which takes
# root; anywhere else it names the commands and ends the script.
need() {
  local pair missing=() packages=()
  for pair; do
    command -v "${pair%%=*}" >/dev/null && continue
    missing+=("${pair%%=*}")
    packages+=("${pair#*=}")
  done
  if ((${#missing[@]} == 0)); then
    return
  fi
  if [[ -e /etc/debian_version && $EUID -eq 0 ]]; then
    echo "${0##*/}: installing ${packages[*]}" >&2
    apt-get -qq update
    # In runlevel 1 no service is started with its package (invoke-rc.d(8)).
    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends "${packages[@]}" >/dev/null
  else
    echo "${0##*/}: missing: ${missing[*]} (Debian packages: ${packages[*]})" >&2
    exit 1
  fi
}

# Rust comes from rustup: what distributions have is often too old.
need_rust() {
  PATH=$PATH:$HOME/.cargo/bin
  if ! command -v cargo >/dev/null; then
    echo "${0##*/}: missing: cargo, of Rust 1.91 or newer (see https://rustup.rs)" >&2
    exit 1
  fi
  need cc=build-essential
}

# The packages of the Node apps, as the lock file has them; nothing to do when they are there.
install_node_packages() {
  if [[ ! node_modules/.package-lock.json -nt package-lock.json ]]; then
    npm ci --ignore-scripts
  fi
}

# The packages that $2 lists, into the folder $1; nothing to do when they are there.
install_python_packages() {
  if [[ ! $1/requirements.txt -nt $2 ]]; then
    python3 -m pip install -q --disable-pip-version-check --root-user-action ignore --no-deps \
      --upgrade --target "$1" --requirement "$2"
    cp "$2" "$1/requirements.txt"
  fi
}
