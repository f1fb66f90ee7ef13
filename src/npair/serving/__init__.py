"""The code that is copied into every version; it imports nothing else of npair."""

from __future__ import annotations

import ast
from pathlib import Path


def code_of(module: str) -> list[Path]:
    """Return the file of a module of this package, then those of all modules that it needs."""
    files = [Path(__file__).with_name(f"{module}.py")]
    for file in files:  # grows meanwhile
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                found = [file.with_name(f"{name}.py") for name in names]
                files += [other for other in found if other not in files]
    return files
