#!/bin/sh
# The project's version, from pyproject.toml.
sed -nE 's/^version = "(.+)"$/\1/p' "$(dirname "$0")/../pyproject.toml"
