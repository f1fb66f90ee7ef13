"""The command line: npair data | train | evaluate | publish | verify | promote | rollback | versions | retire | index | tune."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npair.client import DEFAULT_URL, PATIENT_RETRIES, NpairClient, NpairError, from_environment
from npair.serving.preprocess import Preprocessing
from npair.training.run import TrainConfig, read_run

if TYPE_CHECKING:
    from npair.data.dataset import Dataset
    from npair.data.pixels import Findings, Pixels
    from npair.releasing.release import Server
    from npair.releasing.repository import Repository

REPOSITORY = "model_repository/npair"

# A command imports its libraries itself: --help is quick, and scoring a server needs no torch.
# ruff: noqa: PLC0415


def main() -> int:
    """Returns: 0; 1 with one line on stderr that says what went wrong; 130 after Ctrl-C, SIGTERM or SIGHUP: a
    promotion goes back, and training ends with a checkpoint (by SIGHUP, with its last one)."""
    arguments = _parser().parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup has it ignored
            signal.signal(number, signal.default_int_handler)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except (ValueError, RuntimeError, OSError, NpairError) as error:
        print(f"npair: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        if str(stopped):
            print(f"npair: {stopped}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="npair", description="Train, score and publish N-pair embedding networks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command: Callable[[argparse.Namespace], int], description: str) -> argparse.ArgumentParser:
        name = command.__name__.removeprefix("_")
        added = commands.add_parser(name, help=description, description=description)
        added.set_defaults(command=command)
        return added

    data = commands.add_parser("data", help="fetch, check or divide a data set", description="Fetch, check or divide a data set.")
    steps = data.add_subparsers(required=True, metavar="STEP")
    grocery = steps.add_parser("grocery", help="fetch the Grocery Store Dataset", description="Fetch the Grocery Store Dataset.")
    grocery.add_argument("folder", type=Path, nargs="?", default=Path("data/grocery"), help="(%(default)s)")
    grocery.set_defaults(command=_data_grocery)
    check = steps.add_parser("check", help="name what training would leave out", description="Name what training would leave out.")
    _add_data(check)
    _add_splits(check)
    check.set_defaults(command=_data_check)
    folds = steps.add_parser(
        "folds",
        help="write tables for cross-validation",
        description="Write tables for cross-validation, one to train on for each fold.",
    )
    _add_data(folds)
    _add_splits(folds)
    folds.add_argument("--folds", type=int, default=3, metavar="K", help="(%(default)s)")
    folds.add_argument("--of", nargs="+", default=["train"], metavar="SPLIT", help="the splits to divide (train)")
    folds.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for fold-0.csv and so on")
    folds.set_defaults(command=_data_folds)

    train = add(_train, "train a network on a data set's train split and report on its val split")
    _add_data(train)
    train.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder for configuration, log, checkpoint, report")
    train.add_argument("--resume", action="store_true", help="go on with the run's checkpoint, by the run's own configuration")
    for field in dataclasses.fields(TrainConfig):
        _add_knob(train, field)

    evaluate = add(_evaluate, "score a run or a running server on a split, against the train photos")
    _add_data(evaluate)
    _add_splits(evaluate)
    scored = evaluate.add_mutually_exclusive_group()
    scored.add_argument("--run", type=Path, metavar="DIR", help="score this run's network; it splits the data as in training")
    scored.add_argument("--url", default=DEFAULT_URL, help="score this server: http(s):// or grpc(s):// (%(default)s)")
    evaluate.add_argument("--split", default="val", help="(%(default)s)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.add_argument("--report", type=Path, metavar="FILE", help="also write a report, one HTML file")
    evaluate.add_argument("--picture", type=Path, metavar="FILE", help="also draw a few queries with their nearest photos")

    publish = add(_publish, "write a run's network as the next version of the model")
    publish.add_argument(
        "--run", type=Path, required=True, metavar="DIR", help="a run; or a version, to publish its network anew with this code"
    )
    _add_data(publish)
    _add_repository(publish)
    publish.add_argument(
        "--accept-recall-drop", default="", metavar="REASON", help="publish although it finds less than the pinned version"
    )
    publish.add_argument("--accept-cost", default="", metavar="REASON", help="publish although it is slower or larger than that")

    verify = add(_verify, "check versions, and with --url what a server makes of them: hashes, golden sets, config.pbtxt")
    verify.add_argument("versions", nargs="*", metavar="N", help="a version's number or folder (config.pbtxt, and all versions)")
    verify.add_argument("--engine", default="", help="the only one to check (all that can run here)")
    verify.add_argument("--json", action="store_true", help="print JSON")
    _add_repository(verify)
    verify.add_argument("--url", nargs="+", default=[], help="running servers: http://")

    promote = add(_promote, "have a version served, once it is verified; whatever goes wrong, what was served before goes on")
    promote.add_argument("version", type=int, metavar="N")
    promote.add_argument("--keep", type=int, metavar="M", help="serve this lower version, too, to requests that name it")
    rollback = add(_rollback, "have the version served that was served before")
    versions = add(_versions, "list the versions with what is known of them")
    versions.add_argument("--json", action="store_true", help="print JSON")
    retire = add(_retire, "remove a version that is not served")
    retire.add_argument("version", type=int, metavar="N")
    for release in (promote, rollback, versions, retire):
        _add_repository(release)
        _add_servers(release)

    index = commands.add_parser("index", help="build or search a gallery", description="Build or search a gallery.")
    steps = index.add_subparsers(required=True, metavar="STEP")
    build = steps.add_parser(
        "build",
        help="embed photos into a gallery, or bring it up to date",
        description="Embed photos into a gallery, or bring it up to date; after an interruption, the same command goes on.",
    )
    build.add_argument(
        "photos", type=Path, metavar="PHOTOS", help="a folder of photos, the folder that each is in its label; or as for --data"
    )
    build.set_defaults(command=_index_build)
    search = steps.add_parser(
        "search", help="print the photos that are most similar to one", description="Print the photos that are most similar to one."
    )
    search.add_argument("photo", type=Path, metavar="PHOTO")
    search.add_argument("-k", type=int, default=5, help="how many to print (%(default)s)")
    search.set_defaults(command=_index_search)
    for step in (build, search):
        step.add_argument("--index", type=Path, default=Path("gallery"), metavar="DIR", help="the gallery's folder (%(default)s)")
        step.add_argument(
            "--url",
            default=os.environ.get("NPAIR_URL", DEFAULT_URL),
            help="the server: http(s):// or grpc(s):// (NPAIR_URL; %(default)s)",
        )
        step.add_argument("--json", action="store_true", help="print JSON")

    tune = add(_tune, "search the serving settings that are best on this machine, and write them to config.pbtxt")
    _add_source(tune)
    tune.add_argument("--repository", type=Path, default=Path(REPOSITORY), metavar="DIR", help="the model's folder (%(default)s)")
    tune.add_argument("--p99-ms", type=_positive, default=100.0, help="what the slowest hundredth may take (%(default)g)")
    tune.add_argument("--seconds", type=_positive, default=2.0, help="of each load (%(default)g)")
    tune.add_argument(
        "--instances", type=int, nargs="+", metavar="N", help="to try (the divisors of the number of cores, and one more)"
    )
    tune.add_argument("--batch", type=int, nargs="+", default=[0, 4, 8, 16, 32], metavar="N", help="to try; 0: any (%(default)s)")
    tune.add_argument("--delay", type=int, nargs="+", default=[0, 500, 2000], metavar="US", help="to try (%(default)s)")
    tune.add_argument("--picture", type=Path, metavar="FILE", help="also draw throughput and latency (.svg, .png)")
    return parser


def _positive(text: str) -> float:
    """Raises: ValueError."""
    number = float(text)
    if not 0 < number <= 1e9:
        raise ValueError
    return number


def _add_data(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder for decoded photos (in the user's cache)")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="SOURCE",
        help="a folder per class, a table (.csv, .tsv: path, label and maybe coarse, split), or a folder with train.txt",
    )


def _add_repository(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repository", default=REPOSITORY, metavar="WHERE", help="a folder, s3:// or gs:// (%(default)s)")


def _add_servers(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--url",
        nargs="+",
        default=[os.environ.get("NPAIR_URL", DEFAULT_URL)],
        help="the running servers: every address of each host. Set NPAIR_CONTROL_SECRET or NPAIR_CONTROL_SECRET_FILE"
        f" as they have it (NPAIR_URL; {DEFAULT_URL})",
    )
    where.add_argument("--offline", dest="url", action="store_const", const=[], help="none runs")
    parser.add_argument("--timeout", type=_positive, default=120.0, help="seconds for each call to a server (%(default)g)")


def _add_splits(parser: argparse.ArgumentParser) -> None:
    for field in dataclasses.fields(TrainConfig):
        if field.name in ("seed", "split_by", "val_share"):
            _add_knob(parser, field)


def _add_knob(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
    default = " (chosen from the data)" if field.metadata["chosen"] else "" if field.default == "" else " (%(default)s)"
    parser.add_argument(
        "--" + field.name.replace("_", "-"),
        type=type(field.default),
        default=field.default,
        choices=field.metadata["choices"],
        help=field.metadata["help"] + default,
    )


def _data_grocery(arguments: argparse.Namespace) -> int:
    from npair.data.grocery import fetch_grocery

    print(fetch_grocery(arguments.folder))
    return 0


def _data_check(arguments: argparse.Namespace) -> int:
    from npair.data.folds import found_by_colour
    from npair.data.pixels import GLANCE
    from npair.scoring.evaluate import sides

    dataset, pixels, findings = _load(arguments, GLANCE)
    for name, photos in dataset.splits.items():
        print(f"{name}: {len(photos)} photos of {len(set(photos.fine))} classes")
    print(f"splits: {dataset.made}", *findings.lines(), sep="\n")
    for name in dataset.splits:
        queries, gallery = sides(dataset, name)
        if gallery is not queries:
            share = found_by_colour(queries, gallery, pixels)
            print(
                f"by colours alone, the nearest train photo of {share:.2f} of the {name} photos has their class:"
                " the more, the less does a score tell about photos from elsewhere"
            )
    return 0


def _data_folds(arguments: argparse.Namespace) -> int:
    from npair.data.folds import write_folds
    from npair.data.pixels import GLANCE

    dataset, pixels, _ = _load(arguments, GLANCE)
    for table in write_folds(dataset, pixels, arguments.folds, arguments.of, arguments.out):
        print(table)
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from npair.training.train import train

    config = TrainConfig(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(TrainConfig)})
    if not train(arguments.data, arguments.run, config, resume=arguments.resume, cache=arguments.cache):
        return 130
    if int(os.environ.get("RANK", "0")):
        return 0
    last = json.loads((arguments.run / "log.jsonl").read_text().splitlines()[-1])
    if "val" not in last:  # none was asked for, or there is no such split
        print("val was not scored, so there is no report; npair evaluate makes one", file=sys.stderr)
        return 0
    arguments.split, arguments.report, arguments.picture, arguments.json = "val", arguments.run / "report.html", None, False
    return _evaluate(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    from npair.data.pixels import GLANCE
    from npair.scoring.evaluate import embed_run, embed_served
    from npair.scoring.report import write_report

    run = read_run(arguments.run) if arguments.run else None
    if run:
        config = TrainConfig(**run["train"])
        arguments.split_by, arguments.val_share, arguments.seed = config.split_by, config.val_share, config.seed
        dataset, pixels, findings = _load(arguments, config.preprocessing())
        compared = embed_run(arguments.run, dataset, pixels, arguments.split)
    else:
        dataset, _, findings = _load(arguments, GLANCE)
        compared = embed_served(dataset, arguments.split, arguments.url)
    scores = compared.evaluate()
    if arguments.picture:
        compared.draw(arguments.picture)
    if arguments.report:
        log = (arguments.run / "log.jsonl").read_text().splitlines() if arguments.run else []
        write_report(
            arguments.report,
            compared,
            scores,
            run=run,
            log=[json.loads(line) for line in log],
            findings=[dataset.made, *findings.lines()],
        )
    if arguments.json:
        print(json.dumps({"embedded_by": compared.embedded_by, "split": arguments.split, **scores.as_dict()}))
    else:
        print(f"{compared.embedded_by} on {arguments.split}", *scores.lines(), sep="\n")
        if arguments.report:
            print(f"report: {arguments.report}")
    return 0


def _load(arguments: argparse.Namespace, preprocessing: Preprocessing) -> tuple[Dataset, Pixels, Findings]:
    from npair.data.dataset import read_dataset
    from npair.data.pixels import default_cache, load

    dataset = read_dataset(arguments.data, split_by=arguments.split_by, val_share=arguments.val_share, seed=arguments.seed)
    return load(dataset, preprocessing, arguments.cache or default_cache())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _publish(arguments: argparse.Namespace) -> int:
    from npair.cli.next_version import publish_next
    from npair.data.pixels import default_cache
    from npair.releasing.repository import open_repository
    from npair.scoring.metrics import Evaluation

    repository = open_repository(arguments.repository)
    manifest = publish_next(
        repository,
        arguments.run,
        arguments.data,
        cache=arguments.cache or default_cache(),
        accept_recall_drop=arguments.accept_recall_drop,
        accept_cost=arguments.accept_cost,
        say=_say,
    )
    number, compared = manifest.version, manifest.compared_with
    if manifest.metrics:
        print("val", *Evaluation.from_dict(manifest.metrics["val"]).lines(), sep="\n")
    if compared:
        for kind, (old, new) in compared.recall_at_1.items():
            print(f"Recall@1 {kind}: {new:.3f}; version {compared.version} has {old:.3f}")
    print(f"published version {number} in {repository.location}; to serve it: npair promote {number}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from npair.releasing.release import Server, check_pins, check_server, verify
    from npair.releasing.repository import open_repository

    checked: dict[str, dict[str, dict[str, float | str]]] = {}
    served: dict[str, dict[int, float]] = {}
    numbers = [int(version) for version in arguments.versions if version.isdecimal()]
    for path in arguments.versions:
        if not path.isdecimal():
            checked[path] = verify(Path(path), arguments.engine)
    if numbers or arguments.url or not checked:
        repository = open_repository(arguments.repository)
        if not numbers and not checked:
            check_pins(repository)
            numbers = [number for number, complete in repository.versions().items() if complete]
        for number in numbers:
            with repository.version(number) as folder:
                checked[str(number)] = verify(folder, arguments.engine)
        servers = [server for url in arguments.url for server in Server.all_of(url, repository.name)]
        served = {server.url: check_server(repository, server) for server in servers}
    if arguments.json:
        print(json.dumps({"versions": checked, "servers": served}))
        return 0
    for version, engines in checked.items():
        print(f"version {version}: files as published")
        for name, engine in engines.items():
            off = "golden set off by {golden_distance:.2g} (tolerance {tolerance:.2g})" if "tolerance" in engine else "{cannot_run}"
            print(f"  {name}: {off.format(**engine)}")
    for url, distances in served.items():
        print(f"{url}: serves what is pinned", *(f"version {n}: golden set off by {d:.2g}" for n, d in distances.items()), sep=", ")
    return 0


def _promote(arguments: argparse.Namespace) -> int:
    from npair.releasing.release import promote

    repository, servers = _repository(arguments)
    promote(repository, arguments.version, servers, keep=arguments.keep)
    print(f"version {arguments.version} is {_where(servers)}")
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    from npair.releasing.release import rollback

    repository, servers = _repository(arguments)
    print(f"version {rollback(repository, servers)} is {_where(servers)} again")
    return 0


def _versions(arguments: argparse.Namespace) -> int:
    from npair.releasing.release import as_dicts, table, versions

    lines = versions(*_repository(arguments))
    print(json.dumps(as_dicts(lines)) if arguments.json else table(lines))
    return 0


def _retire(arguments: argparse.Namespace) -> int:
    from npair.releasing.release import retire

    repository, servers = _repository(arguments)
    retire(repository, arguments.version, servers)
    print(f"version {arguments.version} is removed")
    return 0


def _repository(arguments: argparse.Namespace) -> tuple[Repository, list[Server]]:
    from npair.releasing.release import Server
    from npair.releasing.repository import open_repository
    from npair.serve import given_secret

    repository, secret = open_repository(arguments.repository), given_secret()
    urls = [Server.all_of(url, repository.name, secret=secret, timeout=arguments.timeout) for url in arguments.url]
    return repository, [server for servers in urls for server in servers]


def _where(servers: Sequence[Server]) -> str:
    return f"served by {', '.join(server.url for server in servers)}" if servers else "what servers that start from now on serve"


def _index_build(arguments: argparse.Namespace) -> int:
    from npair.gallery.gallery import build

    with NpairClient(arguments.url, retries=PATIENT_RETRIES, **from_environment()) as client:
        built = build(arguments.photos, arguments.index, client)
    for photo, reason in built.left_out.items():
        print(f"{photo}: {reason}", file=sys.stderr)
    if built.ignored:
        print(f"ignored, since they are no photos: {built.ignored}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(built._asdict()))
    else:
        print(
            f"{built.photos} photos in {arguments.index}, embedded by version {built.version}: {built.embedded} of them now,"
            f" {len(built.left_out)} left out"
        )
    return 0


def _index_search(arguments: argparse.Namespace) -> int:
    from npair.gallery.gallery import Gallery

    gallery = Gallery(arguments.index)
    with NpairClient(arguments.url, **from_environment()) as client:
        found = gallery.search(arguments.photo, client, arguments.k)
    if arguments.json:
        print(json.dumps({"version": gallery.version, "found": [hit._asdict() for hit in found]}))
    else:
        print(*(f"{hit.cosine:.4f}  {hit.label}  {hit.photo}" for hit in found), sep="\n")
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    from npair.data.dataset import read_dataset
    from npair.releasing.repository import open_repository
    from npair.releasing.tune import best_point, draw, frontier, read_setting, table, tune, with_setting
    from npair.serving.engine import cores

    instances = arguments.instances or [n for n in range(1, cores() + 2) if cores() % n == 0 or n > cores()]
    if min(instances) < 1 or min(arguments.batch + arguments.delay) < 0:
        raise ValueError("--instances must be positive, --batch and --delay must not be negative")
    photos = [path for split in read_dataset(arguments.data).splits.values() for path in split.paths]
    sent = [path.read_bytes() for path in photos[:: -(-len(photos) // 200)]]
    axes = {"instances": instances, "batch": arguments.batch, "delay": arguments.delay}
    points, chosen = tune(
        arguments.repository,
        sent,
        p99=arguments.p99_ms,
        seconds=arguments.seconds,
        axes=axes,
        say=_say,
    )
    print(table(frontier(points)))
    if arguments.picture:
        draw(points, chosen, arguments.p99_ms, arguments.picture)
    config = arguments.repository / "config.pbtxt"
    present = read_setting(config.read_text(encoding="utf-8"))
    best = best_point([point for point in points if point.setting == chosen], arguments.p99_ms)
    assert best
    print(f"\nbest: {chosen}: {best.load.rate:.0f} photos/s with a p99 of {best.load.p99:.0f} ms")
    if chosen == present:
        print(f"{config} has this setting already")
    else:
        repository = open_repository(arguments.repository)
        with repository.exclusive():
            repository.write(config.name, with_setting(config.read_text(encoding="utf-8"), chosen).encode())
        print(f"written to {config}, in place of {present}; servers that start from now on use it")
    return 0
