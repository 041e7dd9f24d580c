"""Checkpoints that a URL with a hash names, `https://host/path/file.pth#sha256=...`: fetched once, and held against it.

They are kept in torch's cache, `$TORCH_HOME/hub/checkpoints`. Nothing there is used before its hash is right.
"""

import contextlib
import fcntl
import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch

from util import digests
from util.errors import CheckpointError, StorageError
from util.log import info
from util.weights.unpickle import printable

FORM = 'https://host/path/file.pth#sha256=<64 hexadecimal digits>'
TIMEOUT_S, CHUNK = 60, 2**20


def is_url(source: str | Path) -> bool:
    return '://' in str(source)


def fetch(source: str | Path) -> Path:
    """The local file of a checkpoint: a path as it is, and what a URL names from the cache, or else from its host.

    Processes of one machine take turns, so one of them downloads. Raises CheckpointError for another form of URL, a
    host that does not answer well, and another hash; StorageError for a disk that cannot take the file.
    """
    if not is_url(source):
        return Path(source)
    # no user, password or query: the arguments of a run are printed and kept
    wanted = re.fullmatch(r'(https://[\w.:\[\]-]+/[^\s?#@]*)#sha256=([0-9a-fA-F]{64})', source)
    if not wanted:
        raise CheckpointError(f'{printable(source, 200)}: a checkpoint is a local path, or {FORM}')
    url, sha256 = wanted[1], wanted[2].lower()
    path = Path(torch.hub.get_dir()) / 'checkpoints' / file_name(url, sha256)
    with storage(path), alone(path):
        if not (path.is_file() and digests.sum_of(path) == sha256):
            download(url, path, sha256)
    return path


def file_name(url: str, sha256: str) -> str:
    """Made from the hash; the URL's last part is added if it is a plain name."""
    last = urllib.parse.urlsplit(url).path.rpartition('/')[2]
    return f'{sha256}-{last}' if re.fullmatch('[A-Za-z0-9._-]{1,100}', last) else sha256


def download(url: str, path: Path, sha256: str) -> None:
    """Write to a temporary file, and rename it if its hash is right; else nothing stays."""
    info(f'downloading {url} to {path}')
    part, size = path.with_name(f'.{path.name}.part'), 0
    try:
        with open(part, 'wb') as file, network(url), opener().open(url, timeout=TIMEOUT_S) as answer:
            length = answer.headers.get('Content-Length')
            while chunk := answer.read(CHUNK):
                with storage(path):
                    size += file.write(chunk)
        if length and size != int(length):
            raise CheckpointError(f'{url}: the connection was lost after {size} of {length} bytes')
        if (found := digests.sum_of(part)) != sha256:
            raise CheckpointError(f'{url}: its SHA-256 is {found}, not {sha256}; what was downloaded is deleted')
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows no redirect to where the connection would be open to others."""

    def redirect_request(self, request, file, code, message, headers, url):
        if urllib.parse.urlsplit(url).scheme != 'https':
            raise CheckpointError(f'{request.full_url} redirects to {printable(url, 200)}, which is not https')
        return super().redirect_request(request, file, code, message, headers, url)


def opener() -> urllib.request.OpenerDirector:
    """Certificates are verified, with the system's authorities or `SSL_CERT_FILE`'s."""
    return urllib.request.build_opener(HttpsOnly)


# --------------------------------------------------------------------------
# what may go wrong, in one line


@contextlib.contextmanager
def network(url: str) -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        raise CheckpointError(f'{url}: the server answers {error.code} {printable(error.reason)}') from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = getattr(error, 'reason', None) or str(error) or type(error).__name__
        raise CheckpointError(f'{url} cannot be downloaded: {printable(why, 200)}') from error


@contextlib.contextmanager
def storage(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f'{path} cannot be written: {error.strerror or error}') from error


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process of a machine at a time; the lock of one that dies is free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f'.{path.name}.lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
