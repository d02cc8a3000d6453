# To be sourced: what the scripts need that isn't this project's.

# need COMMAND=PACKAGE...: installs the Debian packages of the commands that are missing, which takes
# root; anywhere else it names the commands and ends the script. A file's path will do for a command.
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

# Rust comes from rustup: what distributions have is often too old.
need_rust() {
  PATH=$PATH:$HOME/.cargo/bin
  if ! command -v cargo >/dev/null; then
    echo "${0##*/}: missing: cargo, of Rust 1.88 or newer (see https://rustup.rs)" >&2
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

# What the servers in tests/servers need, as pairs for `need`.
servers_needs() {
  sed -n 's/^needs = "\(.*\)"$/\1/p' tests/servers/*/server.toml | tr ' ' '\n' | sort -u
}
