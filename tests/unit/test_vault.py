"""The vault: what is sealed opens for its own row only, and nothing tells a key."""

from __future__ import annotations

import base64
import traceback
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from worker.errors import ContractBroken, Misconfigured, Refused
from worker.vault import TamperedEnvelope, UnknownVaultKey, Vault, key_id_of

MAIN = "main:" + base64.b64encode(bytes(range(32))).decode()
OLD = "old-1:" + base64.urlsafe_b64encode(bytes(range(223, 255))).decode().rstrip("=")
VAULT = Vault(SecretStr(MAIN))
ROTATED = Vault(SecretStr(f"{OLD}, {MAIN}"))
CONNECTOR = UUID("7d5a3c52-0d0c-4f5e-9a3b-111111111111")
KEY = SecretStr("sk_" + "0123456789abcdef" * 3)
PINNED = "aff3c83a68c7029c0a248e0569d82b05bcbf4ef9a83ef59182f4a2e86f0e7f5a"
SEALED = "v1.main.HhwOTNwk_fQOXTO1.BUrdrvGDd_2a6d1bc7Pxth3j3fWhOcdn9A"

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(secret=names, tenant=names, connector=st.uuids())
def test_what_is_sealed_opens(secret: str, tenant: str, connector: UUID) -> None:
    """Any secret opens again for the same tenant and connector, and stands nowhere in the envelope."""
    envelope = VAULT.seal(SecretStr(secret), tenant_id=tenant, connector_id=connector)
    assert VAULT.open(envelope, tenant_id=tenant, connector_id=str(connector)).get_secret_value() == secret
    assert envelope.startswith("v1.main.")
    assert envelope.count(".") == 3
    assert "=" not in envelope


@given(rows=st.tuples(st.tuples(names, names), st.tuples(names, names)).filter(lambda rows: rows[0] != rows[1]))
def test_another_row_does_not_open_it(rows: tuple[tuple[str, str], tuple[str, str]]) -> None:
    """An envelope does not open for any other pair of tenant and connector."""
    (tenant, connector), (other_tenant, other_connector) = rows
    envelope = VAULT.seal(KEY, tenant_id=tenant, connector_id=connector)
    with pytest.raises(TamperedEnvelope):
        VAULT.open(envelope, tenant_id=other_tenant, connector_id=other_connector)


@given(cut=st.integers(0, 6), other=st.integers(0, 6))
def test_the_border_between_tenant_and_connector_counts(cut: int, other: int) -> None:
    """Moving letters between tenant and connector id is another row, though the joined text is the same."""
    text = "abcdef"
    envelope = VAULT.seal(KEY, tenant_id=text[:cut], connector_id=text[cut:])
    if cut == other:
        assert VAULT.open(envelope, tenant_id=text[:other], connector_id=text[other:]) == KEY
    else:
        with pytest.raises(TamperedEnvelope):
            VAULT.open(envelope, tenant_id=text[:other], connector_id=text[other:])


@given(data=st.data())
def test_any_flipped_bit_is_found(data: st.DataObject) -> None:
    """One flipped bit anywhere in the envelope is an error, never another secret."""
    envelope = ROTATED.seal(KEY, tenant_id="t", connector_id=CONNECTOR)
    at = data.draw(st.integers(0, len(envelope) - 1))
    flipped = chr(ord(envelope[at]) ^ (1 << data.draw(st.integers(0, 7))))
    with pytest.raises((TamperedEnvelope, UnknownVaultKey)):
        ROTATED.open(envelope[:at] + flipped + envelope[at + 1 :], tenant_id="t", connector_id=CONNECTOR)


@given(text=st.text(max_size=80))
def test_nonsense_is_tampered(text: str) -> None:
    """Text that never was an envelope raises TamperedEnvelope, whatever it is."""
    for envelope in (text, f"v1.main.{text}", f"v1.main.AAAA.{text}", f"v1.main.AAAAAAAAAAAAAAAA.{text}"):
        with pytest.raises(TamperedEnvelope):
            VAULT.open(envelope, tenant_id="t", connector_id=CONNECTOR)


def test_the_spare_bits_of_base64_are_checked() -> None:
    """A last letter that decodes to the same bytes is still a changed envelope."""
    envelope = VAULT.seal(SecretStr("12"), tenant_id="t", connector_id=CONNECTOR)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for letter in set(alphabet) - {envelope[-1]}:
        with pytest.raises(TamperedEnvelope):
            VAULT.open(envelope[:-1] + letter, tenant_id="t", connector_id=CONNECTOR)


def test_each_seal_differs() -> None:
    """Sealing twice gives two envelopes: equal API keys cannot be told from the database."""
    assert VAULT.seal(KEY, tenant_id="t", connector_id="c") != VAULT.seal(KEY, tenant_id="t", connector_id="c")


def test_the_key_id_is_bound() -> None:
    """An envelope relabelled to another ring entry with the same key bytes does not open."""
    twins = Vault(SecretStr(f"{MAIN},twin:{MAIN.partition(':')[2]}"))
    envelope = twins.seal(KEY, tenant_id="t", connector_id=CONNECTOR)
    with pytest.raises(TamperedEnvelope):
        twins.open(envelope.replace("v1.main.", "v1.twin."), tenant_id="t", connector_id=CONNECTOR)


def test_rotation() -> None:
    """After a new first key, old envelopes open and ask to be resealed; new ones use the new key."""
    before = VAULT.seal(KEY, tenant_id="t", connector_id=CONNECTOR)
    assert ROTATED.key_ids == ("old-1", "main")
    assert ROTATED.open(before, tenant_id="t", connector_id=CONNECTOR) == KEY
    assert ROTATED.needs_resealing(before)
    after = ROTATED.seal(KEY, tenant_id="t", connector_id=CONNECTOR)
    assert key_id_of(after) == "old-1"
    assert not ROTATED.needs_resealing(after)
    with pytest.raises(UnknownVaultKey, match="old-1"):
        VAULT.open(after, tenant_id="t", connector_id=CONNECTOR)


def test_fingerprints_find_the_same_key() -> None:
    """Equal API keys have equal fingerprints under each ring key, first the sealing one's; others differ."""
    assert VAULT.fingerprint(KEY) == VAULT.fingerprint(SecretStr(KEY.get_secret_value()))
    assert ROTATED.fingerprints(KEY)[1] == VAULT.fingerprint(KEY)
    assert ROTATED.fingerprint(KEY) == ROTATED.fingerprints(KEY)[0]
    assert len({*ROTATED.fingerprints(KEY), VAULT.fingerprint(SecretStr("sk_other"))}) == 3
    assert len(bytes.fromhex(VAULT.fingerprint(KEY))) == 32


def test_the_fingerprint_does_not_drift() -> None:
    """A stored fingerprint must be found by later versions: the derivation is pinned by value."""
    assert VAULT.fingerprint(SecretStr("sk_pinned")) == PINNED


def test_an_envelope_of_an_earlier_version_opens() -> None:
    """A stored envelope must open in later versions: the format is pinned by value."""
    assert VAULT.open(SEALED, tenant_id="tenant-1", connector_id=CONNECTOR).get_secret_value() == "sk_pinned"


def test_unknown_key_ids_stop_the_start() -> None:
    """Key ids in use that the ring lacks are all named, sorted; known ones pass."""
    ROTATED.check_known(["main", "old-1", "main"])
    ROTATED.check_known([])
    with pytest.raises(Misconfigured, match="unknown key_id gone, lost: ") as caught:
        VAULT.check_known(["main", "lost", "gone"])
    assert isinstance(caught.value, UnknownVaultKey)
    assert caught.value.key_ids == ("gone", "lost")


def test_generated_keys_work() -> None:
    """A generated entry is a valid ring, and each is another key."""
    entries = {Vault.generate_key("k_1") for _ in range(3)}
    assert len(entries) == 3
    vault = Vault(SecretStr(",".join(entry.replace("k_1", f"k{n}") for n, entry in enumerate(entries))))
    assert vault.key_ids == ("k0", "k1", "k2")
    with pytest.raises(Refused, match="letters"):
        Vault.generate_key("a.b")


@pytest.mark.parametrize(
    ("ring", "message"),
    [
        ("", "entry 1: must be id:base64key"),
        ("c4n4ry", "entry 1: must be id:base64key"),
        (f"{MAIN},", "entry 2: must be id:base64key"),
        (f"{MAIN},c4n4ry.x:{'A' * 43}", "entry 2: must be id:base64key"),
        (f"{MAIN},b:c4n4ryAA", "entry 2: its key has 6 bytes, not 32"),
        (f"{MAIN},b:c4n4ry!!", "entry 2: its key is not base64"),
        (f"{MAIN},b:c4n4ryé", "entry 2: its key is not base64"),
        (f"{MAIN},{OLD},{MAIN}", "entry 3: its key_id stands before"),
    ],
)
def test_a_wrong_ring_is_told_by_position(ring: str, message: str) -> None:
    """A wrong entry is named by its position; its text never shows, not even in the traceback."""
    with pytest.raises(Misconfigured, match=message) as caught:
        Vault(SecretStr(ring))
    shown = "".join(traceback.format_exception(caught.value))
    assert "c4n4ry" not in shown
    assert MAIN not in shown


def test_repr_shows_key_ids_only() -> None:
    """A vault in a log or traceback shows key ids, no key."""
    assert repr(ROTATED) == "Vault(old-1, main)"


def test_a_tampered_envelope_is_set_aside() -> None:
    """TamperedEnvelope is a broken contract and shows neither the envelope nor the row."""
    with pytest.raises(ContractBroken) as caught:
        VAULT.open("v1.main.x.y", tenant_id="tenant-1", connector_id=CONNECTOR)
    assert "tenant-1" not in str(caught.value)
