"""Self-signed certificates."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def certificate(folder: Path, *hosts: str) -> tuple[Path, Path]:
    """Write a self-signed certificate and its key, both PEM, valid for an hour.

    It is for these host names, or for 127.0.0.1 if there are none.

    Returns: the paths of the certificate and of the key.
    """
    key, now, hour = (
        ec.generate_private_key(ec.SECP256R1()),
        datetime.now(timezone.utc),
        timedelta(hours=1),
    )
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "npair")])
    names: list[x509.GeneralName] = [*map(x509.DNSName, hosts)] or [
        x509.IPAddress(IPv4Address("127.0.0.1"))
    ]
    made = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now - hour, now + hour
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "npair.crt", folder / "npair.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    unencrypted = serialization.NoEncryption()
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, unencrypted
        )
    )
    return paths
