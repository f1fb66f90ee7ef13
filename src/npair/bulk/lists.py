"""Find out what LIST is."""

from __future__ import annotations

from npair.bulk import BulkError
from npair.bulk.photos import Folder, Shards
from npair.bulk.source import Source, below
from npair.bulk.storage import absolute, files_in, locate, reachable
from npair.bulk.tables import Lance, Parquet


def open_source(location: str) -> Source:
    """Return the list at a location: .lance, .parquet or .tar files, else a folder of photos.

    Raises: BulkError.
    """
    location = absolute(location)
    if location.endswith(".lance"):
        return Lance.open(location)
    system, path = locate(location)
    with reachable(location):
        files = files_in(system, path)
    tables = [file for file in files if file.path.endswith(".parquet")]
    shards = [file for file in files if file.path.endswith(".tar")]
    if tables and shards:
        raise BulkError(
            f"{location} holds .parquet and .tar files; name a folder with only one kind"
        )
    if tables:
        return Parquet.open(location, tables)
    if shards:
        return Shards(location, {below(shard.path, path): shard.size for shard in shards})
    return Folder(location)
