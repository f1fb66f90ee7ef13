"""Check the npair command line itself: options, errors and pipes."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.commands import commands
from support.models import SHIPPED

from npair import cli
from npair.client import cli as client_commands

PARSERS = dict(commands())
OF_CLIENT = {f"npair {name}" for name in ("embed", "compare", "rank", "ready")}
REPOSITORY = str(SHIPPED.parent)


@pytest.fixture
def npair(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a command in this process."""

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["npair", *words])
        return cli.main()

    return run


def without_reader(stream: str, *words: str, **variables: str) -> tuple[int, str]:
    """Run a command whose stdout or stderr nobody reads; return its exit code and the other."""
    read, write = os.pipe()
    os.close(read)
    with (
        os.fdopen(write, "w") as pipe,
        subprocess.Popen(
            [sys.executable, "-m", "npair", *words],
            stdout=pipe if stream == "stdout" else subprocess.PIPE,
            stderr=pipe if stream == "stderr" else subprocess.PIPE,
            env=os.environ | variables,
            text=True,
        ) as process,
    ):
        said = process.communicate()
    return process.returncode, "".join(filter(None, said))


@pytest.mark.parametrize("command", PARSERS)
def test_numbers_have_bounds(command: str) -> None:
    for option in PARSERS[command]._actions:
        if command not in OF_CLIENT:
            assert option.choices or option.type not in (int, float), option
        if getattr(option.type, "__name__", "") != "parse":  # not made by options.number
            continue
        for text in ("-1", "nan", "many"):
            with pytest.raises(argparse.ArgumentTypeError, match=f"expected .*number .*{text}"):
                option.type(text)  # type: ignore[operator, misc]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("train --data d --run r --epochs 0", "--epochs: expected a whole number of at least 1"),
        ("train --data d --run r --seed 4294967296", "of at least 0 and of at most 4294967295"),
        ("train --data d --run r --learning-rate 0", "--learning-rate: expected a number above 0"),
        ("train --data d --run r --views 0", "--views: invalid choice: 0 (choose from 1, 2)"),
        ("train --data d --run r --val-share 1", "expected a number above 0 and below 1, got '1'"),
        ("data folds --data d --out o --folds 1", "--folds: expected a whole number of at least 2"),
        ("index search photo.jpg -k 0", "-k: expected a whole number of at least 1 and of at most"),
        ("index search photo.jpg -k 4294967297", "of at least 1 and of at most 100000, got"),
        ("web --refresh 1e20", "--refresh: expected a number of at least 0 and of at most 1000000"),
        ("promote 0", "N: expected a whole number of at least 1, got '0'"),
        ("promote 2 --keep 0", "--keep: expected a whole number of at least 1, got '0'"),
        ("versions --timeout 0", "--timeout: expected a number above 0"),
        (
            "versions --timeout 4294968",
            "above 0 and of at most 1000000",
        ),
        ("tune --data d --instances 0", "--instances: expected a whole number of at least 1"),
    ],
)
def test_wrong_numbers_are_named(
    words: str, reason: str, npair: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        npair(*words.split())
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "--loss tuplet --mine-from 9",
        "--loss tuplet --coarse-smoothing 0",
        "--loss cosine --norm-penalty 0",
        "--loss npair --temperature 0.2",
        "--network efficientnet-lite1 --width 48",
        "--network compact --frozen-stages 0",
    ],
)
def test_training_refuses_options_that_do_nothing(
    words: str, npair: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    other, last = words.split()[:2], words.split()[2]
    assert npair("train", "--data", "d", "--run", "r", *words.split()) == 1
    assert f"{last} does nothing with {' '.join(other)}; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["", "--evaluations 0", "--evaluations 20 --epochs 4"])
def test_training_refuses_a_patience_that_ends_nothing(
    words: str, npair: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("train", "--data", "d", "--run", "r", "--patience", "3", *words.split())
    assert npair(*command) == 1
    assert "--patience 3 ends no training of" in capsys.readouterr().err
    assert npair(*command, "--evaluations", "5", "--epochs", "9") == 1
    assert "d is neither a folder nor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            "--report none/report.html",
            "none/report.html cannot be written; name a file in a folder",
        ),
        ("--report .", ". cannot be written"),
        ("--picture none/1.png", "none/1.png cannot be written"),
        ("--picture photo", "photo names no format of pictures; add .png or .jpg"),
    ],
)
def test_evaluate_refuses_files_that_it_cannot_write_before_it_reads_any(
    words: str, reason: str, npair: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert npair("evaluate", "--data", "d", "--run", "r", *words.split()) == 1
    assert capsys.readouterr().err.startswith(f"npair: {reason}")


def test_help_says_what_an_option_does_nothing_without() -> None:
    described = {option.dest: option.help for option in PARSERS["npair train"]._actions}
    assert described["temperature"] == (
        "with --loss cosine: temperature of the softmax (default: 0.1)"
    )


@pytest.mark.parametrize("command", PARSERS)
def test_options_leave_arguments_alone(command: str) -> None:
    """An option that takes all words after it would take the command's arguments."""
    actions = PARSERS[command]._actions
    if any(not action.option_strings for action in actions):
        assert [a for a in actions if a.option_strings and a.nargs in ("+", "*")] == []


def test_servers_are_named_before_or_after_the_version() -> None:
    parser = cli.parser()
    for words in (
        "promote --url http://a --url http://b 9",
        "promote 9 --url http://a --url http://b",
    ):
        parsed = parser.parse_args(words.split())
        assert (parsed.version, parsed.urls) == (9, ["http://a", "http://b"])


@pytest.mark.parametrize("words", ["evaluate --data d", "index build d", "index search photo.jpg"])
def test_the_environment_names_the_server(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPAIR_URL", "grpc://here:1")
    assert cli.parser().parse_args(words.split()).url == "grpc://here:1"


def test_releasing_needs_http(
    npair: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPAIR_URL", "grpc://127.0.0.1:9")
    for words in ("versions", "promote 12", "rollback", "retire 12"):
        assert npair(*words.split(), "--repository", REPOSITORY) == 1
        said = capsys.readouterr().err
        assert "releasing needs an HTTP URL" in said
        assert "NPAIR_URL), got 'grpc://127.0.0.1:9'" in said


@pytest.mark.parametrize("main", [cli.main, client_commands.main])
def test_names_that_are_not_utf_8_are_escaped(
    main: Callable[[], int],
    capsysbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_commands, "run", lambda *_: print(os.fsdecode(b"\xc4.jpg")) or 0)
    monkeypatch.setattr(sys, "argv", ["npair", "ready"])
    assert main() == 0
    assert capsysbinary.readouterr().out == b"\\udcc4.jpg\n"


def test_versions_names_servers_that_do_not_answer(
    npair: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert npair("versions", "--repository", REPOSITORY, "--url", "http://127.0.0.1:9") == 0
    printed = capsys.readouterr()
    assert f"{SHIPPED.name} *     ready" in printed.out
    assert "http://127.0.0.1:9 does not answer" in printed.err


def test_publish_prints_a_command_to_paste(
    npair: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    repository: Path,
) -> None:
    folder = repository.rename(repository.with_name("my model"))
    published = SimpleNamespace(metrics=None, compared_with=None, version=10)
    monkeypatch.setattr("npair.cli.next_version.publish_next", lambda *_, **__: published)
    assert npair("publish", "--run", "r", "--data", "d", "--repository", str(folder)) == 0
    printed = capsys.readouterr().out.partition("to serve it: ")[2]
    program, *words = shlex.split(printed)
    parsed = cli.parser().parse_args(words)
    assert (program, parsed.version, parsed.repository) == ("npair", 10, str(folder))


def test_help_needs_no_library() -> None:
    """tests/server/test_install.py has environments that lack them."""
    libraries = "PIL", "tqdm", "sklearn", "torch", "openvino", "lancedb", "fastapi"
    code = (
        "import contextlib, sys\nfrom npair import cli\n"
        f"sys.modules.update(dict.fromkeys({libraries}))\nfor words in sys.argv[1:]:\n"
        "    sys.argv = [*words.split(), '--help']\n"
        "    with contextlib.suppress(SystemExit):\n        cli.main()"
    )
    command = [sys.executable, "-c", code, *PARSERS]
    helps = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert [name for name in PARSERS if f"usage: {name} " not in helps] == []


def test_the_version(npair: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        npair("--version")
    assert capsys.readouterr().out.startswith("npair 0.")


def test_a_missing_library_is_named_with_its_extra(
    npair: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npair.cli.data._check", lambda _: importlib.import_module("a_library.of"))
    assert npair("data", "check", "--data", "d") == 1
    needs = "npair data check needs a_library: pip install 'npair[evaluate]'\n"
    assert capsys.readouterr().err == needs


@pytest.mark.parametrize("module", ["npair.nothing", "tritonclient.nothing"])
def test_a_module_that_no_extra_brings_is_a_fault(
    module: str, npair: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npair.cli.train._train", lambda _: importlib.import_module(module))
    with pytest.raises(ModuleNotFoundError, match=module):
        npair("train", "--data", "d", "--run", "r")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("stream", "where"), [("stdout", REPOSITORY), ("stderr", "nowhere")])
def test_a_closed_pipe_ends_quietly(stream: str, where: str, unbuffered: str) -> None:
    words = ("versions", "--offline", "--repository", where)
    assert without_reader(stream, *words, PYTHONUNBUFFERED=unbuffered) == (141, "")
    assert without_reader("stdout", "--help", PYTHONUNBUFFERED=unbuffered)[1] == ""


def test_another_broken_pipe_is_an_error(
    npair: Callable[..., int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: argparse.Namespace) -> int:
        raise BrokenPipeError("of a connection")

    monkeypatch.setattr("npair.cli.release._versions", broken)
    assert npair("versions") == 1
    assert capfd.readouterr().err == "npair: of a connection\n"
