"""Snapshots as they are kept: JSON compressed as zlib does, by a library that needs a third of its time. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec
import orjson
from isal import isal_zlib

from schemas.records import Listing, Record
from worker.ports import Base, Packed


class _Snapshot(msgspec.Struct):
    records: dict[str, msgspec.Raw]
    days: dict[str, tuple[str, int]]


_SNAPSHOT = msgspec.json.Decoder(_Snapshot)
_RECORD = msgspec.json.Decoder(Record)


class Kept(Mapping[str, Record]):
    """Records that are decoded one by one, when they are looked at: all at once, a large listing takes much memory."""

    def __init__(self, kept: dict[str, msgspec.Raw]) -> None:
        self._kept = kept

    def __getitem__(self, subject: str) -> Record:
        return _RECORD.decode(self._kept[subject])

    def __contains__(self, subject: object) -> bool:
        return subject in self._kept

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def unlike(self, seen: Listing) -> Listing:
        """Give what of a listing would not be written the way it is kept: all else is the same without a look."""
        kept = self._kept
        return {
            subject: record
            for subject, record in seen.items()
            if (raw := kept.get(subject)) is None or bytes(raw) != orjson.dumps(record)
        }


def pack(base: Base) -> Packed:
    """Compress a snapshot; level 1, since it is written more often than it is kept."""
    document = orjson.dumps({"records": dict(base.records), "days": base.days})
    return Packed(base.version, isal_zlib.compress(document, 1))


def unpack(packed: Packed) -> Base:
    """Read a compressed snapshot."""
    kept = _SNAPSHOT.decode(isal_zlib.decompress(packed.blob))
    return Base(packed.version, records=Kept(kept.records), days=kept.days)
