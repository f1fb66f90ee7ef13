"""Find out what LIST is."""

from __future__ import annotations

from npair.bulk import BulkError
from npair.bulk.photos import Folder, Shards
from npair.bulk.source import Source, below, is_photo
from npair.bulk.storage import absolute, files_in, locate, reachable
from npair.bulk.tables import Lance, Parquet


def open_source(location: str, kind: str = "") -> Source:
    """Return the list at a location: .lance, .parquet or .tar files, else a folder of photos.

    kind: that of ``Source``, if the list has been cut: files of other kinds may have come since.
    Raises: BulkError, also if there are files of several kinds and none of them is named.
    """
    location = absolute(location)
    if location.endswith(".lance"):
        return Lance.open(location)
    system, path = locate(location)
    with reachable(location):
        files = files_in(system, path)
    kinds = {
        "tables": [file for file in files if file.path.endswith(".parquet")],
        "shards": [file for file in files if file.path.endswith(".tar")],
        "photos": [file for file in files if is_photo(file.path)],
    }
    held = [name for name, found in kinds.items() if found]
    if kind not in held:
        if len(held) > 1:
            examples = (f"{name} such as {below(kinds[name][0].path, path)}" for name in held)
            raise BulkError(
                f"{location} holds {' and '.join(examples)}; name one file, or a folder with only"
                " one kind"
            )
        kind = "".join(held)
    if kind == "tables":
        return Parquet.open(location, kinds[kind])
    if kind == "shards":
        return Shards(location, {below(shard.path, path): shard.size for shard in kinds[kind]})
    return Folder(location)
