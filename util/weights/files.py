"""Checkpoint files of any origin as plain data, read without running anything in them.

What torch.save writes (a zip, or the format before torch 1.6), what paddle.save writes (its arrays stay numpy arrays),
and safetensors. A file is held against the SHA-256 beside it while it is read; without one, every record of a zip is
held against its own checksum.
"""

import errno
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from util import digests, resources
from util.errors import CheckpointError, DamagedError, printable
from util.weights.unpickle import Dropped, Refused, run

# what an export's folder is made of (exports.py); ORIGIN is a key of the configuration: whose weights they are
SAFETENSORS, TORCH, CONFIG, ORIGIN = 'model.safetensors', 'model.pth', 'config.json', 'trained_as'
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
HEADER = 30  # bytes of a zip before the name of each record
# what a reader may raise for a malformed file
DAMAGE = (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError)
MALFORMED = (*DAMAGE, zipfile.BadZipFile, safetensors.SafetensorError)


def read_checkpoint(path: str | Path) -> dict:
    """A file's dict of plain data, tensors and numpy arrays.

    Raises CheckpointError, one line for whatever is wrong; DamagedError, if it is the file and not the access to it;
    ResourceError, if there is too little memory.
    """
    path, kind = check_file(path), None
    try:
        with resources.needed_for(f'reading {path}, of {resources.size(path.stat().st_size)}'):
            kind, read = recognise(path)
            try:
                state = read(path)
            except (Refused, *MALFORMED):  # what follows from damage is told as that
                check_sum(path, digests.agrees(path))
                raise
        if not isinstance(state, dict):
            raise Refused(f'holds a {type(state).__name__}, not a dict of weights')
        return {key: value if bounded(value) else Dropped() for key, value in state.items()}
    except Refused as error:
        raise DamagedError(f'{path} {error}') from error
    except OSError as error:  # of these, a bad sector of the disk stays
        kind_of_error = DamagedError if error.errno == errno.EIO else CheckpointError
        raise kind_of_error(f'{path} cannot be read: {error.strerror or error}') from error
    except MALFORMED as error:
        what = f'is a {kind} file, but cut short or damaged' if kind else 'is not a checkpoint'
        raise DamagedError(f'{path} {what}') from error


def check_sum(path: Path, agrees: bool) -> None:
    if not agrees:
        raise Refused(f'is damaged: its SHA-256 is not the one in {digests.beside(path).name}')


def read_folder(folder: Path) -> dict:
    """What an export holds, as a checkpoint of ours has it; a folder that timm wrote has the weights alone."""
    names = [name for name in (SAFETENSORS, TORCH) if (folder / name).is_file() and (folder / CONFIG).is_file()]
    if not names:
        check_file(folder)  # raises
    weights = read_checkpoint(folder / names[0])
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        origin = config.get(ORIGIN, {})
        known = {key: origin[key] for key in ('args', 'classes', 'run') if key in origin} if bounded(origin) else {}
    except OSError as error:
        raise CheckpointError(f'{folder / CONFIG} cannot be read: {error.strerror or error}') from error
    except DAMAGE as error:
        raise DamagedError(f'{folder / CONFIG} is not the configuration of an export') from error
    return known | {origin.get('weights') if origin.get('weights') == 'encoder' else 'model': weights}


def write_weights(path: Path, state: dict[str, Tensor]) -> None:
    """A state dict as safetensors, or as torch.save writes it, by the name's ending; on the disk when it returns."""
    state = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    with digests.flushed(path) as file:
        if path.name == SAFETENSORS:
            file.write(safetensors.torch.save(state, metadata={'format': 'pt'}))
        else:
            buffer = BytesIO()  # a failed write of torch's own hides its reason
            torch.save(state, buffer)
            file.write(buffer.getbuffer())


def check_file(path: str | Path) -> Path:
    """Raise CheckpointError for a path that is no file; of a folder, name what could be meant."""
    path = Path(path)
    if path.is_dir():
        inside = sorted((file for file in path.glob('*.pth') if file.is_file()), key=lambda f: f.stat().st_mtime)
        hint = f'; in it there are {", ".join(file.name for file in inside[:-6:-1])}' if inside else ''
        raise CheckpointError(f'{path} is a folder, not a checkpoint{hint}')
    if not path.is_file():
        raise CheckpointError(f'{path} does not exist')
    return path


def bounded(value: object, most: int = 10**6, depth: int = 50) -> bool:
    """Whether a walk through nested containers ends: a tuple that holds one tuple twice, and so on, takes for ever."""
    waiting = [(value, depth)]
    while waiting:
        part, left = waiting.pop()
        if isinstance(part, dict | list | tuple):
            most -= len(part)
            if most < 0 or not left:
                return False
            waiting += [(inner, left - 1) for inner in (part.values() if isinstance(part, dict) else part)]
    return True


def plain_field(value: object, depth: int = 2):
    """A field of a file, to be compared and printed: a short string, a number, few of these; of all else, its type."""
    if value is None or isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 64):
        return value
    if isinstance(value, str):
        return value[:1000]
    if isinstance(value, list | tuple) and depth and len(value) <= 100:
        return type(value)(plain_field(item, depth - 1) for item in value)
    if isinstance(value, dict) and depth and len(value) <= 100:
        return {plain_field(key): plain_field(item, depth - 1) for key, item in value.items()}
    return f'a {type(value).__name__}'


def recognise(path: Path) -> tuple[str | None, Callable]:
    """The kind of a file, None if it is probably no checkpoint, and the function that reads it."""
    with open(path, 'rb') as file:
        head = file.read(64)
    if not head:
        raise Refused('is empty')
    if re.match(rb'\s*<(!doctype|html|head|\?xml)', head, re.IGNORECASE):
        raise Refused('is a web page, not a checkpoint: the download went wrong')
    if head[8:9] == b'{' or path.suffix == '.safetensors':
        return 'safetensors', read_safetensors
    if head.startswith(b'PK'):
        return 'torch', read_zip
    return 'pickle' if head.startswith(b'\x80') else None, read_pickle


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """In two passes: the library maps the file, and does not say what it has read."""
    check_sum(path, digests.agrees(path))
    return safetensors.torch.load_file(path)


def read_zip(path: Path):
    """torch.save's format: `ROOT/data.pkl`, and a record `ROOT/data/KEY` for every storage."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        roots = [r.filename.split('/')[0] for r in records if re.fullmatch(r'[^/]+/data\.pkl', r.filename)]
        if len(roots) != 1:
            raise Refused('is a zip archive, but not one that torch.save wrote')
        for record in records:
            folders = record.filename.split('/')
            if folders[0] != roots[0] or '..' in folders:
                raise Refused(f'holds {printable(record.filename, 80)}, which torch.save never writes')
        size = path.stat().st_size
        if not all(0 <= record.header_offset <= size - HEADER for record in records):
            raise zipfile.BadZipFile  # outside of the file
        if any(r.compress_type for r in records) or sum(r.file_size for r in records) > size:
            raise Refused('holds compressed or overlapping records, which torch.save never writes')
        storages: dict[str, tuple[zipfile.ZipInfo, Tensor]] = {}

        def find_storage(dtype: torch.dtype, key: str, numel: int) -> Tensor:
            if key not in storages:
                record = archive.getinfo(f'{roots[0]}/data/{key}')
                if record.file_size != numel * dtype.itemsize:
                    raise ValueError(f'{record.file_size} bytes for {numel} numbers')
                storages[key] = record, torch.empty(record.file_size, dtype=torch.uint8)
            return storages[key][1].view(dtype)

        state = run(BytesIO(archive.read(f'{roots[0]}/data.pkl')), find_storage)
    with digests.Summed(path) as file:  # in the order of the file, once
        for record, storage in sorted(storages.values(), key=lambda found: found[0].header_offset):
            read_record(file, record, storage)
        file.skip()
        check_sum(path, file.agrees())
    return state


def read_record(file: digests.Summed, record: zipfile.ZipInfo, storage: Tensor) -> None:
    """Go on to a record of a zip, and fill a storage with its bytes, which are checked if the file has no sum."""
    if record.header_offset < file.tell():
        raise Refused('holds overlapping records, which torch.save never writes')
    file.skip(record.header_offset - file.tell())
    header = file.read(HEADER)
    name_size, extra_size = struct.unpack_from('<2H', header, 26)
    name, _ = file.read(name_size), file.skip(extra_size)
    if header[:4] != b'PK\3\4' or name != record.orig_filename.encode():
        raise zipfile.BadZipFile
    checksum = fill(file, storage, summing=not file.sum)
    if not file.sum and checksum != record.CRC:
        raise zipfile.BadZipFile


def read_pickle(path: Path):
    """One pickle, as Paddle writes it, or the series of pickles and storages that torch wrote before 1.6."""
    with digests.Summed(path) as file:
        state = run(file)
        state = read_legacy_torch(file) if state == LEGACY_MAGIC else state
        file.skip()
        check_sum(path, file.agrees())
    return state


def read_legacy_torch(file: digests.Summed):
    """What follows the magic number: version, system, object, the storages' keys, and of each its length and bytes."""
    storages: dict[str, Tensor] = {}

    def find_storage(dtype: torch.dtype, key: str, numel: int) -> Tensor:
        if key not in storages:
            if numel * dtype.itemsize + sum(s.nbytes for s in storages.values()) > file.size:
                raise ValueError(f'a storage of {numel} numbers in a file of {file.size} bytes')
            storages[key] = torch.empty(numel, dtype=dtype)
        return storages[key]

    _version, _system, state, keys = run(file), run(file), run(file, find_storage), run(file)
    if not all(isinstance(key, str) for key in keys) or set(keys) != storages.keys():
        raise ValueError('not its storages')
    for key in keys:
        file.read(8)  # the length, which the object has told
        fill(file, storages[key])
    return state


def fill(file: digests.Summed, storage: Tensor, summing: bool = False) -> int:
    """Read the bytes of a flat tensor. Returns their CRC-32, if it is wanted."""
    buffer, checksum = memoryview(storage.view(torch.uint8).numpy()), 0
    while buffer:
        count = file.readinto(buffer[: digests.CHUNK])
        if not count:
            raise EOFError
        checksum = zlib.crc32(buffer[:count], checksum) if summing else 0
        buffer = buffer[count:]
    return checksum
