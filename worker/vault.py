"""The vault: seals API keys for the database and tells two equal keys without keeping either.

An envelope is `v1.<key_id>.<nonce>.<ciphertext>` in base64url without padding: AES-256-GCM under the master
key `key_id`, with the version, key id, tenant and connector as associated data, so that a sealed key moved to
another row does not open.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import SecretStr

from worker.errors import ContractBroken, Misconfigured, Refused

_VERSION: Final = "v1"
_KEY_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_FINGERPRINT_INFO: Final = b"rollcall fingerprint v1"


class UnknownVaultKey(Misconfigured):
    """Sealed keys need master keys that the ring does not hold; `key_ids` names them, sorted."""

    def __init__(self, *key_ids: str) -> None:
        super().__init__(
            "vault_key_unknown",
            f"sealed keys need the unknown key_id {', '.join(sorted(key_ids))}: "
            "add it to ROLLCALL_VAULT_KEYS again, behind the first",
        )
        self.key_ids = tuple(sorted(key_ids))


class TamperedEnvelope(ContractBroken):
    """An envelope that is damaged, or sealed for another tenant or connector."""

    def __init__(self) -> None:
        super().__init__("vault_envelope_tampered", "a sealed key does not open: reconnect with the API key")


class Vault:
    """A ring of master keys: the first seals, all open.

    Args:
        ring: `id:base64key[,id:base64key...]`, each key 32 bytes, ids of letters, digits, `_` and `-`.

    Raises:
        Misconfigured: naming the position of the wrong entry, never its text.

    """

    def __init__(self, ring: SecretStr) -> None:
        keys: dict[str, bytes] = {}
        for position, entry in enumerate(ring.get_secret_value().split(","), start=1):
            key_id, key = _parse(entry.strip(), position)
            if key_id in keys:
                raise _wrong(position, "its key_id stands before")
            keys[key_id] = key
        self._ciphers = {key_id: AESGCM(key) for key_id, key in keys.items()}
        self._fingerprint_keys = [
            HKDF(SHA256(), _KEY_BYTES, salt=None, info=_FINGERPRINT_INFO).derive(key) for key in keys.values()
        ]

    def __repr__(self) -> str:
        return f"Vault({', '.join(self.key_ids)})"

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The ring's key ids; the first one seals."""
        return tuple(self._ciphers)

    def seal(self, secret: SecretStr, *, tenant_id: str, connector_id: UUID | str) -> str:
        """Seal an API key for one connector of one tenant; each call gives another envelope."""
        key_id = self.key_ids[0]
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._ciphers[key_id].encrypt(
            nonce, secret.get_secret_value().encode(), _associated(key_id, tenant_id, str(connector_id))
        )
        return ".".join((_VERSION, key_id, _encode(nonce), _encode(sealed)))

    def open(self, envelope: str, *, tenant_id: str, connector_id: UUID | str) -> SecretStr:
        """Open an envelope sealed for the same tenant and connector.

        Raises:
            UnknownVaultKey: the ring lacks the master key.
            TamperedEnvelope: anything else is wrong with it.

        """
        key_id, nonce, sealed = _split(envelope)
        if key_id not in self._ciphers:
            raise UnknownVaultKey(key_id)
        try:
            plain = self._ciphers[key_id].decrypt(nonce, sealed, _associated(key_id, tenant_id, str(connector_id)))
        except InvalidTag:
            raise TamperedEnvelope from None
        return SecretStr(plain.decode())

    def needs_resealing(self, envelope: str) -> bool:
        """Tell whether an envelope was sealed by another key than the first. Raises TamperedEnvelope."""
        return key_id_of(envelope) != self.key_ids[0]

    def check_known(self, key_ids_in_use: Iterable[str]) -> None:
        """Raise UnknownVaultKey naming every key id in use that the ring lacks."""
        if unknown := set(key_ids_in_use).difference(self.key_ids):
            raise UnknownVaultKey(*unknown)

    def fingerprint(self, secret: SecretStr) -> str:
        """Give the fingerprint to store: 64 hex digits under the first key, equal for equal API keys."""
        return self.fingerprints(secret)[0]

    def fingerprints(self, secret: SecretStr) -> tuple[str, ...]:
        """Give a fingerprint under each key of the ring, the first one's first, to look for stored ones."""
        text = secret.get_secret_value().encode()
        return tuple(hmac.new(key, text, hashlib.sha256).hexdigest() for key in self._fingerprint_keys)

    @staticmethod
    def generate_key(key_id: str) -> str:
        """Make a new ring entry `key_id:base64key`; it is a secret. Raises Refused for a malformed id."""
        if not _KEY_ID.fullmatch(key_id):
            raise Refused("vault_key_id_malformed", "a key_id has 1 to 64 letters, digits, _ or -")
        return f"{key_id}:{_encode(os.urandom(_KEY_BYTES))}"


def key_id_of(envelope: str) -> str:
    """Name the master key an envelope was sealed with. Raises TamperedEnvelope."""
    return _split(envelope)[0]


def _parse(entry: str, position: int) -> tuple[str, bytes]:
    key_id, colon, text = entry.partition(":")
    if not colon or not _KEY_ID.fullmatch(key_id):
        raise _wrong(position, "must be id:base64key, the id of letters, digits, _ or -")
    try:
        key = _decode(text.replace("+", "-").replace("/", "_").rstrip("="))
    except ValueError:
        raise _wrong(position, "its key is not base64") from None
    if len(key) != _KEY_BYTES:
        raise _wrong(position, f"its key has {len(key)} bytes, not {_KEY_BYTES}")
    return key_id, key


def _wrong(position: int, what: str) -> Misconfigured:
    return Misconfigured("vault_keys_malformed", f"ROLLCALL_VAULT_KEYS: entry {position}: {what}")


@lru_cache(maxsize=1024)
def _split(envelope: str) -> tuple[str, bytes, bytes]:
    """Take an envelope apart; it is opened for each part of a connector, one after the other."""
    version, _, rest = envelope.partition(".")
    key_id, *texts = rest.split(".")
    if version != _VERSION or not _KEY_ID.fullmatch(key_id) or len(texts) != 2:  # noqa: PLR2004 - nonce, ciphertext
        raise TamperedEnvelope
    try:
        nonce, sealed = (_decode(text) for text in texts)
    except ValueError:
        raise TamperedEnvelope from None
    if len(nonce) != _NONCE_BYTES:
        raise TamperedEnvelope
    return key_id, nonce, sealed


def _associated(*pieces: str) -> bytes:
    # Each piece after its length: ("ab", "c") and ("a", "bc") must not bind alike.
    encoded = [piece.encode() for piece in (_VERSION, *pieces)]
    return b"".join(len(piece).to_bytes(4, "big") + piece for piece in encoded)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if _encode(data) != text:  # the last letter's spare bits would let a changed text pass
        raise ValueError
    return data
