"""Certificates for the tests. Each run creates its own, and none is kept."""

import subprocess


def self_signed(key, certificate, subject="/CN=keys", names=None, *options):
    """Creates a private key that only its owner can read, and a self-signed certificate that is valid for a day, by openssl-req(1).
    `names` is its subjectAltName."""
    alternative = ["-addext", f"subjectAltName={names}"] if names else []
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "1",
            "-subj",
            subject,
            *alternative,
            *options,
            "-keyout",
            key,
            "-out",
            certificate,
        ],
        check=True,
        capture_output=True,
    )
    key.chmod(0o600)
