#!/usr/bin/env bash
# Makes a virtual environment and installs this project into it with some extras; does nothing when that is done.
#
#   .ci/venv.sh PYTHON VENV EXTRAS        e.g. .ci/venv.sh python3 .venv train,report
#
# A stamp in the environment, named by the extras and by a checksum of setup.cfg, pyproject.toml and the
# interpreter, says that the work is done, for these extras and any part of them.
set -euo pipefail

python=$1 venv=$2 extras=$3
cd "$(dirname "$0")/.."

say() { printf 'switchmoe: %s\n' "$*" >&2; }

if ! command -v "$python" >/dev/null 2>&1; then
    say "there is no '$python' here; install Python 3.11 or newer, or name another one: make test PYTHON=python3.12"
    exit 1
fi
# One call answers everything: the version, and which interpreter this is whatever the name it was called by.
if ! about=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2], sys.base_prefix, sys.version.split()[0])' 2>&1); then
    say "'$python' does not start: $(tail -n 1 <<<"$about")"
    exit 1
fi
version=${about%% *}
if ((${version%.*} < 3 || (${version%.*} == 3 && ${version#*.} < 11))); then
    say "Python 3.11 or newer is needed and '$python' is $version; name a newer one: make test PYTHON=python3.12"
    exit 1
fi
if [ "$venv" = auto ]; then
    case $python in
        python | python3) venv=.venv ;;
        *) venv=.venv-$version ;;
    esac
fi

checksum=$({ printf '%s\n%s\n' "$about" "$PWD"; cat setup.cfg pyproject.toml; } | cksum | cut -d ' ' -f 1)
stamp=$venv/.switchmoe-$checksum-
installed() { # Whether one of the stamps names every extra that is asked for.
    local file extra
    for file in "$stamp"*; do
        for extra in ${extras//,/ }; do
            [[ ",${file#"$stamp"}," == *",$extra,"* ]] || continue 2
        done
        [ ! -e "$file" ] || return 0
    done
    return 1
}

if ! installed; then
    if [ -e "$venv" ]; then
        has=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo broken)
        if [ "$has" != "$version" ]; then
            if compgen -G "$venv/.switchmoe-*" >/dev/null; then
                say "$venv was made for another Python ($has); making it anew for $version"
                rm -r "$venv"
            else
                say "$venv holds Python $has, not $version, and was not made here; remove it or name another: VENV=DIR"
                exit 1
            fi
        fi
    fi
    if [ ! -e "$venv" ]; then
        say "making $venv with Python $version"
        if ! "$python" -m venv "$venv"; then
            rm -rf "$venv"
            say "'$python -m venv' failed; on Debian and Ubuntu install the package python$version-venv"
            exit 1
        fi
    fi
    say "installing switchmoe[$extras] into $venv (a few minutes the first time)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
    # Stamps of an older setup.cfg go, so that going back to it installs again.
    find "$venv" -maxdepth 1 -name '.switchmoe-*' ! -name ".switchmoe-$checksum-*" -delete
    touch "$stamp$extras"
fi
printf '%s\n' "$venv"
