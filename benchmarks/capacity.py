"""What embedding a great number of photos takes, derived from what benchmarks/bulk.py measured.

    PYTHONPATH=model/api .venv/bin/python benchmarks/capacity.py

Prints a table in Markdown. Every option is a measured figure, and its default is that of the docs.
"""

from __future__ import annotations

import argparse

from npair.releasing.tune import markdown

CHECKPOINT_BYTES = 8  # of a row in the memory of Ray's filter: the number of its piece


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--photos", type=float, default=1e9, help="(%(default)g)")
    add("--cores", type=int, default=1000, help="that embed (%(default)s)")
    add("--rate", type=float, default=150.0, help="photos/s of a core (%(default)g)")
    add("--by-path", type=float, default=2000.0, help="requests a thousand photos (%(default)g)")
    add("--by-shard", type=float, default=2.0, help="requests a thousand photos (%(default)g)")
    add("--fp32", type=float, default=530.0, help="bytes of a row (%(default)g)")
    add("--fp16", type=float, default=275.0, help="bytes of a row (%(default)g)")
    add("--megabytes", type=float, default=400.0, help="of an actor (%(default)g)")
    add("--rows", type=float, default=1e8, help="of a job (%(default)g)")
    arguments = parser.parse_args()
    print(table(arguments))


def table(measured: argparse.Namespace) -> str:
    photos, hours = measured.photos, measured.photos / measured.rate / 3600
    rows = [
        ["core hours", f"{hours:,.0f}", f"photos / {measured.rate:.0f} a second"],
        [f"hours on {measured.cores:,} cores", f"{hours / measured.cores:.1f}", ""],
        ["requests to read, one photo each", f"{photos * measured.by_path / 1000:.1g}", "paths"],
        ["requests to read, in shards", f"{photos * measured.by_shard / 1000:.1g}", "shards"],
        ["vectors in fp32", f"{photos * measured.fp32 / 1e9:,.0f} GB", f"{measured.fp32:.0f} B"],
        ["vectors in fp16", f"{photos * measured.fp16 / 1e9:,.0f} GB", f"{measured.fp16:.0f} B"],
        [
            f"memory of {measured.cores:,} actors",
            f"{measured.cores * measured.megabytes / 1000:,.0f} GB",
            f"{measured.megabytes:.0f} MB",
        ],
        [
            f"jobs of {measured.rows:.0g} rows",
            f"{photos / measured.rows:.0f}",
            f"{CHECKPOINT_BYTES * measured.rows / 1e9:.1f} GB for each to continue",
        ],
    ]
    return markdown([f"{photos:.0e} photos", "", "from"], rows)


if __name__ == "__main__":
    main()
