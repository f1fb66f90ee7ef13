"""Read config.pbtxt by Triton's schema, and change it line by line, so that comments stay."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from google.protobuf import json_format, text_format
from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2


class ConfigError(RuntimeError):
    """A config.pbtxt cannot be read or changed; the message says what to do."""


def parse(config: str) -> model_config_pb2.ModelConfig:
    """Parse a config.pbtxt. Raises: ConfigError if it does not match Triton's schema."""
    try:
        return text_format.Parse(config, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ConfigError(f"config.pbtxt cannot be read: {error}") from error


def new_config() -> str:
    """Return the config.pbtxt that a model starts with; it describes no version yet."""
    return Path(__file__).with_name("config.pbtxt").read_text()


def pinned(config: str) -> list[int]:
    """Return the pinned versions, ascending. Raises: ConfigError if none is named."""
    versions = sorted(parse(config).version_policy.specific.versions)
    if not versions:
        raise ConfigError(
            "config.pbtxt must name the versions to serve:"
            " version_policy: { specific: { versions: [ 1 ] } }"
        )
    return versions


def parameters(config: str) -> dict[str, str]:
    """Return the parameters. Raises: ConfigError."""
    return {key: value.string_value for key, value in parse(config).parameters.items()}


def with_lines(config: str, lines: Mapping[str, str]) -> str:
    """Return a config.pbtxt with the lines of these fields replaced.

    Raises: ConfigError if a field is not on one line of its own.
    """
    changed, expected = config, parse(config)
    for field, line in lines.items():
        changed = re.sub(rf"^{field}\b.*$", line, changed, flags=re.MULTILINE)
        expected.ClearField(field)
        expected.MergeFrom(parse(line))
    return _checked(changed, expected, ", ".join(lines))


def with_release(config: str, versions: Sequence[int], values: Mapping[str, str | None]) -> str:
    """Return a config.pbtxt with these pinned versions and parameters; None removes a parameter.

    Raises: ConfigError if the version policy or a parameter is not on one line of its own.
    """
    pins = ", ".join(map(str, sorted(versions)))
    policy = f"version_policy: {{ specific: {{ versions: [ {pins} ] }} }}"
    changed = with_lines(config, {"version_policy": policy})
    expected = parse(changed)
    for key, value in values.items():
        expected.parameters.pop(key, None)
        line = ""
        if value is not None:
            expected.parameters[key].string_value = value
            entry = f"key: {json.dumps(key)} value: {{ string_value: {json.dumps(value)} }}"
            line = f"parameters {{ {entry} }}\n"
        changed, found = re.subn(
            rf'^parameters\W+key: "{key}".*(?:\n|\Z)',
            line.replace("\\", r"\\"),
            changed,
            flags=re.MULTILINE,
        )
        if not found and line:
            changed = changed.removesuffix("\n") + "\n" + line
    return _checked(changed, expected, "version_policy and parameters")


def on_one_line(message: Message) -> str:
    """Format a part of the configuration for config.pbtxt."""
    line: str = text_format.MessageToString(message, as_one_line=True)
    return line


def as_json(config: str) -> str:
    """Convert a config.pbtxt for Triton's load call, which can take a configuration."""
    return (
        json.dumps(
            json_format.MessageToDict(parse(config), preserving_proto_field_name=True), indent=1
        )
        + "\n"
    )


def _checked(config: str, expected: model_config_pb2.ModelConfig, what: str) -> str:
    try:
        if parse(config) == expected:
            return config
    except ConfigError:
        pass
    raise ConfigError(
        f"config.pbtxt must have each of its fields on one line of its own, and each once: {what}"
    )
