# Functions for the other scripts, to be sourced: they install what the scripts need.

# need COMMAND=PACKAGE...: installs the Debian packages of missing commands, as root on Debian. Elsewhere it names them and
# ends the script. COMMAND may be the path of a file.
need() {
  local pair missing=() packages=()
  for pair; do
    if [[ -e ${pair%%=*} ]] || command -v "${pair%%=*}" >/dev/null; then
      continue
    fi
    missing+=("${pair%%=*}")
    packages+=("${pair#*=}")
  done
  if ((${#missing[@]} == 0)); then
    return
  fi
  if [[ -e /etc/debian_version && $EUID -eq 0 ]]; then
    echo "${0##*/}: installing ${packages[*]}" >&2
    apt-get -qq update
    install_debian_packages "${packages[@]}"
  else
    echo "${0##*/}: missing: ${missing[*]} (Debian packages: ${packages[*]})" >&2
    exit 1
  fi
}

# Installs packages without starting the services in them.
install_debian_packages() (
  policy=/usr/sbin/policy-rc.d
  if [[ ! -e $policy ]]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
  fi
  DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends "$@" >/dev/null
)

# Rust must come from rustup, because many distributions have an old version.
need_rust() {
  PATH=$PATH:$HOME/.cargo/bin
  if ! command -v cargo >/dev/null; then
    echo "${0##*/}: missing: cargo, of Rust 1.88 or newer (see https://rustup.rs)" >&2
    exit 1
  fi
  need cc=build-essential
}

# Puts the Node and npm of tests/node/package-lock.json first in PATH, so that all machines test the same ones. The Node of the
# machine only installs them. Packages that are for a newer Node are left out by npm if an older one runs it.
use_locked_node() {
  (cd tests/node && install_node_packages)
  PATH=$PWD/tests/node/node_modules/.bin:$PATH
  if [[ $(command -v node) != "$PWD"/tests/* ]]; then
    echo "${0##*/}: tests/node/package-lock.json has no Node for $(uname -m)" >&2
    exit 1
  fi
}

# Installs the Node packages of the lock file in this folder, unless they are there.
install_node_packages() {
  if [[ ! node_modules/.package-lock.json -nt package-lock.json ]]; then
    npm ci --ignore-scripts
  fi
}

# Installs the Python packages that $2 lists into the folder $1, unless they are there.
install_python_packages() {
  if ! cmp -s "$2" "$1/requirements.txt"; then
    python3 -m pip install -q --disable-pip-version-check --root-user-action ignore --no-deps \
      --upgrade --target "$1" --requirement "$2"
    cp "$2" "$1/requirements.txt"
  fi
}

# Prints what the servers in tests/servers need, as arguments for `need`. `all` includes those that run by hand.
servers_needs() {
  local manifests=(tests/servers/*/server.toml)
  if [[ ${1-} != all ]]; then
    mapfile -t manifests < <(grep -L '^by_hand = ' "${manifests[@]}")
  fi
  sed -n 's/^needs = "\(.*\)"$/\1/p' "${manifests[@]}" | tr ' ' '\n' | sort -u
}
