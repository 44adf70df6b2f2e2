#!/usr/bin/env bash
# Prepares the project's own environment (.venv, from the lock with its hashes) and runs `gateway COMMAND`.
#   ./run.sh demo             any gateway command; with none, `serve`
#   ./run.sh test [ARGS]      the tests, in five processes whatever pytest is asked for (`-n 0`: in one)
#   ./run.sh test fast        those that start no process and no gateway
#   ./run.sh bench [ARGS]     the gateway's speed beside bare mitmdump's (--help says what can be chosen)
#   ./run.sh lint             ruff and mypy
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
venv="$root/.venv"
unset PYTHONDONTWRITEBYTECODE  # pip makes no bytecode for -O: where it may not be kept, each start compiles everything anew, 2.6 s

# Finds the newest Python that the locks are made for. Executes each candidate: a name on the PATH may be a shim that finds
# no version behind it, and Debian's has no pip of its own without python3-venv.
find_python() {
  local candidate version newest=0 found=
  for candidate in python3.14 python3.13 python3.12 python3 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-4]*/bin/python3 \
    "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}"/cpython-3.1[2-4]*/bin/python3; do
    version="$("$candidate" -c '
import ensurepip, sqlite3, ssl, sys, sysconfig
if (3, 12) <= sys.version_info < (3, 15) and sys.version_info.releaselevel == "final" and not sysconfig.get_config_var("Py_GIL_DISABLED"):
    print("%d%02d%02d" % sys.version_info[:3])' 2>/dev/null)" || continue
    if [ "${version:-0}" -gt "$newest" ]; then newest="$version" found="$candidate"; fi
  done
  if [ -n "$found" ]; then echo "$found"; return; fi
  echo "The gateway needs Python 3.12, 3.13 or 3.14 and found none; install it (apt install python3.13-venv, brew install python@3.13, or uv python install 3.13) and run this again." >&2
  exit 2
}

# Installs each lock once, and again only when it changes. A file lock makes a second run wait for the first one's work.
prepare() {
  local python="$venv/bin/python"
  "$python" -c '' >/dev/null 2>&1 || python="$(find_python)"
  "$python" - "$root" "$@" <<'PYTHON'
import fcntl, hashlib, pathlib, subprocess, sys, venv

root, locks = pathlib.Path(sys.argv[1]), sys.argv[2:]
home = root / ".venv"
python = home / "bin" / "python"


def wanted(lock):
    return f"{hashlib.sha256((root / lock).read_bytes()).hexdigest()} {root}"


def missing():
    stamps = {lock: home / f"installed-{lock.replace('/', '-')}" for lock in locks}
    return {lock: stamp for lock, stamp in stamps.items() if not stamp.exists() or stamp.read_text() != wanted(lock)}


def run(*arguments):
    done = subprocess.run([python, *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else sys.exit(f"{done.stderr}\nThe environment could not be prepared: the lines above say why.")


def install(lock):
    """Show on a terminal how far pip is, counted in packages; where it fails, its last lines."""
    total, count, said = sum("==" in line for line in (root / lock).read_text().splitlines()), 0, []
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", "--require-hashes", "-r", root / lock]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        for line in pip.stdout:
            said = [*said[-9:], line]
            count += line.startswith(("Collecting ", "Processing ", "Ignoring ", "Requirement already satisfied: "))
            if line.startswith(("Collecting ", "Processing ")):
                show(f"  {count} of {total}: {line.split()[1].rpartition('/')[2]}")
            elif line.startswith("Installing "):
                show("  unpacking all of them")
    show("")
    if pip.returncode:
        sys.exit(f"{''.join(said)}\nThe environment could not be prepared: the lines above say why.")


def show(line):
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


if missing():
    with open(root / ".venv.lock", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for lock, stamp in missing().items():
            print(f"Installing {lock} (once) ...", file=sys.stderr)
            if not python.exists() or subprocess.run([python, "-c", "import pip"], capture_output=True).returncode:
                venv.create(home, with_pip=True, clear=True)
            install(lock)
            site = run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
            pathlib.Path(site, "gateway_addon.pth").write_text(f"{root}\n")
            stamp.write_text(wanted(lock))
PYTHON
}

case "${1:-serve}" in
  test)
    prepare requirements.lock tests/requirements.lock
    cd "$root"
    if [ "${2:-}" = fast ]; then set -- test --fast "${@:3}"; fi
    # The suite mostly waits for clocks and sockets: five processes of it share two cores well.
    exec "$venv/bin/python" -m pytest -n 5 --dist worksteal "${@:2}"
    ;;
  bench)
    prepare requirements.lock tests/requirements.lock
    exec "$venv/bin/python" "$root/tests/bench" "${@:2}"
    ;;
  lint)
    prepare requirements.lock tests/requirements.lock
    cd "$root"
    "$venv/bin/python" -m ruff check .
    exec "$venv/bin/python" -m mypy
    ;;
  *)
    prepare requirements.lock
    if [ $# -eq 0 ]; then set -- serve; fi
    case "$0" in */*) typed="$0" ;; *) typed="./$0" ;; esac
    case "$typed" in *[{}]*) typed="./run.sh" ;; esac  # sentences have places in braces
    export GATEWAY_COMMAND="$(printf %q "$typed")"  # hints name the command that was typed
    # -O leaves out mitmproxy's checks of its own types at every message: an eighth of all that a call costs.
    exec "$venv/bin/python" -O -m gateway_addon "$@"
    ;;
esac
