"""The command line: npair train | evaluate | publish | verify."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from npair.client import DEFAULT_URL, NpairError
from npair.run import TrainConfig

REPOSITORY = Path("model_repository/npair")

# A command imports its libraries itself: --help is quick, and scoring a server needs no torch.
# ruff: noqa: PLC0415


def main() -> int:
    """Returns: 0; 1 with one line on stderr that says what went wrong; 130 after Ctrl-C, which training ends with a checkpoint."""
    arguments = _parser().parse_args()
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except (ValueError, RuntimeError, OSError, NpairError) as error:
        print(f"npair: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="npair", description="Train, score and publish N-pair embedding networks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command: Callable[[argparse.Namespace], int], description: str) -> argparse.ArgumentParser:
        name = command.__name__.removeprefix("_")
        added = commands.add_parser(name, help=description, description=description)
        added.set_defaults(command=command)
        return added

    data = "folder with train.txt and val.txt, a line per photo: path, fine label, coarse label"
    train = add(_train, "train a network on the train split of a data set")
    train.add_argument("--data", type=Path, required=True, metavar="DIR", help=data)
    train.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder for configuration, log and checkpoint")
    train.add_argument("--resume", action="store_true", help="go on with the run's checkpoint, by the run's own configuration")
    for field in dataclasses.fields(TrainConfig):
        train.add_argument(
            "--" + field.name.replace("_", "-"), type=type(field.default), default=field.default, help="(%(default)s)"
        )

    evaluate = add(_evaluate, "score a running server: nearest train photo of each val photo")
    evaluate.add_argument("--data", type=Path, required=True, metavar="DIR", help=data)
    evaluate.add_argument("--url", default=DEFAULT_URL, help="http:// or grpc:// (%(default)s)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.add_argument("--picture", type=Path, metavar="FILE", help="also draw a few val photos with their nearest train photos")

    publish = add(_publish, "write a run's network as the next version of the model")
    publish.add_argument("--run", type=Path, required=True, metavar="DIR")
    publish.add_argument("--data", type=Path, required=True, metavar="DIR", help=data)
    publish.add_argument("--repository", type=Path, default=REPOSITORY, metavar="DIR", help="the model's folder (%(default)s)")

    verify = add(_verify, "check the hashes of a version folder and embed its golden set")
    verify.add_argument("folder", type=Path, help=f"for example {REPOSITORY}/1")
    verify.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from npair.train import train

    config = TrainConfig(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(TrainConfig)})
    return 0 if train(arguments.data, arguments.run, config, resume=arguments.resume) else 130


def _evaluate(arguments: argparse.Namespace) -> int:
    from npair.evaluate import embed_served

    served = embed_served(arguments.data, arguments.url)
    if arguments.picture:
        served.draw(arguments.picture)
    scores = served.accuracy()
    if arguments.json:
        print(json.dumps({"version": served.version, **scores.as_dict()}))
    else:
        print(
            f"1-NN accuracy of {scores.queries} val photos against {scores.gallery} train photos, version {served.version}: "
            f"{scores.fine:.3f} fine, {scores.coarse:.3f} coarse"
        )
    return 0


def _publish(arguments: argparse.Namespace) -> int:
    from npair.artifact import publish

    folder = publish(arguments.run, arguments.data, arguments.repository)
    manifest = (folder / "manifest.json").read_bytes()
    print(
        f"published {folder}\nmanifest_sha256 {hashlib.sha256(manifest).hexdigest()}\n{json.dumps(json.loads(manifest)['metrics'])}"
    )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from npair.serving.embedder import Embedder

    embedder = Embedder(arguments.folder, threads=len(os.sched_getaffinity(0)))
    files, tolerance = len(embedder.manifest["files"]), embedder.manifest["golden"]["tolerance"]
    distance = embedder.golden_distance()
    if arguments.json:
        print(json.dumps({"files": files, "golden_distance": distance, "tolerance": tolerance}))
    else:
        print(f"{arguments.folder}: {files} files as published, golden set off by {distance:.2g} (tolerance {tolerance:.2g})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
