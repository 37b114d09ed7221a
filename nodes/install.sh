#!/usr/bin/env bash
# Installs mdiq on this device as a service. Run it again at any time: what is there already is left alone.
#
#   install.sh --name NAME [--wheels DIR] [--topology FILE] [--key FILE]    install a node, or bring it up to date
#   install.sh --role starter ...                                           the same for the Starter
#   install.sh --role route [--wheels DIR] [--routes FILE] [--keys DIR]     a router, beside a node or alone
#   install.sh --rollback                                                   back to the release before
#
#   --name NAME      name of this device in the topology
#   --role ROLE      node (default), starter or route
#   --wheels DIR     install from the wheels in DIR, without network; else from this checkout, with network
#   --topology FILE  install FILE as topology.yaml
#   --key FILE       install FILE as this device's private key; - reads it from standard input
#   --routes FILE    install FILE as routes.yaml
#   --keys DIR       install the keys of a router: DIR/SERVER.key for each server, and DIR/api.keys of the clients
#   --user           for this user only, without root: ~/.local/lib/mdiq, ~/.config/mdiq, a unit of the user's systemd
#   --prepare        only put the release beside the one that runs; nothing that runs changes
#   --no-start       install, but start nothing
#   --python PYTHON  Python 3.11 to 3.14 to use (default: python3)
#   --dry-run        say what would be done, change nothing
#
# Releases lie side by side: /opt/mdiq/VERSION-DIGEST, with `current` and `previous` as links to them. The digest is that
# of all wheels and units, so a rebuilt wheel of the same version is a release of its own.
set -euo pipefail
umask 022

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
role=node name='' wheels='' topology='' routes='' key='' keys='' python=python3
is_user=false is_dry=false only_prepare=false no_start=false is_rollback=false

say() { echo "install.sh: $*"; }
die() {
  echo "install.sh: $*" >&2
  exit "${status:-2}"
}
run() {
  if $is_dry; then
    echo "would run: $*"
  else
    "$@" || status=1 die "failed: $*"
  fi
}

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

while [ $# -gt 0 ]; do
  case $1 in
    --name | --role | --wheels | --topology | --routes | --key | --keys | --python)
      [ $# -ge 2 ] || die "$1 needs a value"
      option=${1#--}
      printf -v "$option" '%s' "$2"
      shift
      ;;
    --user) is_user=true ;;
    --dry-run) is_dry=true ;;
    --prepare) only_prepare=true ;;
    --no-start) no_start=true ;;
    --rollback) is_rollback=true ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) die "unknown option $1; see install.sh --help" ;;
  esac
  shift
done

case $role in node | starter | route) ;; *) die "--role $role: node or starter, or route" ;; esac
# What the service of this role reads, and its marks: two services may be on one device.
if [ "$role" = route ]; then
  [ -z "$name$topology$key" ] || die "--name, --topology, --key: not of a router; give --routes and --keys"
  file=routes.yaml given=$routes mark=.route
else
  [ -z "$routes$keys" ] || die "--routes, --keys: of a router; give --role route too"
  file=topology.yaml given=$topology mark=
fi
[[ -z $name || $name =~ ^[a-z0-9-]{1,63}$ ]] || die "--name $name: a to z, 0 to 9 and -, at most 63 characters"

if $is_user; then
  config=${XDG_CONFIG_HOME:-$HOME/.config}
  home=$HOME/.local/lib/mdiq etc=$config/mdiq units=$config/systemd/user
  systemctl() { command systemctl --user "$@"; }
else
  home=/opt/mdiq etc=/etc/mdiq units=/etc/systemd/system
  $is_dry || [ "$(id -u)" = 0 ] || die "needs root; or give --user"
fi

# Where systemd has no LoadCredential yet, the key is a file of the service's user instead.
systemd=$(command systemctl --version 2>/dev/null | sed -n '1s/^systemd \([0-9]*\).*/\1/p') || systemd=
[ -n "$systemd" ] || $is_dry || $only_prepare || die "this system has no systemd; start mdiq by hand instead"
has_credentials=true
if [ "${systemd:-0}" -lt 247 ]; then has_credentials=false; fi

is_changed=false
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT

changed() { # what runs is not what is installed, until the unit was restarted: also when this run is cut off
  is_changed=true
  run touch "$home/.changed$mark"
}

put() { # MODE SOURCE TARGET: install a file if it differs; contents are never shown
  if cmp -s "$2" "$3"; then return; fi
  changed
  say "installs $3"
  # Beside its place first: a reader never sees half of it.
  run install -D -m "$1" "$2" "$3.new"
  run mv -f "$3.new" "$3"
}

put_file() { # a device restarts, or reads again, only for what it reads of the file
  local target=$etc/$file needs=restart was=$is_changed is_mild=false of=''
  if cmp -s "$given" "$target"; then return; fi
  if [ "$role" != route ]; then of=$(sed -n 's/^MDIQ_NAME=//p' "$etc/node.env" 2>/dev/null) || true; fi
  if [ -e "$target" ] && [ -n "$of$mark" ] && [ -x "$home/current/bin/mdiq" ]; then
    needs=$("$home/current/bin/mdiq" check --since "$target" --name "$of" "$given" 2>/dev/null) || needs=restart
  fi
  if [ "$needs" != restart ] && [ ! -e "$home/.changed$mark" ]; then
    is_mild=true
    if [ "$needs" = reload ]; then run touch "$home/.reload$mark"; fi # also when this run is cut off
  fi
  put 0644 "$given" "$target"
  if $is_mild; then
    is_changed=$was
    $is_changed || run rm -f "$home/.changed$mark"
  fi
}

link() { # TARGET NAME: point a link at a release, in one step
  run ln -sfn "$1" "$home/$2.new"
  run mv -fT "$home/$2.new" "$home/$2"
}

release_of() { [ ! -L "$home/$1" ] || readlink "$home/$1"; }

find_release() { # sets release and source
  local version
  if [ -n "$wheels" ]; then
    local found=("$wheels"/mdiq-*.whl)
    [ -e "${found[0]}" ] || die "--wheels $wheels: no mdiq-*.whl there; see nodes/README.md for how to fill it"
    [ ${#found[@]} = 1 ] || die "--wheels $wheels: ${#found[@]} wheels of mdiq; leave one"
    version=${found[0]##*/mdiq-}
    version=${version%%-*}
    source=(--no-index --find-links "$wheels" "${found[0]}")
  else
    [ -e "$here/../pyproject.toml" ] || die "this is no checkout of mdiq: give --wheels DIR"
    version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$here/../mdiq/__init__.py")
    source=("$here/..")
  fi
  release=$version-$(digest)
}

digest() {
  if [ -n "$wheels" ]; then (cd "$wheels" && sha256sum -- *.whl); else
    (cd "$here/.." && find mdiq pyproject.toml -type f -not -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum)
  fi >"$stage/sums"
  (cd "$here" && sha256sum -- install.sh README.md systemd/*) >>"$stage/sums"
  sha256sum <"$stage/sums" | cut -c 1-8
}

prepare() {
  if [ -e "$home/$release/.complete" ]; then
    say "release $release is there already"
    return
  fi
  # -I: nothing from the working directory, where it may run as root.
  "$python" -I -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null ||
    die "$python is not Python 3.11 to 3.14 with venv ($("$python" --version 2>&1 | head -n 1)); on Debian: apt install" \
      "python3-venv, or name another with --python"
  say "installs release $release in $home; this takes some minutes on a small device"
  run mkdir -p "$home"
  local free_kb
  free_kb=$(df -Pk "$home" 2>/dev/null | awk 'NR==2{print $4}') || free_kb=
  [ "${free_kb:-2000000}" -ge 2000000 ] ||
    status=1 die "$home: $((free_kb / 1024)) MB are free, and a release needs 2000; make room"
  run rm -rf "${home:?}/$release"
  run "$python" -I -m venv "$home/$release"
  run "$home/$release/bin/pip" install --quiet --disable-pip-version-check --no-input "${source[@]}"
  run "$home/$release/bin/mdiq" --version
  run mkdir -p "$home/$release/nodes"
  run cp -r "$here/install.sh" "$here/README.md" "$here/systemd" "$home/$release/nodes/"
  # Only now is it a release: whatever was cut off before this line is made anew.
  run touch "$home/$release/.complete"
}

unit_files() { # FOLDER: write the units of $role for this kind of install into $stage/units
  rm -rf "$stage/units"
  mkdir -p "$stage/units"
  if $is_user; then
    # A user's systemd may not drop privileges that it does not have, and has no boot to hold up.
    sed -e '/^# Only where root/,/^\[Install\]/{/^\[Install\]/!d}' -e "s#/opt/mdiq#$home#" \
      -e 's/^\(Also\|WantedBy\)=.*/WantedBy=default.target/' -e '/network-online.target/d' \
      "$1/mdiq-$role.service" >"$stage/units/mdiq-$role.service"
  else
    cp "$1/mdiq-$role.service" "$stage/units/"
    if [ "$role" != route ]; then cp "$1/mdiq-$role.timer" "$stage/units/"; fi # a router does not hold up the boot
  fi
}

put_units() { # FOLDER
  local unit
  unit_files "$1"
  local was=$is_changed
  is_changed=false
  for unit in "$stage/units"/*; do put 0644 "$unit" "$units/${unit##*/}"; done
  if $is_changed; then run systemctl daemon-reload; else is_changed=$was; fi
}

put_key() {
  local target=$etc/node.key file=$key
  if [ "$key" = - ]; then
    file=$stage/key
    (umask 077 && cat >"$file")
  fi
  if $has_credentials || $is_user; then
    if [ -n "$key" ]; then put 0600 "$file" "$target"; fi
    # The unit loads the file in any case; mdiq itself says what is missing.
    if [ ! -e "$target" ] && [ -z "$key" ]; then put 0600 /dev/null "$target"; fi
    return
  fi
  [ -n "$key" ] || return 0
  [ -n "$name" ] || die "systemd $systemd knows no credentials: give --name, for the key's place in $etc/keys"
  id -u mdiq >/dev/null 2>&1 || run useradd --system --no-create-home --shell /usr/sbin/nologin mdiq
  put 0600 "$file" "$etc/keys/$name.key"
  run chown -R mdiq: "$etc/keys"
}

put_keys() { # of a router, and a drop-in that hands them to it: it runs as a user of its own
  local file lines=$stage/keys.conf was
  [ -n "$keys" ] || return 0
  echo "[Service]" >"$lines"
  for file in "$keys"/*.key "$keys/api.keys"; do
    [ -e "$file" ] || continue
    put 0600 "$file" "$etc/keys/${file##*/}"
    if $has_credentials; then echo "LoadCredential=${file##*/}:$etc/keys/${file##*/}" >>"$lines"; fi
  done
  if $has_credentials; then
    was=$is_changed is_changed=false
    put 0644 "$lines" "$units/mdiq-route.service.d/keys.conf"
    if $is_changed; then run systemctl daemon-reload; else is_changed=$was; fi
  elif ! $is_user; then
    id -u mdiq >/dev/null 2>&1 || run useradd --system --no-create-home --shell /usr/sbin/nologin mdiq
    run chown -R mdiq: "$etc/keys"
  fi
}

restart() {
  if $no_start; then
    say "is installed; start it with: systemctl start mdiq-$role"
  elif [ ! -e "$etc/$file" ] && ! $is_dry; then
    say "is installed; put the ${file%.yaml} in $etc/$file, then: systemctl start mdiq-$role"
  elif [ -e "$home/.changed$mark" ] || $is_changed || ! is_up; then
    # A node is ready when its ring is: nobody waits for that here.
    run systemctl restart --no-block "mdiq-$role"
    run rm -f "$home/.changed$mark" "$home/.reload$mark"
    say "starts mdiq-$role; systemctl status mdiq-$role shows how far it is"
  elif [ -e "$home/.reload$mark" ]; then
    run systemctl reload --no-block "mdiq-$role"
    run rm -f "$home/.reload$mark"
    say "mdiq-$role reads the ${file%.yaml} again"
  else
    say "mdiq-$role runs, and nothing that it reads has changed"
  fi
}

is_up() { # also while it waits for its ring; not while it has failed, and systemd waits until it tries again
  case $(systemctl is-active "mdiq-$role") in active | activating | reloading) ;; *) return 1 ;; esac
  case $(systemctl show --property SubState --value "mdiq-$role") in auto-restart*) return 1 ;; esac
}

switch() {
  local other=none former
  case $role in node) other=starter ;; starter) other=node ;; esac
  former=$(release_of current)
  if [ "$former" != "$release" ]; then
    changed
    touch_others
    [ -z "$former" ] || link "$former" previous
    link "$release" current
  fi
  if [ -n "$name" ]; then
    echo "MDIQ_NAME=$name" >"$stage/node.env"
    put 0644 "$stage/node.env" "$etc/node.env"
  elif [ "$role" = node ] && [ ! -e "$etc/node.env" ]; then
    die "give --name NAME: the name of this device in the topology"
  fi
  [ -z "$given" ] || put_file
  if [ "$role" = route ]; then put_keys; else put_key; fi
  put_units "$here/systemd"
  if [ -e "$units/mdiq-$other.service" ]; then
    run systemctl disable --now "mdiq-$other"
    run rm -f "$units/mdiq-$other.service" "$units/mdiq-$other.timer"
  fi
  [ -L "$(wanted)" ] || run systemctl enable --quiet "mdiq-$role"
  restart
  restart_others
  prune
}

others() { # roles whose service is on this device too, and runs the same release
  local each
  for each in node starter route; do
    if [ "$each" != "$role" ] && [ -e "$units/mdiq-$each.service" ]; then echo "$each"; fi
  done
}

touch_others() { # what they run is not what is installed any more
  local each
  for each in $(others); do
    if [ "$each" = route ]; then run touch "$home/.changed.route"; else run touch "$home/.changed"; fi
  done
}

restart_others() { # else the release that they run would be removed under them
  local each own="$role" own_mark="$mark" own_file="$file"
  is_changed=false
  for each in $(others); do
    role=$each mark='' file=topology.yaml
    if [ "$each" = route ]; then mark=.route file=routes.yaml; fi
    if [ -e "$home/.changed$mark" ]; then restart; fi
    role=$own
  done
  role=$own mark=$own_mark file=$own_file
}

wanted() { # the link that makes systemd start it
  if $is_user; then
    echo "$units/default.target.wants/mdiq-$role.service"
  elif [ "$role" = route ]; then
    echo "$units/multi-user.target.wants/mdiq-route.service"
  else
    echo "$units/multi-user.target.wants/mdiq-$role.timer"
  fi
}

prune() { # releases that neither runs nor is the one before
  local folder
  for folder in "$home"/*/; do
    folder=${folder%/}
    case ${folder##*/} in
      current | previous | push | "$(release_of current)" | "$(release_of previous)" | '*') ;;
      *) run rm -rf "$folder" ;;
    esac
  done
}

rollback() {
  local former=$1 release=$2
  [ -e "$home/${release:-none}/.complete" ] || status=1 die "there is no release before ${former:-this one}"
  local each
  link "$former" previous
  link "$release" current
  role=none
  for each in $(others); do
    role=$each mark='' file=topology.yaml is_changed=false
    if [ "$each" = route ]; then mark=.route file=routes.yaml; fi
    changed
    put_units "$home/$release/nodes/systemd"
    restart
    role=none
  done
  say "went back from $former to $release; topology, routes and keys are as they were"
}

if $is_rollback; then
  rollback "$(release_of current)" "$(release_of previous)"
  exit
fi
[ -z "$topology" ] || [ -r "$topology" ] || die "--topology $topology: cannot be read"
[ -z "$routes" ] || [ -r "$routes" ] || die "--routes $routes: cannot be read"
[ -z "$keys" ] || [ -d "$keys" ] || die "--keys $keys: no such folder"
[ -z "$key" ] || [ "$key" = - ] || [ -r "$key" ] || die "--key $key: cannot be read"
[ -z "$wheels" ] || wheels=$(cd "$wheels" 2>/dev/null && pwd) || die "--wheels: no such folder"
find_release
prepare
$only_prepare || switch
