"""TLS for gRPC: the files are checked here, since Triton's own reasons name none of them."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from supervisor.preflight import ServeError

if TYPE_CHECKING:
    from supervisor.options import Options


def grpc_tls(options: Options) -> dict[str, str]:
    """Triton's flags for TLS, none without a certificate.

    Raises: ServeError if a file is missing, cannot be read or does not fit the others.
    """
    files = {
        "--grpc-server-cert": ("--grpc-cert (GRPC_TLS_CERT)", options.grpc_cert),
        "--grpc-server-key": ("--grpc-key (GRPC_TLS_KEY)", options.grpc_key),
        "--grpc-root-cert": ("--grpc-client-ca (GRPC_TLS_CLIENT_CA)", options.grpc_client_ca),
    }
    given = {flag: path for flag, (_, path) in files.items() if path}
    if not given:
        return {}
    for flag in ("--grpc-server-cert", "--grpc-server-key"):
        if flag not in given:
            raise ServeError(
                f"TLS for gRPC needs a certificate and its key: set {files[flag][0]} as well"
            )
    for flag, path in given.items():
        check_pem(files[flag][0], Path(path))
    check_pair(options.grpc_cert, options.grpc_key)
    if options.grpc_client_ca:
        check_authorities(options.grpc_client_ca)
    return {**given, f"--grpc-use-ssl{'-mutual' if options.grpc_client_ca else ''}": "true"}


def check_pem(option: str, path: Path) -> None:
    """Raises: ServeError if this is no unencrypted PEM file that can be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ServeError(
            f"{option} cannot be read: {path}: {error.strerror}; "
            f"name a file that user {os.getuid()} may read"
        ) from error
    if b"-----BEGIN " not in content:
        raise ServeError(f"{option}: {path} is not PEM; convert it with openssl")
    if b"ENCRYPTED" in content:
        raise ServeError(
            f"{option}: {path} is encrypted, and Triton takes no passphrase; "
            "decrypt it with openssl pkey"
        )


def check_pair(certificate: str, key: str) -> None:
    """Raises: ServeError if the key is not the certificate's."""
    try:
        context().load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise ServeError(
            f"TLS for gRPC cannot use the certificate {certificate} with the key {key}: "
            f"{error.reason or error}; "
            "set GRPC_TLS_CERT to a certificate (chain) and GRPC_TLS_KEY to its own key"
        ) from error


def check_authorities(path: str) -> None:
    """Raises: ServeError if the file has no certificate."""
    try:
        context().load_verify_locations(path)
    except ssl.SSLError as error:
        raise ServeError(
            f"--grpc-client-ca (GRPC_TLS_CLIENT_CA): {path} has no certificate that can be read: "
            f"{error.reason or error}"
        ) from error


def context() -> ssl.SSLContext:
    """A context that reads any certificate: how strong it must be is for Triton to say."""
    lenient = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    lenient.set_ciphers("ALL:@SECLEVEL=0")
    return lenient
