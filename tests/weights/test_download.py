"""Checkpoints by URL: https and a hash or nothing, downloaded once, and never believed without the hash."""

import errno
import hashlib
import http.server
import os
import resource
import shutil
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from training import MAINS, arguments, make_images, train

from util.errors import RunError, run_main
from util.weights import download

FILE = bytes(range(256)) * 10_000
SHA256 = hashlib.sha256(FILE).hexdigest()
WRONG = '0' * 64


@pytest.fixture(scope='module')
def certificate(tmp_path_factory):
    """Of localhost, signed by itself."""
    if not shutil.which('openssl'):
        pytest.skip('no openssl binary to make a certificate with')
    folder = tmp_path_factory.mktemp('certificate')
    line = ['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '1', '-subj', '/CN=localhost']
    line += ['-addext', 'subjectAltName=DNS:localhost', '-keyout', folder / 'key.pem', '-out', folder / 'cert.pem']
    subprocess.run(line, check=True, capture_output=True, timeout=90)
    return folder


class Handler(http.server.BaseHTTPRequestHandler):
    """What `files` holds under a path: bytes, the address of a redirect, or a number of bytes that never come."""

    def do_GET(self):
        self.server.asked.append(self.path)
        found = self.server.files.get(self.path)
        code = {bytes: 200, int: 200, str: 302}.get(type(found), 404)
        self.send_response(code)
        if isinstance(found, str):
            self.send_header('Location', found)
        size = len(found) if isinstance(found, bytes) else found if isinstance(found, int) else 0
        self.send_header('Content-Length', str(size))
        self.end_headers()
        self.wfile.write(found if isinstance(found, bytes) else b'some' if isinstance(found, int) else b'')

    def log_message(self, *args):
        pass


@pytest.fixture
def host(certificate, tmp_path, monkeypatch):
    """A host whose certificate is trusted, and an empty cache: url(path, sha256), files, asked, cache."""
    with http.server.ThreadingHTTPServer(('localhost', 0), Handler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate / 'cert.pem', certificate / 'key.pem')
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.files, server.asked = {'/a/net.pth': FILE}, []
        server.handle_error = lambda request, address: None  # a client that does not trust the certificate
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setenv('SSL_CERT_FILE', str(certificate / 'cert.pem'))
        monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
        monkeypatch.setenv('no_proxy', '*')
        base = f'https://localhost:{server.server_port}'
        yield SimpleNamespace(
            url=lambda path='/a/net.pth', sha256=SHA256: f'{base}{path}#sha256={sha256}',
            base=base,
            files=server.files,
            asked=server.asked,
            cache=tmp_path / 'cache/hub/checkpoints',
        )
        server.shutdown()
        thread.join()


def kept(host) -> list[str]:
    """Files of the cache, less the locks."""
    return sorted(path.name for path in host.cache.iterdir() if path.suffix != '.lock')


def refused(source: str) -> str:
    with pytest.raises(RunError) as caught:
        download.fetch(source)
    assert caught.value.code == 2
    line = str(caught.value)
    assert '\n' not in line
    return line


@pytest.mark.parametrize(
    'source',
    [
        f'http://host/net.pth#sha256={SHA256}',
        f'ftp://host/net.pth#sha256={SHA256}',
        f'file:///etc/net.pth#sha256={SHA256}',
        f's3://host/net.pth#sha256={SHA256}',
        f'HTTPS://host/net.pth#sha256={SHA256}',
        'https://host/net.pth',
        'https://host/net.pth#sha256=',
        f'https://host/net.pth#sha256={SHA256[:-1]}',
        f'https://host/net.pth#sha256={SHA256}0',
        f'https://host/net.pth#sha256={SHA256}\n',
        f'https://host/net.pth#sha256={"g" * 64}',
        f'https://host/net.pth#md5={SHA256}',
        f'https://user:secret@host/net.pth#sha256={SHA256}',
        f'https://host/net.pth?token=secret#sha256={SHA256}',
        f'https://host#sha256={SHA256}',
        f'https:///net.pth#sha256={SHA256}',
        f'file:///x https://host/net.pth#sha256={SHA256}',
        f'https://host/a\x1b[2J b.pth#sha256={SHA256}',
    ],
)
def test_other_urls_are_refused(source, monkeypatch):
    monkeypatch.setattr(download, 'build_opener', lambda *handlers: pytest.fail('the network was asked'))
    line = refused(source)
    assert line.endswith(f': a checkpoint is a local path, or {download.FORM}')
    assert line.isprintable()


def test_a_path_is_a_path():
    assert download.fetch('runs/a.pth') == Path('runs/a.pth')
    assert download.fetch(Path('/a.pth')) == Path('/a.pth')


def test_downloaded_once(host):
    """By one of several at a time; later from the cache, which is checked, and fetched anew where it is damaged."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(download.fetch(host.url()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [host.cache / f'{SHA256}-net.pth'] * 4
    assert found[0].read_bytes() == FILE
    assert host.asked == ['/a/net.pth']
    assert kept(host) == [found[0].name]
    assert download.fetch(host.url(sha256=SHA256.upper())) == found[0]
    assert host.asked == ['/a/net.pth']

    found[0].write_bytes(FILE[:-1] + b'!')
    assert download.fetch(host.url()).read_bytes() == FILE
    assert host.asked == ['/a/net.pth'] * 2


def test_the_lock_of_a_dead_process_is_free(host):
    host.cache.mkdir(parents=True)
    hold = 'import fcntl, sys; f = open(sys.argv[1], "w"); fcntl.flock(f, 2); print(1, flush=True); sys.stdin.read()'
    line = [sys.executable, '-c', hold, host.cache / f'.{SHA256}-net.pth.lock']
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        thread = threading.Thread(target=lambda: download.fetch(host.url()))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert host.asked == []
        holder.kill()
    thread.join(30)
    assert kept(host) == [f'{SHA256}-net.pth']


@pytest.mark.parametrize(
    ('path', 'name'),
    [
        ('/' + 'n' * 101, SHA256),
        ('/a/..%2F..%2Fb.pth', SHA256),
        ('/a/b%00.pth', SHA256),
        ('/a/', SHA256),
        ('/a/..', f'{SHA256}-..'),
        ('/.bashrc', f'{SHA256}-.bashrc'),
    ],
)
def test_names_are_made_from_the_hash(host, path, name):
    host.files[path] = FILE
    assert download.fetch(host.url(path)) == host.cache / name
    assert kept(host) == [name]


def test_what_a_kill_has_left_is_removed(host):
    """A part of a file under the name of the process that was killed; not that of another download."""
    host.cache.mkdir(parents=True)
    for name in (f'.{SHA256}-net.pth.999999.tmp', f'.{WRONG}-net.pth.999999.tmp'):
        (host.cache / name).write_bytes(FILE[:10])
    download.fetch(host.url())
    assert kept(host) == sorted([f'.{WRONG}-net.pth.999999.tmp', f'{SHA256}-net.pth'])


def unreachable(*args) -> None:
    """What a network that breaks in the middle of a download raises."""
    raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))


def test_what_a_host_does_wrong(host, monkeypatch, tmp_path):
    """One line each, and nothing stays."""
    host.files |= {'/cut': len(FILE), '/open': 'http://localhost/a', '/etc': 'file:///etc/passwd', '/loop': '/loop'}
    host.files |= {'/moved': '/a/net.pth'}
    assert f'its SHA-256 is {SHA256}, not {WRONG}: cut short, or another file' in refused(host.url(sha256=WRONG))
    assert 'the server answers 404 Not Found' in refused(host.url('/none'))
    assert f'not {SHA256}: cut short' in refused(host.url('/cut'))
    assert 'redirects to http://localhost/a, which is not https' in refused(host.url('/open'))
    assert "Redirection to url 'file:///etc/passwd' is not allowed" in refused(host.url('/etc'))
    assert 'the server answers 302' in refused(host.url('/loop'))
    assert kept(host) == []
    assert download.fetch(host.url('/moved')).read_bytes() == FILE

    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, 'copyfileobj', unreachable)
        assert 'net.pth cannot be downloaded: [Errno 113] No route to host' in refused(host.url(sha256=WRONG))
    assert 'cannot be downloaded' in refused(f'https://localhost:1/net.pth#sha256={WRONG}')
    assert 'cannot be downloaded' in refused(f'https://no-such-host.invalid/net.pth#sha256={WRONG}')
    monkeypatch.setenv('SSL_CERT_FILE', str(tmp_path / 'none.pem'))
    assert 'certificate verify failed' in refused(host.url(sha256=WRONG))
    assert kept(host) == [f'{SHA256}-moved']


@pytest.mark.fault(13)
def test_a_full_disk(host):
    """The limit on a file's size is the disk's; nothing stays of the download."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(FILE) // 2, hard))
    try:
        with pytest.raises(RunError, match=r'net\.pth cannot be written: File too large') as caught:
            download.fetch(host.url())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code == 5
    assert kept(host) == []


def test_a_cache_that_cannot_be(host, monkeypatch, tmp_path):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'file'))
    with pytest.raises(RunError, match='cannot be written: Not a directory') as caught:
        download.fetch(host.url())
    assert caught.value.code == 5


def test_evaluated_from_a_url(host, tmp_path, capsys):
    """The same as from the path; fine-tuning and pictures read by the same function."""
    data, flags = make_images(tmp_path / 'images'), ['--batch_size', '32', '--epochs', '1', '--warmup_epochs', '0']
    train('finetune', data, tmp_path / 'run', *flags)
    path = tmp_path / 'run/checkpoint-best.pth'
    host.files['/best.pth'] = path.read_bytes()
    url = host.url('/best.pth', hashlib.sha256(path.read_bytes()).hexdigest())
    capsys.readouterr()
    lines = []
    for source in (path, url):
        main = MAINS['finetune']
        argv = arguments(data, tmp_path / 'out', '--eval', '--resume', source)
        main.main(main.get_args_parser().parse(argv, stage='finetune'))
        lines.append(capsys.readouterr().out.splitlines())
    assert lines[0][-2:] == lines[1][-2:]
    assert lines[1][0].startswith(f'downloading {url.partition("#")[0]} to ')
    argv = arguments(data, tmp_path / 'out', '--eval', '--resume', host.url('/best.pth', WRONG))
    with pytest.raises(SystemExit) as end:
        run_main(lambda: main.main(main.get_args_parser().parse(argv, stage='finetune')))
    assert end.value.code == 2
    assert capsys.readouterr().err.count('\n') == 1
