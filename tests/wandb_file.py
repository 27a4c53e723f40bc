"""Read an offline W&B run from its .wandb file: protobuf messages of W&B in the record format of LevelDB's log.

W&B has no reader of it for others, but `wandb sync` reads just this.
"""

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.conftest import HANG_SECONDS

if TYPE_CHECKING:
    from wandb.proto.wandb_internal_pb2 import ArtifactRecord, Record, RunRecord

BLOCK = 32768


class Offline(NamedTuple):
    """A run as `wandb sync` would send it."""

    run: "RunRecord"
    config: dict[str, Any]
    history: list[dict[str, Any]]
    """What was logged together, media as their description."""
    artifacts: list["ArtifactRecord"]
    directory: Path

    def steps(self, key: str) -> list[int]:
        """The steps at which something was logged under this key, in the order of logging."""
        return [row["trainer/global_step"] for row in self.history if key in row]

    def values(self, key: str) -> list[Any]:
        return [row[key] for row in self.history if key in row]


def read_offline(folder: Path) -> Offline:
    """The only offline run below a folder."""
    (path,) = folder.rglob("offline-run-*/run-*.wandb")
    for _ in range(10 * HANG_SECONDS):  # W&B's own process writes on for a moment when `finish` has returned
        records = [*frames(path.read_bytes())]
        if records and records[-1].WhichOneof("record_type") == "exit":
            break
        time.sleep(0.1)
    else:
        raise AssertionError(f"{path} has no end")
    runs = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    updates = [*runs[-1].config.update, *(u for r in records for u in r.config.update)]
    config: dict[str, Any] = {}
    for update in updates:
        config["/".join(update.nested_key) or update.key] = json.loads(update.value_json)
    history = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                *path_to, last = item.nested_key or [item.key]
                node = row
                for key in path_to:
                    node = node.setdefault(key, {})
                node[last] = json.loads(item.value_json)
            history.append(row)
    artifacts = [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    return Offline(runs[-1], config, history, artifacts, path.parent)


def frames(data: bytes) -> Iterator["Record"]:
    """The records of a .wandb file; fails where a checksum does not fit."""
    from wandb.proto.wandb_internal_pb2 import Record

    assert data[:4] == b":W&B"
    place, parts = 7, []
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:  # the rest of a block has no room for a frame's head
            place += BLOCK - place % BLOCK
            continue
        checksum, length, kind = struct.unpack("<IHB", data[place : place + 7])
        body = data[place + 7 : place + 7 + length]
        if len(body) < length:  # being written
            return
        assert zlib.crc32(bytes([kind]) + body) == checksum, f"the frame at {place} is damaged"
        place += 7 + length
        parts.append(body)
        if kind in (1, 4):  # the whole of a record, or its last part
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts.clear()
            yield record
