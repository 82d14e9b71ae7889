"""The tokenizer's files as one zip, for gateways that tokenise themselves."""

from __future__ import annotations

import hashlib
import io
import zipfile
from functools import lru_cache
from pathlib import Path

#: what a gateway needs to build the tokenizer; weights are none of its business
_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "config.json", "generation_config.json",
)  # fmt: skip


@lru_cache(maxsize=1)
def tokenizer_archive(directory: Path) -> tuple[bytes, str]:
    """The zip and its SHA-256 in hex, made once per process: deflating 10 MB takes half a second. Any thread.

    The same bytes for the same files: entries carry no time of their own.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (directory / name for name in _FILES):
            if path.is_file():
                archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes(), zipfile.ZIP_DEFLATED)
    content = buffer.getvalue()
    return content, hashlib.sha256(content).hexdigest()
