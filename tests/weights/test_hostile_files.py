"""Files made to do harm: every one is refused in one line, and nothing in it is run, allocated or written.

A file of `live_files` makes its marker file when it is trusted: a subprocess that trusts them all shows it.
"""

import argparse
import ast
import contextlib
import copyreg
import functools
import hashlib
import io
import os
import pathlib
import pickle
import re
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Iterator

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from training import make_images, train

import models_a2mim
import models_mirl
from main_pretrain import find_method, get_args_parser
from util import build, digests
from util.errors import CheckpointError, UserError
from util.recipes import RecipeLoader
from util.weights import load_published, read_checkpoint
from util.weights.files import LEGACY_MAGIC

ROOT = pathlib.Path(__file__).parents[2]


class Call:
    """Pickles as a call of `function`, made when it is loaded; can itself be the function of a call."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args

    def __call__(self):
        raise AssertionError


@functools.cache
def classifier():
    torch.manual_seed(0)
    size = dict(patch_size=4, embed_dim=8, depth=1, num_heads=2)
    return models_mirl.create_classifier('mirl_vit_small', 3, img_size=8, **size)


def torch_file(content, zipped: bool = True, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def rezipped(change: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file of torch.save with records replaced and added."""
    source, target = zipfile.ZipFile(io.BytesIO(torch_file({'model': classifier().state_dict()}))), io.BytesIO()
    records = {name: source.read(name) for name in source.namelist()} | change
    with zipfile.ZipFile(target, 'w', compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return target.getvalue()


# --------------------------------------------------------------------------
# what runs when it is trusted: kind -> (name that the refusal must tell, files)


def live_files(marker: str) -> dict[str, tuple[str, list[bytes]]]:
    system = Call(os.system, f'touch {marker}')
    make = f'open({marker!r}, "w").close()'
    array = np.ones((2, 2), 'f4')
    objects = np.empty(1, dtype=object)
    objects[0] = system
    state = Call(functools.partial, print)
    state.__class__ = type(
        'Built',
        (Call,),
        {'__reduce__': lambda self: (functools.partial, (print,), (os.system, (f'touch {marker}',), {}, {}))},
    )
    text = f"(S'touch {marker}'\n"
    legacy = [pickle.dumps(x, 2) for x in (LEGACY_MAGIC, 1001, system, {}, [])]

    def pickles(content, protocols=(2, 4)) -> list[bytes]:
        return [pickle.dumps({'model': content}, protocol) for protocol in protocols]

    return {
        'os.system by reduce': ('posix.system', pickles(system)),
        'os.system, protocol 0': ('posix.system', [pickle.dumps(system, 0)]),
        'eval': ('builtins.eval', pickles(Call(eval, make))),
        'exec': ('builtins.exec', pickles(Call(exec, make))),
        'subprocess.Popen': ('.Popen', pickles(Call(subprocess.Popen, ['touch', marker]))),
        'getattr chain': ('builtins.getattr', pickles(Call(Call(getattr, pathlib.Path(marker), 'touch')))),
        'partial': ('functools.partial', pickles(Call(functools.partial(os.system, f'touch {marker}')))),
        'dotted name': ('pathlib.Path.touch', pickles(Call(pathlib.Path.touch, pathlib.Path(marker)), (4,))),
        'object array': ('', pickles(objects)),
        'Namespace': ('posix.system', pickles(argparse.Namespace(lr=1e-3, hook=system))),
        'weights and a Namespace, zip': (
            'posix.system',
            [
                torch_file({'model': classifier().state_dict(), 'args': argparse.Namespace(hook=system)}, protocol=p)
                for p in (2, 4)
            ],
        ),
        'weights and a Namespace, legacy': (
            'posix.system',
            [torch_file({'model': classifier().state_dict(), 'args': argparse.Namespace(hook=system)}, zipped=False)],
        ),
        'legacy header': ('posix.system', [b''.join(legacy)]),
        'zip with another pickle': ('posix.system', [rezipped({'archive/data.pkl': pickle.dumps(system, 2)})]),
        "Paddle's DenseTensor": ('builtins.eval', pickles(Call(eval, f'({make}, data)', {'data': array}))),
        'pickle in a pickle': ('pickle.loads', pickles(Call(pickle.loads, pickle.dumps(system)))),
        'BUILD of a state': ('functools.partial', pickles(Call(state), (4,))),
        'copyreg': (
            'copyreg._reconstructor',
            pickles(Call(copyreg._reconstructor, subprocess.Popen, subprocess.Popen, ['touch', marker]), (4,)),
        ),
        'INST opcode': ('', [f'{text}ios\nsystem\n.'.encode()]),
        'OBJ opcode': ('os.system', [f"(cos\nsystem\nS'touch {marker}'\no.".encode()]),
    }


# --------------------------------------------------------------------------
# what lies about sizes, names or types: kind -> files

FRAME = b'\x80\x04}\x8c\x05model'  # {'model': ...
HUGE = 10**12


def array_pickle(shape: tuple, data: bytes, dtype: str = 'f4', start: tuple = (0,)) -> bytes:
    """What numpy pickles, with lies."""

    class Reconstruct:
        def __reduce__(self):
            state = (1, shape, np.dtype(dtype), False, data)
            return np.zeros(1).__reduce__()[0], (np.ndarray, start, b'b'), state

    return pickle.dumps({'model': Reconstruct()}, 4)


def tensor_pickle(size: tuple, stride: tuple, offset: int = 0, key: str = '0', numel: int = 4) -> bytes:
    """data.pkl of {'model': tensor}."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, None)

    class Pickler(pickle._Pickler):
        def persistent_id(self, value):
            return ('storage', torch.FloatStorage, key, 'cpu', numel) if isinstance(value, Storage) else None

    file = io.BytesIO()
    Pickler(file, 2).dump({'model': Tensor()})
    return file.getvalue()


def tensor_files(*args, **kwargs) -> list[bytes]:
    """A lying tensor in both of torch's formats."""
    data = tensor_pickle(*args, **kwargs)
    legacy = [pickle.dumps(x, 2) for x in (LEGACY_MAGIC, 1001, {})]
    legacy += [data.replace(b'K\x04t', b'K\x04Nt'), pickle.dumps(['0'], 2), struct.pack('<q', 4), bytes(16)]
    return [in_zip(data, bytes(16)), b''.join(legacy)]


def in_zip(pickled: bytes, storage: bytes = b'') -> bytes:
    """A file of torch's format around a pickle."""
    return rezipped({'archive/data.pkl': pickled, 'archive/data/0': storage})


def safetensors_file(header: bytes, length: int | None = None) -> bytes:
    return struct.pack('<Q', len(header) if length is None else length) + header + bytes(16)


def nested_tuples(depth: int) -> bytes:
    """((((), ()), ((), ())), ...): two to the power of `depth` in a few bytes, for whoever hashes or prints it."""
    return b')\x94' + b''.join(b'h%ch%c\x86\x94' % (i, i) for i in range(depth)) + b'h%c' % depth


def lying_files(marker: str) -> dict[str, list[bytes]]:
    """Every pickle as it is, and (but for the longest, which take seconds to trace) inside torch's zip."""
    kinds = pickles_and_files(marker)
    for files in kinds.values():
        files += [in_zip(data) for data in files if data.startswith(b'\x80') and len(data) < 10_000]
    return kinds


def pickles_and_files(marker: str) -> dict[str, list[bytes]]:
    entry = b'{"cls_token": {"dtype": "F32", "shape": %s, "data_offsets": [0, %d]}}'
    allowed_call = b'\x80\x02cnumpy.core.multiarray\n_reconstruct\n'
    return {
        'a byte string of a terabyte': [
            FRAME + b'\x8e' + struct.pack('<Q', HUGE) + b'xs.',
            FRAME + b'\x96' + struct.pack('<Q', HUGE) + b'xs.',
            FRAME + b'B' + struct.pack('<I', 2**32 - 1) + b'xs.',
            b'\x80\x04\x95' + struct.pack('<Q', HUGE) + FRAME[2:] + b'Ns',
        ],
        'an array of a terabyte': [
            array_pickle((HUGE,), b'1234'),
            array_pickle((-1, -1), b'1234'),
            array_pickle((2**63, 2), b''),
            array_pickle((1,), b'1234', start=(HUGE,)),
            pickle.dumps({'model': Call(bytearray, HUGE)}, 4),
            pickle.dumps({'model': Call(bytes, HUGE)}, 4),
            pickle.dumps({'model': Call(bytearray, 10**9)}, 2),
            pickle.dumps({'model': Call(torch.FloatTensor, 10**9)}, 2),
        ],
        'a tensor of a terabyte': [
            *tensor_files((HUGE,), (1,)),
            *tensor_files((HUGE,), (0,)),
            *tensor_files((2, 2), (1, 1), offset=HUGE),
            *tensor_files((4,), (-1,), offset=3),
            *tensor_files((-1, -4), (1, 1)),
            *tensor_files((4,), (1,), numel=HUGE),
        ],
        'a memo of a terabyte': [b'\x80\x02}r' + struct.pack('<I', 2**31) + b'j' + struct.pack('<I', 2**31 - 1) + b'.'],
        'a key that takes for ever': [
            b'\x80\x04}' + nested_tuples(60) + b'Ns.',
            b'\x80\x04' + nested_tuples(60) + b'\x8c\x01x\x93.',
            b'\x80\x02ccollections\nOrderedDict\n]]' + nested_tuples(60) + b'aNaa\x85R.',
            b'\x80\x02)q\x00' + b''.join(b'h%ch%c\x86q%c' % (i, i, i + 1) for i in range(60)) + b'}h%cNs.' % 60,
        ],
        'a stack without end': [
            b'\x80\x02' + b'(' * 100_000,
            b'\x80\x02' + b']' * 100_000 + b'a' * 99_999 + b'.',
            b'\x80\x02R.',
        ],
        'attributes set on what may be called': [
            allowed_call + b'}U\x08__code__K\x01sb.',
            allowed_call + b'N}X\x08\x00\x00\x00__code__K\x01s\x86b.',
            b'\x80\x02cargparse\nNamespace\n}X\x0c\x00\x00\x00__setstate__cnumpy\ndtype\nsb.',
        ],
        'bytes given to _reconstruct': [
            pickle.dumps({'model': Call(np.zeros(1).__reduce__()[0], np.ndarray, b'x', b'b')})
        ],
        'types that hold objects': [
            array_pickle((1,), b'12345678', dtype='O'),
            array_pickle((1,), b'12345678', dtype='M8[s]'),
            pickle.dumps({'model': np.zeros(2, [('a', 'O'), ('b', 'f4')])}, 4),
            pickle.dumps({'model': np.dtype('O')}, 4),
        ],
        'opcodes of the extension registry': [b'\x80\x02\x82\x01)R.', b'\x80\x02\x84\x01\x00\x00\x00)R.'],
        'other rebuilders of torch': [
            torch_file({'model': torch.eye(3).to_sparse()}),
            torch_file({'model': torch.ones(3, dtype=torch.uint16)}),
            torch_file({'model': torch.nn.Linear(2, 2)}),
        ],
        'paths out of the zip': [
            rezipped({'../../marker': b'x'}),
            rezipped({marker: b'x'}),
            rezipped({'archive/../../marker': b'x'}),
            rezipped({'archive/data.pkl': tensor_pickle((4,), (1,), key='../../../../etc/passwd')}),
        ],
        'a zip bomb': [
            rezipped({'archive/data/0': bytes(10**7)}, zipfile.ZIP_DEFLATED),
            lying_record(10**9),
        ],
        'TorchScript': [rezipped({'archive/data.pkl': b'\x80\x02c__torch__.model\nNet\n)\x81}b.'})],
        'safetensors with a lying header': [
            safetensors_file(b'{}', HUGE),
            safetensors_file(b'{}', 2**64 - 1),
            safetensors_file(entry % (b'[%d]' % HUGE, 16)),
            safetensors_file(entry % (b'[%d]' % (HUGE // 4), HUGE)),
            safetensors_file(entry % (b'[4]', 8)),
            safetensors_file(b'{' * 10_000),
        ],
        'random bytes': [np.random.default_rng(i).bytes(1000) for i in range(20)],
    }


def lying_record(size: int) -> bytes:
    """A zip whose directory promises more of a record than the file has."""
    data = bytearray(rezipped({}))
    place = data.rindex(b'PK\x01\x02')
    data[place + 20 : place + 28] = struct.pack('<II', size, size)
    return bytes(data)


# --------------------------------------------------------------------------


def refusals(path: pathlib.Path) -> Iterator[str]:
    """The lines that both readers refuse a file with."""
    for read in (read_checkpoint, functools.partial(load_published, classifier())):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        yield str(caught.value).removeprefix(str(path))


def write(folder: pathlib.Path, files: list[bytes]) -> list[pathlib.Path]:
    paths = [folder / f'{i}.{"safetensors" if data[8:9] == b"{" else "pth"}' for i, data in enumerate(files)]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    return paths


TRUST = """
import contextlib, pathlib, pickle, sys, torch
for path in map(pathlib.Path, sys.argv[1:]):
    with contextlib.suppress(Exception):
        pickle.loads(path.read_bytes())
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
"""


@pytest.mark.promise(12)
@pytest.mark.fault(5)
def test_live_files(tmp_path, measured):
    """None runs when we read it; each does when a subprocess trusts it."""
    markers, files = {}, {}
    for kind, (name, contents) in live_files('MARKER').items():
        for i in range(len(contents)):
            folder = tmp_path / f'{kind} {i}'.replace(' ', '_').replace("'", '')
            folder.mkdir()
            marker = folder / 'marker'
            [files[folder]] = write(folder, [live_files(str(marker))[kind][1][i]])
            markers[folder] = marker
            for line in refusals(files[folder]):
                assert name in line
                assert '\n' not in line
                assert 'weights_only' not in line
            assert not marker.exists()
    kinds = len(live_files('MARKER'))
    assert kinds >= 12
    assert not [folder.name for folder, marker in markers.items() if marker.exists()]
    assert CheckpointError.code == 2

    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': ''}
    subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', TRUST, *files.values()], env=env, timeout=300, capture_output=True
    )
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not all(marker.exists() for marker in markers.values()):
        time.sleep(0.05)  # Popen does not wait
    assert not [str(folder.name) for folder, marker in markers.items() if not marker.exists()]
    measured(f'{len(files)} malicious files ({kinds} kinds) refused, 0 markers made; each runs when it is trusted')


@pytest.mark.timeout(180)
def test_lying_files(tmp_path, monkeypatch, measured):
    """Refused without allocating what they claim."""
    kinds = lying_files(str(tmp_path / 'marker'))
    (tmp_path / 'one/two').mkdir(parents=True)
    monkeypatch.chdir(tmp_path / 'one/two')
    tracemalloc.start()
    for kind, contents in kinds.items():
        folder = tmp_path / kind.replace(' ', '_')
        folder.mkdir()
        for path in write(folder, contents):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with pytest.raises(CheckpointError) as caught:  # `load_published` reads by the same function
                read_checkpoint(path)
            assert '\n' not in str(caught.value)
            assert 'weights_only' not in str(caught.value)
            assert tracemalloc.get_traced_memory()[1] - before < 50e6, path
    tracemalloc.stop()
    assert not list(tmp_path.rglob('marker'))
    files = sum(map(len, kinds.values()))
    measured(f'{len(kinds)} kinds of lying files ({files} files) refused, none of which got 50 MB')


@pytest.mark.parametrize(('kind', 'noticed'), [('zip', 200), ('legacy', 265), ('paddle', 255), ('safetensors', 270)])
def test_damaged_anywhere(tmp_path, kind, noticed, measured):
    """A file with bytes changed, or cut anywhere, is refused or read as it was written; nothing else comes of it.

    Of torch's zip by its checksums; the other formats have none, so there it takes the sum that we write beside a file.
    """
    torch.manual_seed(0)
    state = {'cls_token': torch.randn(1, 1, 4), 'head.weight': torch.randn(2, 4)}
    data = {
        'zip': torch_file(state | {'args': argparse.Namespace(a=pathlib.PosixPath('x'), lr=1e-3)}),
        'legacy': torch_file(state, zipped=False),
        'paddle': pickle.dumps({k: ('w', v.numpy()) for k, v in state.items()}, 4),
        'safetensors': safetensors.torch.save(state),
    }[kind]
    path, rng, refused, altered = tmp_path / 'a.pth', np.random.default_rng(0), 0, 0
    for i in range(300):
        damaged = bytearray(data[: rng.integers(len(data))] if i % 4 == 0 else data)
        for place in rng.integers(len(damaged) or 1, size=i % 3 + 1):
            damaged[place : place + 1] = rng.bytes(1)
        path.write_bytes(damaged)
        digests.beside(path).unlink(missing_ok=True)
        try:
            altered += not holds(read_checkpoint(path), state)
        except CheckpointError:
            refused += 1
        digests.write_sums(path, [hashlib.sha256(data).hexdigest()])
        with contextlib.nullcontext() if damaged == data else pytest.raises(CheckpointError):
            read_checkpoint(path)
    measured(f'damaged {kind}: {refused} of 300 refused, {altered} read with other weights; with a sum beside, 0')
    assert refused >= noticed
    assert kind != 'zip' or not altered


def holds(found: dict, state: dict[str, torch.Tensor]) -> bool:
    """Whether a file's weights are these to the bit; Paddle's are (name, array)."""
    values = {key: value[-1] if isinstance(value, tuple) and value else value for key, value in found.items()}
    return all(key in values and np.array_equal(values[key], value.numpy()) for key, value in state.items())


NOT_A_CHECKPOINT = {
    'a web page': b'<!DOCTYPE html><html><body>404</body></html>',
    'text': b'404: Not Found',
    'random bytes': np.random.default_rng(0).bytes(4096),
}


@pytest.mark.fault(4)
def test_what_is_no_checkpoint(tmp_path):
    """torch's own answer to each is an advice to trust it."""
    path = tmp_path / 'a.pth'
    for content in NOT_A_CHECKPOINT.values():
        path.write_bytes(content)
        with pytest.raises(Exception, match='weights_only'):
            torch.load(path)
        lines = list(refusals(path))
        assert all('not a checkpoint' in line and 'weights_only' not in line for line in lines)
        assert path.read_bytes() == content


@pytest.mark.fault(6)
def test_arguments_and_paths_are_dropped(tmp_path):
    """Files of older programs hold a Namespace or a Path, which torch refuses: read as if these were not there."""
    weights = classifier().state_dict()
    args = argparse.Namespace(lr=1e-3, output_dir=pathlib.PosixPath('runs'))
    for zipped in (True, False):
        (tmp_path / 'a.pth').write_bytes(torch_file({'model': weights, 'args': args}, zipped))
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / 'a.pth', weights_only=True)
        report = load_published(classifier(), tmp_path / 'a.pth')
        assert sorted(weights) == report.loaded
        assert not report.origin


@pytest.mark.fault(7)
@pytest.mark.fault(8)
def test_other_architectures(tmp_path):
    """The first five keys that differ, with both shapes; keys that nothing explains are errors too."""
    path, own = tmp_path / 'a.pth', classifier().state_dict()
    wider = {name: torch.zeros(*value.shape[:-1], value.shape[-1] + 1) for name, value in own.items() if value.ndim}
    cases = (
        (wider, r'\(\d+\): (\w.*?: file \[.*?\], model \[.*?\]; ){5}\.\.\.'),
        (own | {'surplus': torch.ones(3)}, r'surplus: file \[3\], model absent'),
    )
    for weights, words in cases:
        path.write_bytes(torch_file({'model': weights}))
        before = {name: value.clone() for name, value in own.items()}
        with pytest.raises(CheckpointError, match=words):
            load_published(classifier(), path)
        assert all(torch.equal(value, before[name]) for name, value in classifier().state_dict().items())
    lacking = {name: value for name, value in own.items() if name != 'blocks.0.norm1.weight'}
    path.write_bytes(torch_file({'model': lacking}))
    with pytest.raises(CheckpointError, match=r'blocks\.0\.norm1\.weight: file absent, model \[8\]'):
        load_published(classifier(), path)
    headless = {name: value for name, value in own.items() if not name.startswith('head')}
    path.write_bytes(torch_file({'model': headless}))
    assert load_published(classifier(), path).missing == ['head.weight', 'head.bias']


@pytest.mark.promise(12)
def test_own_checkpoints_are_plain_data(tmp_path, measured):
    """Of both mains: torch loads them with weights_only, and they name no class or function beyond tensors'."""
    data, flags = make_images(tmp_path / 'images', 8), ['--batch_size', '8', '--epochs', '1', '--warmup_epochs', '0']
    train('pretrain', data, tmp_path / 'a', *flags)
    train('finetune', data, tmp_path / 'b', *flags, '--use_ema')
    files = [*tmp_path.glob('*/*.pth')]
    for path in files:
        torch.load(path, weights_only=True)
        assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    assert len(files) >= 5
    measured(f'own checkpoints: all {len(files)} load with weights_only=True and name no unsafe globals')


# --------------------------------------------------------------------------
# names out of files, recipes and options


def test_names_in_a_checkpoint_become_no_path(tmp_path, monkeypatch):
    """Whatever a file says of its run is text: nothing is opened, made or looked up under it."""
    (tmp_path / 'one').mkdir()
    monkeypatch.chdir(tmp_path / 'one')
    evil = '../../\x1b[2Jmarker\n'
    args = dict.fromkeys(('model', 'output_dir', 'config', 'resume', 'finetune'), evil) | {'model_kwargs': {}}
    content = {'model': classifier().state_dict(), 'args': args, 'run': {'stage': evil, 'model': evil}}
    (tmp_path / 'a.pth').write_bytes(torch_file(content))
    report = load_published(classifier(), tmp_path / 'a.pth')
    assert str(report.origin).isprintable()
    for weights in (content['model'] | {evil: torch.ones(1)}, {evil: torch.ones(1)}):
        (tmp_path / 'a.pth').write_bytes(torch_file(content | {'model': weights}))
        with pytest.raises(CheckpointError) as caught:
            load_published(classifier(), tmp_path / 'a.pth')
        assert str(caught.value).isprintable()
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['a.pth', 'one']


@pytest.mark.parametrize(
    'name', ['hf-hub:timm/resnet18.a1_in1k', 'hf_hub:timm/resnet18', 'local-dir:/tmp', '../resnet18', '/etc/passwd']
)
def test_names_of_networks_become_no_path(name, monkeypatch):
    """timm would look some of them up on a disk or a host."""
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *args, **kwargs: pytest.fail('the network was asked'))
    for model in ('a2mim_timm', 'a2mim_resnet_tiny', 'a2mim_convnext_pico'):
        pretraining = functools.partial(getattr(models_a2mim, model), mask_patch_size=16)
        for make in (pretraining, functools.partial(models_a2mim.create_classifier, model)):
            with pytest.raises(ValueError, match=f'timm has no model {name}'):
                make(img_size=64, name=name)
    with pytest.raises(UserError, match='unknown --model'):
        find_method(name)


def recipe(folder: pathlib.Path, text: str) -> str:
    """How a recipe is refused."""
    (folder / 'a.yaml').write_text(text)
    with pytest.raises(UserError) as caught:
        get_args_parser().parse(['--config', str(folder / 'a.yaml')], stage='pretrain')
    assert caught.value.code == 2
    return str(caught.value)


@pytest.mark.timeout(60)
def test_recipes_made_to_harm(tmp_path):
    """None is built or run."""
    marker = tmp_path / 'marker'
    for tag in ('object/apply:os.system', 'object/new:os.system', 'name:os.system', 'module:os'):
        line = recipe(tmp_path, f'model: !!python/{tag} ["touch {marker}"]\n')
        assert 'could not determine a constructor for the tag' in line
    assert not marker.exists()


@pytest.mark.parametrize(
    'value',
    [
        *('(' * 100_000, '(' * 500 + ')' * 500, '[' * 50 + ']' * 50, '-' * 100_000 + '1', '9' * 100_000, '{[]: 1}'),
        *('__import__("os").system("false")', '[1] * 10 ** 9', '10 ** 10 ** 10', '"\\N{x}"', '1\\0', 'f"{1}"'),
    ],
)
def test_literals_made_to_harm(value):
    """What is no literal, or one too deep, is a text that the model refuses."""
    parsed = get_args_parser().parse(['--model_kwargs', f'depth={value}', '--model', 'mirl_vit_tiny']).model_kwargs
    with pytest.raises(UserError) as caught:
        build.construct(models_mirl.mirl_vit_tiny, model_kwargs=parsed)
    assert len(str(caught.value)) < 1000


# --------------------------------------------------------------------------
# our own code

TRUSTING = {
    'pickle',
    '_pickle',
    'cPickle',
    'dill',
    'cloudpickle',
    'joblib',
    'shelve',
    'marshal',
    'runpy',
    'code',
    'pty',
}
CALLS = {'eval', 'exec', 'compile', '__import__', 'input'}
ATTRIBUTES = r'os\.(system|popen|exec\w*|spawn\w*)|torch\.(load|jit\..*|hub\.(?!get_dir$).+|package)|yaml\.\w*load\w*'
SOURCES = [*ROOT.glob('*.py'), *ROOT.glob('util/**/*.py'), *ROOT.glob('scripts/*.py')]


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_of_ours_runs_data(path):
    """No pickle, no eval, no shell, no YAML but the safe loader's, nothing from torch.hub."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not TRUSTING & {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module not in TRUSTING
            assert not [a for a in node.names if re.fullmatch(ATTRIBUTES, f'{node.module}.{a.name}')]
        elif isinstance(node, ast.Name):
            assert node.id not in CALLS
        elif isinstance(node, ast.keyword):
            assert node.arg not in ('shell', 'weights_only', 'allow_pickle')
        elif isinstance(node, ast.Attribute) and re.fullmatch(ATTRIBUTES, ast.unparse(node)):
            assert ast.unparse(node) == 'yaml.load'
            assert path.name == 'recipes.py'
    assert issubclass(RecipeLoader, yaml.constructor.SafeConstructor)
