"""A server that is not ours: TLS, user and password, and a .creds file (JWT) are passed through."""

import base64
import datetime
import hashlib
import ipaddress
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nkeys
import pytest
from aiirwkv import Bus, Embed, ServerError
from aiirwkv.config import BusConfig, Config, Use
from aiirwkv.plugins import Registry
from aiirwkv.server import binary
from aiirwkv.testing import Fake
from aiirwkv.worker import serving
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@contextmanager
def server(tmp_path: Path, settings: str) -> Iterator[str]:
    """nats-server with these settings; yields host:port."""
    conf = tmp_path / "nats.conf"
    conf.write_text(
        f'host: 127.0.0.1\nport: -1\nports_file_dir: "{tmp_path}"\n'
        f'jetstream {{ store_dir: "{tmp_path}/js" }}\n{settings}'
    )
    process = subprocess.Popen([binary(), "-c", str(conf), "-l", str(tmp_path / "log")])
    try:
        end = time.monotonic() + 10
        while not (found := [path for path in tmp_path.glob("*.ports") if path.stat().st_size]):
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.02)
        yield json.loads(found[0].read_text())["nats"][0].partition("://")[2]
    finally:
        process.terminate()
        process.wait()


async def works(config: BusConfig) -> None:
    """A worker serves and runs a job over this server, and a client asks it."""
    async with Bus.connect(config) as own, Bus.connect(config) as bus:
        registry = Registry()
        registry.add("fake", Fake().attach(Path(), own))
        async with serving(own, registry, Config(use=Use(embed="fake")), "remote"):
            assert (await bus.call(Embed(["abc"]))).dim == 26
            job = await bus.submit(Embed(["abc"]))
            async with bus.follow(job.id) as changes:
                assert [change async for change in changes][-1].state == "done"


def certificate(tmp_path: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    pem, secret = tmp_path / "cert.pem", tmp_path / "key.pem"
    pem.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pem, secret


async def test_tls_with_user_and_password(tmp_path: Path) -> None:
    pem, key = certificate(tmp_path)
    settings = f'tls {{ cert_file: "{pem}", key_file: "{key}" }}\nauthorization {{ user: ann, password: secret }}\n'
    with server(tmp_path, settings) as host:
        good = BusConfig(url=f"tls://{host}", user="ann", password="secret", tls_ca=str(pem))
        await works(good)
        with pytest.raises(ServerError, match=r"cannot reach the bus at tls://127\.0\.0\.1:\d+: .*uthorization"):
            async with Bus.connect(BusConfig(url=f"tls://{host}", user="ann", password="wrong", tls_ca=str(pem))):
                pass
        with pytest.raises(ServerError, match="certificate"):
            async with Bus.connect(BusConfig(url=f"tls://{host}", user="ann", password="secret")):
                pass
        with pytest.raises(ServerError, match="tls_ca, tls_cert or tls_key cannot be used"):
            async with Bus.connect(BusConfig(url=f"tls://{host}", tls_ca=str(tmp_path / "nowhere.pem"))):
                pass


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def jwt(issuer: nkeys.KeyPair, subject: nkeys.KeyPair, name: str, nats: dict[str, object]) -> str:
    """A NATS JWT (https://github.com/nats-io/jwt), version 2."""
    claims: dict[str, object] = {
        "iat": int(time.time()),
        "iss": issuer.public_key.decode(),
        "sub": subject.public_key.decode(),
        "name": name,
        "nats": nats | {"version": 2},
    }
    claims["jti"] = base64.b32encode(hashlib.sha256(json.dumps(claims).encode()).digest()).decode().rstrip("=")
    head = b64(json.dumps({"typ": "JWT", "alg": "ed25519-nkey"}).encode())
    body = b64(json.dumps(claims).encode())
    return f"{head}.{body}.{b64(issuer.sign(f'{head}.{body}'.encode()))}"


def pair(prefix: int) -> nkeys.KeyPair:
    return nkeys.from_seed(nkeys.encode_seed(os.urandom(32), prefix))


async def test_a_creds_file(tmp_path: Path) -> None:
    operator, account, user = (
        pair(nkeys.PREFIX_BYTE_OPERATOR),
        pair(nkeys.PREFIX_BYTE_ACCOUNT),
        pair(nkeys.PREFIX_BYTE_USER),
    )
    free = {"subs": -1, "data": -1, "payload": -1}
    storage = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
    space = free | storage | {"imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
    system = pair(nkeys.PREFIX_BYTE_ACCOUNT)
    system_jwt = jwt(operator, system, "system", {"type": "account", "limits": space | dict.fromkeys(storage, 0)})
    operator_jwt = jwt(operator, operator, "operator", {"type": "operator"})
    account_jwt = jwt(operator, account, "account", {"type": "account", "limits": space})
    user_jwt = jwt(account, user, "user", {"type": "user", "pub": {}, "sub": {}, **free})
    creds = tmp_path / "user.creds"
    creds.write_text(
        f"-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
    )
    settings = (
        f"operator: {operator_jwt}\nresolver: MEMORY\nsystem_account: {system.public_key.decode()}\n"
        f"resolver_preload: {{ {account.public_key.decode()}: {account_jwt}\n"
        f"{system.public_key.decode()}: {system_jwt} }}\n"
    )
    with server(tmp_path, settings) as host:
        await works(BusConfig(url=f"nats://{host}", credentials=str(creds)))
        with pytest.raises(ServerError, match="cannot reach the bus"):
            async with Bus.connect(BusConfig(url=f"nats://{host}")):
                pass
