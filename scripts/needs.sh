# Functions for the other scripts, to be sourced: they install what the scripts need.

# need COMMAND=PACKAGE...: Rust, a C compiler and these commands. As root on Debian it installs the packages of missing
# commands. Otherwise it names all that is missing at once and ends the script. COMMAND may be the path of a file.
need() {
  local pair rust have fails= missing=() packages=()
  # Rust must come from rustup, because many distributions have an old version.
  PATH=$PATH:$HOME/.cargo/bin
  rust=$(sed -n 's/^rust-version = "\([0-9.]*\)".*/\1/p' Cargo.toml)
  have=$(cargo --version 2>/dev/null | cut -d ' ' -f 2) || true
  if ! printf '%s\n' "$rust" "$have" | sort -CV; then
    echo "${0##*/}: missing: Rust $rust or newer (see https://rustup.rs)" >&2
    fails=1
  fi
  for pair in cc=build-essential "$@"; do
    if [[ ! -e ${pair%%=*} ]] && ! command -v "${pair%%=*}" >/dev/null; then
      missing+=("${pair%%=*}")
      packages+=("${pair#*=}")
    fi
  done
  if ((${#missing[@]})); then
    mapfile -t packages < <(printf '%s\n' "${packages[@]}" | sort -u)
    if [[ ! $fails && -e /etc/debian_version ]] && is_root; then
      echo "${0##*/}: installing by apt: ${packages[*]}" >&2
      apt-get -qq update
      install_debian_packages "${packages[@]}"
    else
      echo "${0##*/}: missing: ${missing[*]} (on Debian, as root: apt-get install ${packages[*]})" >&2
      fails=1
    fi
  fi
  if [[ $fails ]]; then
    exit 1
  fi
}

# Whether this is root and may become other users, as an installation of packages must. In a user namespace made by
# `unshare --map-root-user` root is the only user (uid_map in user_namespaces(7)).
is_root() {
  ((EUID == 0)) && awk '{ users += $3 } END { exit users == 1 }' /proc/self/uid_map
}

# Prints where this machine gets Debian's packages from.
debian_mirror() {
  apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | sed -n '\|/debian/$|h; ${x; p}'
}

# Installs packages without starting the services in them.
install_debian_packages() (
  policy=/usr/sbin/policy-rc.d
  if [[ ! -e $policy ]]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
  fi
  # Whoever waits in front of a terminal sees what apt does; a log needs only its errors.
  quiet=(-qq) output=/dev/null
  if [[ -t 2 ]]; then
    quiet=(-q -y) output=/dev/stderr
  fi
  DEBIAN_FRONTEND=noninteractive apt-get "${quiet[@]}" install --no-install-recommends "$@" >"$output"
)

# Puts the Node and npm of tests/node/package-lock.json first in PATH, so that all machines test the same ones. The Node of the
# machine only installs them. Packages that are for a newer Node are left out by npm if an older one runs it.
use_locked_node() {
  (cd tests/node && install_node_packages)
  # Debian 12's npm links no command of an optional package.
  PATH=$(echo "$PWD"/tests/node/node_modules/node-linux-*/bin):$PWD/tests/node/node_modules/.bin:$PATH
  if [[ $(command -v node) != "$PWD"/tests/* ]]; then
    echo "${0##*/}: tests/node/package-lock.json has no Node for $(uname -m)" >&2
    exit 1
  fi
}

# Installs the Node packages of the lock file in this folder, unless they are there.
install_node_packages() {
  if [[ ! node_modules/.package-lock.json -nt package-lock.json ]]; then
    echo "${0##*/}: installing by npm: the packages of tests/${PWD##*/tests/}" >&2
    npm ci --ignore-scripts
  fi
}

# Installs the Python packages that $2 lists into the folder $1, unless they are there.
install_python_packages() {
  if ! cmp -s "$2" "$1/requirements.txt"; then
    echo "${0##*/}: installing by pip: the packages of $2" >&2
    python3 -m pip install -q --disable-pip-version-check --root-user-action ignore --no-deps \
      --upgrade --target "$1" --requirement "$2"
    cp "$2" "$1/requirements.txt"
  fi
}

# Prints what `install_python_packages` needs, as arguments for `need`.
python_needs() {
  echo python3=python3
  # Not the command pip3, which may belong to another Python.
  python3 -m pip --version >/dev/null 2>&1 || echo /usr/lib/python3/dist-packages/pip=python3-pip
}

# Prints what the servers in tests/servers need, as arguments for `need`. `all` includes those that run by hand.
servers_needs() {
  local manifests=(tests/servers/*/server.toml)
  if [[ ${1-} != all ]]; then
    mapfile -t manifests < <(grep -L '^by_hand = ' "${manifests[@]}")
  fi
  sed -n 's/^needs = "\(.*\)"$/\1/p' "${manifests[@]}" | tr ' ' '\n' | sort -u
}
