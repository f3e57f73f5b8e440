"""Downloads weights from the Hugging Face hub, and verifies their hash.

This module must not import TensorFlow or Keras: the settings check the names that it reads.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from typing import NamedTuple

from research.system.errors import UserError, one_line

SCHEME = "hf://"
FILE = "model.safetensors"
CHUNK_BYTES = 2**20
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"


class HubFile(NamedTuple):
    """A file of weights that was downloaded.

    Attributes:
      path: the file in the cache of huggingface_hub.
      commit: the commit of the repository, 40 hexadecimal digits.
    """

    path: str
    commit: str


def parse_repository(weights: str) -> tuple[str, str | None]:
    """Splits `hf://OWNER/NAME[@REVISION]` into OWNER/NAME and the branch, tag or commit, or None.

    Raises:
      UserError: if the text has another form.
    """
    match = re.fullmatch(rf"{SCHEME}({_PART}/{_PART})(?:@({_PART}(?:/{_PART})*))?", weights)
    if match is None:
        raise UserError(
            f"weights is {weights!r}; expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION"
        )
    return match[1], match[2]


def download_weights(weights: str) -> HubFile:
    """Downloads `model.safetensors` of a repository once; later it is read from the hub's cache.

    The cache is also used without a network. Each time, the content is compared with the hash under
    which the cache has it, which is the hash that the hub gave.

    Args:
      weights: the repository, as `hf://OWNER/NAME[@REVISION]`.

    Raises:
      UserError: huggingface_hub is not installed, the download failed, or the hash is wrong or
        not known.
    """
    repository, revision = parse_repository(weights)
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(
            f"weights is {weights!r}, but the package huggingface_hub is not installed; install "
            "this project with pip install -e '.[hub]'"
        )
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(repository, FILE, revision=revision)
    except Exception as error:
        # huggingface_hub raises exceptions without a common base, besides those of its HTTP client.
        raise UserError(
            f"weights is {weights!r}; could not download {FILE} ({one_line(error)}); check the "
            "name, or download the file and give its path"
        ) from error
    # The cache has a link in a folder named by the commit, to a file named by its hash.
    file = os.path.realpath(path)
    if not os.path.islink(path):
        raise UserError(
            f"weights is {weights!r}; the cache of huggingface_hub has no symbolic links there, so "
            f"the hash of {path} cannot be verified; set HF_HOME to a folder on a file system with "
            "links, or give the path of the file"
        )
    if not _has_hash(file, os.path.basename(file)):
        raise UserError(
            f"weights is {weights!r}; the downloaded file {file} does not have the hash of the "
            "hub: delete it, and run the command again"
        )
    return HubFile(path, os.path.basename(os.path.dirname(path)))


def _has_hash(file: str, expected: str) -> bool:
    """Returns whether a file has a SHA-256, or a SHA-1 of git for a file that is not large."""
    if len(expected) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % os.path.getsize(file), usedforsecurity=False)
    with open(file, "rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == expected
