"""npair web: a page and an HTTP API to search a gallery by photos."""
# ruff: noqa: PLC0415  # commands import their libraries when they run

from __future__ import annotations

import argparse

from npair.cli.options import (
    Commands,
    add_command,
    add_gallery,
    add_moved_photos,
    add_server,
    number,
)
from npair.client import NpairClient
from npair.client.environment import from_environment


def add_commands(commands: Commands) -> None:
    web = add_command(
        commands,
        "web",
        _web,
        "serve a page and an HTTP API to search a gallery by photos",
        extra="web",
    )
    add_gallery(web)
    add_moved_photos(web)
    add_server(web)
    web.add_argument(
        "--refresh",
        type=number(float, least=0, most=1e6),
        metavar="SECONDS",
        help="look for a newer gallery at most this often (default: 0 for a folder; 5 for s3://,"
        " where each look is a request)",
    )
    web.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: %(default)s); any other than loopback needs a key of"
        " at least 32 characters in NPAIR_WEB_KEY, or in the file NPAIR_WEB_KEY_FILE",
    )
    web.add_argument(
        "--port",
        type=number(int, least=0, most=65_535),
        default=8080,
        metavar="N",
        help="port to listen on; 0: any free one (default: %(default)s)",
    )
    web.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which the service is reached, as in https://NAME/; may be repeated",
    )


def _web(arguments: argparse.Namespace) -> int:
    from npair.web.search import Search
    from npair.web.server import serve

    client = NpairClient(arguments.url, retries=1, **from_environment())
    search = Search(arguments.index, client, arguments.photos, arguments.refresh)
    serve(search, host=arguments.host, port=arguments.port, allowed=arguments.allow_host)
    return 0
