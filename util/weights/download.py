"""Checkpoints by URL and hash, `https://host/path/file.pth#sha256=...`: downloaded once, and checked before every use.

They are kept in torch's cache, `$TORCH_HOME/hub/checkpoints`.

Not by `torch.hub.download_url_to_file`: it follows redirects to http and has no timeout, unless an opener is installed
for the whole process.
"""

import errno
import os
import re
import shutil
import ssl
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, build_opener

import torch

from util import digests
from util.errors import CheckpointError, StorageError, printable
from util.log import info

FORM = 'https://host/path/file.pth#sha256=<64 hexadecimal digits>'
TIMEOUT_S = 60
UNREACHABLE = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}
NETWORK = (URLError, ConnectionError, TimeoutError, ssl.SSLError, HTTPException, ValueError)


def fetch(source: str | Path) -> Path:
    """The local file of a checkpoint: a path as it is; for a URL, the file in the cache, downloaded if need be.

    Processes of one machine take turns, so one of them downloads. Raises CheckpointError for another form of URL, a
    host that does not answer well, and another hash; StorageError for a disk that cannot take the file.
    """
    if '://' not in str(source):
        return Path(source)
    # no user, password or query: the arguments of a run are printed and kept
    wanted = re.fullmatch(r'(https://[\w.:\[\]-]+/(?:[^\s?#@]*/)?([^\s?#@/]*))#sha256=([0-9a-fA-F]{64})', str(source))
    if not wanted:
        raise CheckpointError(f'{printable(source, 200)}: a checkpoint is a local path, or {FORM}')
    url, last, sha256 = wanted[1], wanted[2], wanted[3].lower()
    name = f'{sha256}-{last}' if re.fullmatch('[A-Za-z0-9._-]{1,100}', last) else sha256
    path = Path(torch.hub.get_dir()) / 'checkpoints' / name
    try:
        with digests.alone(path.with_name(f'.{name}.lock')):
            if not (path.is_file() and digests.sum_of(path) == sha256):
                for unfinished in path.parent.glob(f'.{name}.*.tmp'):  # of a process that was killed
                    unfinished.unlink()
                info(f'downloading {url} to {path}')
                download(url, path, sha256)
    except HTTPError as error:
        raise CheckpointError(f'{url}: the server answers {error.code} {printable(error.reason, 80)}') from error
    except (*NETWORK, OSError) as error:
        if not isinstance(error, NETWORK) and error.errno not in UNREACHABLE:
            raise StorageError(f'{path} cannot be written: {error.strerror or error}') from error
        why = getattr(error, 'reason', None) or str(error) or type(error).__name__
        raise CheckpointError(f'{url} cannot be downloaded: {printable(why, 200)}') from error
    return path


def download(url: str, path: Path, sha256: str) -> None:
    """Raises CheckpointError for another hash; nothing stays then."""
    with digests.temporary_for(path) as part:
        with open(part, 'wb') as file, build_opener(HttpsOnly).open(url, timeout=TIMEOUT_S) as answer:
            shutil.copyfileobj(answer, file)
        if (found := digests.sum_of(part)) != sha256:
            raise CheckpointError(f'{url}: its SHA-256 is {found}, not {sha256}: cut short, or another file; deleted')
        os.replace(part, path)


class HttpsOnly(HTTPRedirectHandler):
    """Follows no redirect to where others can read along."""

    def redirect_request(self, request, file, code, message, headers, url):
        if not url.startswith('https://'):
            raise CheckpointError(f'{request.full_url} redirects to {printable(url, 200)}, which is not https')
        return super().redirect_request(request, file, code, message, headers, url)
