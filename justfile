# All tasks of the project. `just` lists them.

set positional-arguments

export PATH := justfile_directory() / ".venv/bin:" + env("PATH")

_list:
    @just --list --unsorted

# Install the tools of the recipes below, as root: Debian packages, Python packages in .venv, Rust's arm64 target; `setup emulation`: also those of arm64
setup *EMULATION:
    python3 -c 'import ensurepip, venv' 2>/dev/null || apt-get install -y -qq --no-install-recommends python3-venv
    [ -x .venv/bin/pip ] || python3 -m venv .venv
    pip install --quiet --upgrade pip && pip install --quiet --group e2e
    missing=$(PYTHONPATH=tests/e2e python3 -m support.tools {{ EMULATION }}); [ -z "$missing" ] || { apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing >/dev/null; }
    rustup target add --toolchain "$(rustup show active-toolchain | cut -d' ' -f1)" aarch64-unknown-linux-gnu

# Format Rust, and Python where Ruff is installed
fmt:
    cargo fmt
    cargo fmt --manifest-path fuzz/Cargo.toml
    cargo fmt --manifest-path benches/compare/floor/Cargo.toml
    ! command -v ruff >/dev/null || { ruff format . $(just _scripts python3); ruff check --fix . $(just _scripts python3); }

# Check formats, lints and docs; also Python, scripts and dependencies if their tools are installed
lint: _lint-others docs
    cargo fmt --check
    cargo fmt --check --manifest-path fuzz/Cargo.toml
    cargo fmt --check --manifest-path benches/compare/floor/Cargo.toml
    cargo clippy --locked --all-targets -- -D warnings

# Build the documentation of the code
docs:
    RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --quiet

_lint-others:
    #!/usr/bin/env bash
    set -euo pipefail
    # Skip a check whose tool is not installed, and report it. In CI a missing tool is an error.
    with() {
        if command -v "$1" >/dev/null; then "$@"
        elif [ -n "${CI:-}" ]; then echo "$1 is missing: just setup" >&2; exit 1
        else echo "$1 is missing (just setup), so this check is skipped: $2" >&2; fi
    }
    python=$(just _scripts python3)
    with ruff format --check . $python
    with ruff check . $python
    with shellcheck $(just _scripts bash) $(just _scripts sh)
    with cargo-deny --offline --locked check --hide-inclusion-graph bans licenses sources

# List the scripts whose first line names this interpreter
_scripts INTERPRETER:
    @git grep --files-with-matches --extended-regexp '^#!(/usr/bin/env |/bin/){{ INTERPRETER }}$'

# Run the Rust tests (arguments go to cargo test)
test *ARGS:
    cargo test --locked "$@"

# Run the end-to-end tests (arguments go to pytest, such as -k reload)
e2e *ARGS:
    pytest "$@"

# Run the soak test for MINUTES (further arguments: --seed N, --plot)
soak MINUTES *ARGS:
    PYTHONPATH=tests/e2e python3 -m support.soak "$@"

# Test the package for arm64 on a booted Debian, on an emulated processor (arguments go to pytest)
arm64 *ARGS: (deb "arm64")
    pytest --emulated tests/e2e/test_arm64.py "$@"

# Run the Rust tests on slow sockets: MODE is delay or short (further arguments go to cargo test)
slow MODE *ARGS:
    #!/usr/bin/env bash
    set -euo pipefail
    mkdir -p target/slow
    cc -O1 -Wall -Wextra -Werror -shared -fPIC -o target/slow/slow.so tests/common/slow.c
    export SLOW=$1 SLOW_SEED=${SLOW_SEED:-$RANDOM}
    echo "SLOW_SEED=$SLOW_SEED"
    # slow.so can slow down only calls that go through the C library.
    LD_PRELOAD=$PWD/target/slow/slow.so cargo test --locked --target-dir target/slow \
        --config "target.'cfg(target_os = \"linux\")'.rustflags = ['--cfg=rustix_use_libc']" "${@:2}"

# Run the fuzz targets (arguments go to fuzz/run)
fuzz *ARGS:
    fuzz/run "$@"

# Compare the cost of a request with other servers (arguments go to benches/compare/run)
bench *ARGS:
    benches/compare/run "$@"

# Check that no kind of request takes more instructions than benches/compare/gate.toml allows
gate *ARGS:
    benches/compare/run --gate "$@"

# Build the Debian packages
deb *ARCHITECTURES='amd64 arm64':
    for architecture in {{ ARCHITECTURES }}; do packaging/build-deb "$architecture"; done

# Add the packages to a signed apt repository (arguments: its directory, then other packages than those in target/debian)
apt-repository DIR *PACKAGES:
    packaging/apt-repository "$@"

# Build the container image (arguments: amd64 or arm64, then options for buildah)
image *ARGS:
    packaging/build-image "$@"

# Build the files of a release, and verify them
release-check:
    packaging/release-check

# Run all checks that must pass before a change is merged
ci:
    .ci/jobs
