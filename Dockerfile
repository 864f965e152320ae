# The container image: one static binary in an empty file system. There is no shell, no package and no library to patch.
# `docker build -t key-service .` is enough. packaging/build-image adds the date and the revision of the commit, so the
# same commit gives the same file system wherever it is built.

# The compiler. Its Debian release determines the C library that is linked in. The name may include a digest.
ARG RUST_IMAGE=docker.io/library/rust:1.95.0-slim-trixie

# Always for the builder's own architecture: other architectures are cross-compiled, not emulated.
FROM --platform=$BUILDPLATFORM ${RUST_IMAGE} AS build
WORKDIR /build/key-service

# cargo-auditable puts the list of all crates into the binary (section .dep-v0), for scanners such as cargo-audit.
RUN cargo install cargo-auditable --locked --version 0.7.7

# Flags go to a file above the project's own .cargo/config.toml, because cargo joins the two. RUSTFLAGS would replace the
# project's flag for getrandom(2).
ARG TARGETARCH
# hadolint ignore=DL3008
RUN set -eu; \
    case "$TARGETARCH" in \
        amd64) target=x86_64-unknown-linux-gnu linker=x86_64-linux-gnu-gcc \
            compiler=gcc-x86-64-linux-gnu libc=libc6-dev-amd64-cross ;; \
        arm64) target=aarch64-unknown-linux-gnu linker=aarch64-linux-gnu-gcc \
            compiler=gcc-aarch64-linux-gnu libc=libc6-dev-arm64-cross ;; \
        *) echo "expected the architecture amd64 or arm64, found $TARGETARCH" >&2; exit 2 ;; \
    esac; \
    if ! command -v "$linker" >/dev/null; then \
        apt-get update; \
        apt-get install --yes --no-install-recommends "$compiler" "$libc"; \
        rm -rf /var/lib/apt/lists/*; \
    fi; \
    rustup target add "$target"; \
    mkdir ../.cargo; \
    printf '[build]\ntarget = "%s"\n[target.%s]\nlinker = "%s"\nrustflags = ["-Ctarget-feature=+crt-static"]\n' \
        "$target" "$target" "$linker" >../.cargo/config.toml

COPY . .
# The file and the C code get the time of the commit. Otherwise the image would depend on the time of the build.
ARG SOURCE_DATE_EPOCH=0
# The commit and its date, for `key-service --version`: the sources come without their repository.
ARG REVISION=
ARG CREATED=
# The image tests use another profile, which builds in a fraction of the time.
ARG PROFILE=release
RUN KEY_SERVICE_COMMIT="$REVISION" KEY_SERVICE_COMMIT_DATE="${CREATED%T*}" \
    cargo auditable build --profile "$PROFILE" --locked
RUN install -D --mode=755 target/*/"$PROFILE"/key-service /out/key-service \
    && touch --date="@$SOURCE_DATE_EPOCH" /out/key-service

FROM scratch
COPY --from=build /out/key-service /key-service
# A number, because there is no /etc/passwd, and because Kubernetes can verify that a user is not root only by its number.
USER 65532:65532
EXPOSE 1123 8000
STOPSIGNAL SIGTERM
# The check takes its address from the variables and the file; it does not know the daemon's arguments. Connecting, sending
# the request and reading the response may take 2 s each.
HEALTHCHECK --interval=30s --timeout=7s --start-period=5s --retries=3 CMD ["/key-service", "health"]
ENTRYPOINT ["/key-service"]

ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
ARG SOURCE=
ARG DOCUMENTATION=
LABEL org.opencontainers.image.title="key-service" \
      org.opencontainers.image.description="Small Unix daemon that issues cryptographically secure random keys over HTTP" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.created="$CREATED" \
      org.opencontainers.image.source="$SOURCE" \
      org.opencontainers.image.documentation="$DOCUMENTATION"
