"""npair evaluate: score a run or a running server."""
# ruff: noqa: PLC0415  # commands import their libraries when they run

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npair.cli.options import (
    Commands,
    add_command,
    add_data,
    add_server,
    add_splits,
    load_dataset,
    say,
)
from npair.client import PIXEL, NpairClient
from npair.client.environment import from_environment
from npair.client.pool import PATIENT_RETRIES
from npair.training.run import RunError, TrainConfig, read_run

if TYPE_CHECKING:
    from npair.data.dataset import Dataset
    from npair.data.pixels import Pixels
    from npair.scoring.evaluate import EmbeddedSplit


@dataclass(frozen=True)
class Scored:
    """An embedded split and, for the report, what is known of its photos and its network.

    findings: how the splits were made and what the data's checks found.
    run: the run's folder, None for a server.
    """

    embedded: EmbeddedSplit
    split: str
    findings: list[str]
    run: Path | None = None


def add_commands(commands: Commands) -> None:
    evaluate = add_command(
        commands,
        "evaluate",
        _evaluate,
        "score a run or a running server: compare a split with the train photos",
        extra="evaluate",
    )
    add_data(evaluate)
    add_splits(evaluate)
    network = evaluate.add_mutually_exclusive_group()
    network.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="score this run's network, with the splits that it was trained on",
    )
    add_server(network)
    evaluate.add_argument("--split", default="val", help="split to score (default: %(default)s)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.add_argument(
        "--report", type=Path, metavar="FILE", help="write a report, one HTML file"
    )
    evaluate.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw a few queries and their nearest photos"
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.run:
        arguments.extra = "train"  # for the network
    _refuse_unwritable(arguments.report, arguments.picture)
    score = score_run if arguments.run else _score_server
    present(
        score(arguments, arguments.split),
        report=arguments.report,
        picture=arguments.picture,
        as_json=arguments.json,
    )
    return 0


def _refuse_unwritable(report: Path | None, picture: Path | None) -> None:
    """Raise ValueError for files that cannot be written, before the minutes of embedding."""
    from PIL import Image

    for file in filter(None, (report, picture)):
        if file.is_dir() or not os.access(file.parent, os.W_OK):
            raise ValueError(f"{file} cannot be written; name a file in a folder that can")
    formats = Image.registered_extensions()
    if picture and formats.get(picture.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{picture} names no format of pictures; add .png or .jpg")


def score_run(arguments: argparse.Namespace, split: str) -> Scored:
    """Embed a split by the run that ``--run`` names.

    The data may be other than the run's, such as a new test set, if it has splits of its own.
    Raises: DataError, RunError, NetworkError.
    """
    started = read_run(arguments.run)
    config = TrainConfig(**started["train"])
    dataset, pixels, findings = load_dataset(arguments, config.preprocessing(), config)
    facts = [dataset.made, *findings.lines()]
    if dataset.fingerprint() != started["data"]["fingerprint"]:
        other = f"{arguments.run} was not trained on {arguments.data} as it is now"
        if dataset.held_out:
            raise RunError(
                f"{other}, so it may have been trained on photos of {split}; name the data that it"
                " was trained on, or data with splits of its own"
            )
        facts.append(f"warning: {other}; photos that it was trained on may be in {split}")
        say(facts[-1])
    embedded = embed_run(arguments.run, dataset, pixels, split)
    return Scored(embedded, split, facts, arguments.run)


def _score_server(arguments: argparse.Namespace, split: str) -> Scored:
    from npair.data.pixels import PREVIEW

    with NpairClient(arguments.url, **from_environment()) as client:
        client.embed(PIXEL)  # report a server that does not answer before decoding the data
    dataset, _, findings = load_dataset(arguments, PREVIEW)
    embedded = embed_served(dataset, split, arguments.url)
    return Scored(embedded, split, [dataset.made, *findings.lines()])


def present(
    scored: Scored,
    *,
    report: Path | None = None,
    picture: Path | None = None,
    as_json: bool = False,
) -> None:
    """Print the scores, and then write the report and the picture, if they are asked for."""
    from npair.scoring.pictures import draw_neighbours
    from npair.scoring.report import write_report

    embedded, run = scored.embedded, scored.run
    scores = embedded.evaluate()
    if as_json:
        about = {"embedded_by": embedded.embedded_by, "split": scored.split}
        print(json.dumps({**about, **scores.as_dict()}))
    else:
        print(f"{embedded.embedded_by} on {scored.split}", *scores.lines(), sep="\n")
    if picture:
        draw_neighbours(embedded, picture)
    if report:
        log = (run / "log.jsonl").read_text().splitlines() if run else []
        write_report(
            report,
            embedded,
            scores,
            run=read_run(run) if run else None,
            log=[json.loads(row) for row in log],
            findings=scored.findings,
        )
        if not as_json:
            print(f"report: {report}")


def embed_run(run: Path, dataset: Dataset, pixels: Pixels, split: str) -> EmbeddedSplit:
    """Embed a split and its gallery by a run's network.

    pixels: of all photos of the data set, decoded as the run's configuration says.
    Raises: DataError if there is no such split; RunError if the run holds no network;
    NetworkError.
    """
    from npair.networks.network import embed
    from npair.scoring.evaluate import embed_split
    from npair.training.checkpoint import load_network

    network = load_network(run)
    return embed_split(
        f"run {run.name}",
        dataset,
        split,
        lambda photos: embed(network, pixels.array, pixels.of(photos)),
    )


def embed_served(dataset: Dataset, split: str, url: str) -> EmbeddedSplit:
    """Embed a split and its gallery by a running server, so that what is served is scored.

    Raises: DataError if there is no such split or the server refuses a photo; client.NpairError.
    """
    import numpy as np
    from tqdm import tqdm

    from npair.data.dataset import DataError
    from npair.scoring.evaluate import EmbeddedSplit, queries_and_gallery

    queries, gallery = queries_and_gallery(dataset, split)
    among_themselves = gallery is queries
    paths = [*queries.paths, *(() if among_themselves else gallery.paths)]
    vectors = []
    with NpairClient(url, retries=PATIENT_RETRIES, **from_environment()) as client:
        results = client.stream(paths)
        for result in tqdm(results, total=len(paths), desc="embed", unit="photo", disable=None):
            if result.vector is None:
                raise DataError(f"{paths[result.index]}: {result.reason}")
            vectors.append(result.vector)
    embedded_by = f"version {results.version} at {url}"
    query_vectors, others = np.split(np.stack(vectors), [len(queries)])
    gallery_vectors = query_vectors if among_themselves else others
    return EmbeddedSplit(embedded_by, queries, query_vectors, gallery, gallery_vectors)
