"""Files that are written whole or not at all: under another name first, then renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replaces the file, if there is one. UTF-8."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: object) -> None:
    """Indented, with a line break at the end."""
    write_text(path, json.dumps(content, indent=2) + "\n")
