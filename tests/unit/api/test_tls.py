"""Refuse files for TLS that Triton could not use, and say which."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from supervisor.options import Options
from supervisor.preflight import ServeError
from supervisor.tls import grpc_tls
from support.tls import certificate


@pytest.fixture
def options(tmp_path: Path) -> Options:
    cert, key = certificate(tmp_path)
    return Options(grpc_cert=str(cert), grpc_key=str(key), grpc_client_ca=str(cert))


def test_files_that_fit(options: Options) -> None:
    assert grpc_tls(options) == {
        "--grpc-server-cert": options.grpc_cert,
        "--grpc-server-key": options.grpc_key,
        "--grpc-root-cert": options.grpc_client_ca,
        "--grpc-use-ssl-mutual": "true",
    }
    assert grpc_tls(Options()) == {}


def refused(options: Options) -> str:
    with pytest.raises(ServeError) as caught:
        grpc_tls(options)
    return str(caught.value)


def test_key_of_another_certificate(options: Options, tmp_path: Path) -> None:
    (tmp_path / "another").mkdir()
    _, key = certificate(tmp_path / "another")
    Path(options.grpc_key).write_bytes(key.read_bytes())
    reason = refused(options)
    assert options.grpc_cert in reason
    assert options.grpc_key in reason
    assert "KEY_VALUES_MISMATCH" in reason
    assert "set GRPC_TLS_CERT to" in reason


def test_key_in_place_of_a_certificate(options: Options) -> None:
    Path(options.grpc_cert).write_bytes(Path(options.grpc_key).read_bytes())
    assert f"cannot use the certificate {options.grpc_cert}" in refused(options)


def test_encrypted_key(options: Options) -> None:
    key = serialization.load_pem_private_key(Path(options.grpc_key).read_bytes(), None)
    Path(options.grpc_key).write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    assert f"GRPC_TLS_KEY): {options.grpc_key} is encrypted" in refused(options)


def test_authorities_without_a_certificate(options: Options, tmp_path: Path) -> None:
    authorities = Path(options.grpc_client_ca).rename(tmp_path / "ca.pem")
    Path(options.grpc_cert).write_bytes(authorities.read_bytes())
    authorities.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    reason = refused(
        Options(
            grpc_cert=options.grpc_cert, grpc_key=options.grpc_key, grpc_client_ca=str(authorities)
        )
    )
    assert f"GRPC_TLS_CLIENT_CA): {authorities} has no certificate that can be read" in reason


def test_folder_in_place_of_a_file(options: Options) -> None:
    Path(options.grpc_key).unlink()
    Path(options.grpc_key).mkdir()
    assert re.search(r"GRPC_TLS_KEY\) cannot be read: .*: Is a directory; name", refused(options))
