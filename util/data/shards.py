"""Images in plain tar shards, as WebDataset lays them out: which shards there are, and where in them each image lies.

A member with an image's ending is an image. Its label is the number in `key.cls`, where its name is `key.jpg`, or the
"label" of `key.json`; or else its class is the folder that it lies in, below one named train or val. The images of a
shard are sorted by name: shards cut from a sorted list of files have the order of their folder.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from util import console, digests
from util.data.datasets import LEFT_BY_SYSTEMS, LeftOut, Split, no_images
from util.data.stores import Names, Shards, Tar
from util.errors import UserError, listed, printable

TAR = re.compile(r'\.(tar(\.\w+)?|tgz|tbz2?|txz)$', re.IGNORECASE)
SPLIT = re.compile(r'(?<![a-z])(train|val)(id(ation)?)?(?![a-z])', re.IGNORECASE)  # in the name of a shard
BRACES = re.compile(r'\{([^{}]+)\}')
COMPRESSED = (b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'\x28\xb5\x2f\xfd')
MOST_SHARDS = MOST_CLASSES = 2**20  # more cannot be meant
VERSION = 1  # of the index
NONE = -1  # no label


# --------------------------------------------------------------------------
# which shards


def expanded(text: str) -> list[str]:
    """'a-{08..10}.tar' is a-08.tar, a-09.tar, a-10.tar; '{a,b}' is a, b; as WebDataset has it. None of them nested."""
    if not (found := BRACES.search(text)):
        return [text]
    parts = found[1].split(',')
    if ends := re.fullmatch(r'(\d+)\.\.(\d+)', found[1]):
        first, last = map(int, ends.groups())
        if not 0 <= last - first < MOST_SHARDS:
            raise UserError(f'{text}: {found[0]} is no range of shards, such as {{000000..001023}}')
        parts = [f'{number:0{len(ends[1])}}' for number in range(first, last + 1)]
    return [text[: found.start()] + part + rest for part in parts for rest in expanded(text[found.end() :])]


def tars_at(path: Path) -> list[str]:
    """The tar files that a path names, or those in a folder that has neither folders nor images in it; else none.

    Raises UserError for those that are not there, or are compressed.
    """
    tars = []
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            for entry in entries:  # a folder of images is left at the first of them
                if entry.name[0] == '.' or entry.name in LEFT_BY_SYSTEMS:
                    continue
                if entry.name.lower().endswith(IMG_EXTENSIONS) or entry.is_dir():
                    return []
                if TAR.search(entry.name):
                    tars.append(entry.path)
        tars.sort()
    elif TAR.search(path.name):
        tars = [str(path)] if os.path.isfile(path) else expanded(str(path))
        if gone := [tar for tar in tars if not os.path.isfile(tar)]:
            raise UserError(f'{path}: {len(gone)} of {len(tars)} shards are missing: {listed(gone)}')
    for tar in tars:
        if not tar.lower().endswith('.tar'):
            raise compressed(tar)
    return tars


def compressed(tar: str) -> UserError:
    return UserError(f'{printable(tar)} is compressed: its images cannot be read by position; make it a plain .tar')


def find(data_path: Path, split: str) -> list[str]:
    """The shards of a split: those in its folder, or named like train-0.tar; where none is named so, train's."""
    if split and os.path.isdir(data_path / split):
        return tars_at(data_path / split)
    tars = tars_at(data_path)
    named = {tar: found[1].lower() for tar in tars if (found := SPLIT.search(os.path.basename(tar)))}
    if not named:
        return [] if split == 'val' else tars
    return [tar for tar in tars if named.get(tar) == (split or 'train')]


def holds(data_path: Path, split: str) -> bool:
    """Whether a split, or any, is in shards."""
    return bool(find(data_path, split) or tars_at(data_path))


# --------------------------------------------------------------------------
# where in them


class Index(NamedTuple):
    """The images of some shards: shard by shard, in each sorted by name."""

    images: Shards
    labels: np.ndarray  # int64; NONE where there is no number
    folders: list[str]  # sorted; '' of images that lie in none
    folder: np.ndarray  # int32, the place in `folders` of the one that each lies in
    left: list[dict[str, dict[str, int]]]  # of each shard, what is no image: {kind: {name or ending: how many}}

    @classmethod
    def joined(cls, parts: list['Index']) -> 'Index':
        folders = sorted({part.folders[place] for part in parts for place in np.unique(part.folder)})
        place = {folder: number for number, folder in enumerate(folders)}
        folder = [np.array([place.get(name, NONE) for name in part.folders])[part.folder] for part in parts]
        return cls(
            Shards.joined([part.images for part in parts]),
            np.concatenate([part.labels for part in parts]),
            folders,
            np.concatenate(folder).astype(np.int32),
            [left for part in parts for left in part.left],
        )

    def of_shard(self, number: int) -> 'Index':
        rows = np.flatnonzero(self.images.tar == number)
        images = self.images.take(rows)
        alone = Shards([images.tars[number]], images.tar * 0, images.starts, images.lengths, images.names)
        return Index(alone, self.labels[rows], self.folders, self.folder[rows], [self.left[number]])

    def write(self, path: Path) -> None:
        images = self.images
        about = json.dumps(dict(version=VERSION, tars=images.tars, folders=self.folders, left=self.left)).encode()
        with digests.temporary_for(path) as temporary:
            with digests.flushed(temporary) as file:
                np.savez(
                    file,
                    about=np.frombuffer(about, np.uint8),
                    **dict(labels=self.labels, folder=self.folder),
                    **dict(tar=images.tar, starts=images.starts, lengths=images.lengths),
                    **dict(names=images.names.block, ends=images.names.ends),
                )
            temporary.replace(path)

    @classmethod
    def read(cls, path: Path, tars: list[str]) -> 'Index':
        """The shards may have been moved together with it. Raises exceptions of many kinds at a damaged file."""
        with np.load(path) as file:
            about = json.loads(file['about'].tobytes())
            if about['version'] != VERSION:
                raise ValueError('of another version')
            known = [Tar(tar, *state) for tar, (_, *state) in zip(tars, about['tars'], strict=True)]
            names = Names(file['names'], file['ends'])
            images = Shards(known, file['tar'], file['starts'], file['lengths'], names)
            return cls(images, file['labels'], about['folders'], file['folder'], about['left'])


def state(path: str) -> Tar:
    status = os.stat(path)
    return Tar(path, status.st_size, status.st_mtime_ns)


def scanned(shard: Tar) -> Index:
    """What is in a shard. Raises UserError for a file that is no tar, or not a whole one."""
    found, labels, left = [], {}, LeftOut()
    try:
        with tarfile.open(shard.path, 'r:') as tar:
            for member in tar:
                tar.members = []  # or it keeps them all
                sort(tar, member, found, labels, left)
            end = os.pread(tar.fileobj.fileno(), tarfile.BLOCKSIZE, tar.offset)
    except tarfile.TarError as error:
        with open(shard.path, 'rb') as file:
            if file.read(8).startswith(COMPRESSED):
                raise compressed(shard.path) from error
        raise UserError(f'{printable(shard.path)} is damaged, or no tar file: {error}') from error
    except OSError as error:
        raise UserError(f'cannot read {printable(shard.path)}: {error.strerror}') from error
    if end != bytes(tarfile.BLOCKSIZE):  # tarfile takes what is damaged for the end
        raise UserError(f'{printable(shard.path)} is cut off or damaged: it does not end as a tar file does')
    found.sort()
    names, starts, lengths = zip(*found, strict=True) if found else ((), (), ())
    folders, folder = np.unique(list(map(class_of, names)), return_inverse=True)
    images = Shards(
        [shard],
        np.zeros(len(names), np.int32),
        np.array(starts, np.int64),
        np.array(lengths, np.int64),
        Names.of(names),
    )
    numbers = np.array([label_for(name, labels) for name in names], np.int64)
    return Index(images, numbers, folders.tolist(), folder.astype(np.int32), [left.kinds])


def sort(tar: tarfile.TarFile, member: tarfile.TarInfo, found: list, labels: dict[str, int], left: LeftOut) -> None:
    """Put a member where it belongs: to the images, the labels, or what is left out."""
    name = member.name.removeprefix('./')
    stem, ending = os.path.splitext(name)
    ending = ending.lower()
    if member.isdir():
        return
    if not member.isreg() or member.issparse():
        left.kinds['links and special files'][name] += 1
    elif any(part.startswith('.') or part in LEFT_BY_SYSTEMS for part in name.split('/')):
        left.kinds['hidden'][name] += 1
    elif ending in IMG_EXTENSIONS:
        found.append((name, member.offset_data, member.size))
    elif ending in ('.cls', '.json'):
        number = number_in(tar.extractfile(member).read(), ending)
        labels[stem] = number if ending == '.cls' else labels.get(stem, number)
    else:
        left.kinds['by ending'][ending or name] += 1


def number_in(content: bytes, ending: str) -> int:
    """The label in a .cls or .json, or NONE."""
    try:
        number = int(content) if ending == '.cls' else json.loads(content)['label']
    except (LookupError, TypeError, ValueError, RecursionError):
        return NONE
    return number if isinstance(number, int) and 0 <= number < MOST_CLASSES else NONE


def label_for(name: str, labels: dict[str, int]) -> int:
    """By the name without its ending; by WebDataset's key, which ends at the first dot of the file's name."""
    folder, slash, file = name.rpartition('/')
    return labels.get(name.rpartition('.')[0], labels.get(folder + slash + file.partition('.')[0], NONE))


def class_of(name: str) -> str:
    """The folder of an image's class: 'cat' of cat/1.jpg, train/cat/1.jpg and images/train/cat/more/1.jpg."""
    folders = name.split('/')[:-1]
    inner = max((place + 1 for place, folder in enumerate(folders) if folder in ('train', 'val')), default=0)
    return folders[inner] if inner < len(folders) else ''


def index_of(tars: list[str]) -> Index:
    """That of the file beside the shards; of those that it does not tell of, or not as they are now, anew."""
    files, known = index_files(tars), {}
    now = list(map(state, tars))
    for file in filter(os.path.exists, files):
        try:
            index = Index.read(file, tars)
        except Exception:  # what numpy raises at a damaged file is of every kind
            console.say(f'{file} cannot be read: the index of the shards is made anew')
            continue
        if index.images.tars == now:
            return index
        known |= {tar: index.of_shard(number) for number, tar in enumerate(index.images.tars)}
    ahead = [tar for tar in now if tar not in known]
    what = (
        f'{len(ahead)} of {len(tars)} shards, which changed'
        if known
        else f'{len(tars)} shard{"s" * (len(tars) > 1)}, once'
    )
    console.say(f'indexing {what}: {listed([tar.path for tar in ahead], 1)}')
    index = Index.joined([known.get(tar) or scanned(tar) for tar in now])
    keep(index, files)
    return index


def index_files(tars: list[str]) -> list[Path]:
    """Beside the shards, and, where that cannot be written, in the user's cache."""
    folder = os.path.dirname(tars[0])
    file = f'index-{digest(os.path.basename(tar) for tar in tars)}.npz'
    cache = Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'))
    return [Path(folder, file), cache / 'image-shards' / digest([os.path.abspath(folder)]) / file]


def digest(names: Iterable[str]) -> str:
    return hashlib.sha256(b'\0'.join(map(os.fsencode, names))).hexdigest()[:12]


def keep(index: Index, files: list[Path]) -> None:
    """Write it to the first place that can be written."""
    for number, file in enumerate(files):
        try:
            if number:
                file.parent.mkdir(parents=True, exist_ok=True)
            index.write(file)
        except OSError as error:
            console.say(f'the index of the shards cannot be kept as {file}: {error.strerror}')
        else:
            console.say(f'the index of {len(index.images)} images is kept as {file}')
            return


# --------------------------------------------------------------------------
# splits


def unlabelled(data_path: Path, split: str = 'train') -> Split:
    """The images of a split, or of all shards where none has its name. Raises UserError if there are none."""
    split = of(data_path, find(data_path, split) or tars_at(data_path))[0]
    note = f'{data_path}: {len(split.images)} images in {len(split.images.tars)} shards'
    return split._replace(labels=None, classes=[], notes=['; '.join([note, *split.notes])])


def labelled(data_path: Path, split: str) -> Split:
    """The images of a split. Raises UserError if there are none, or some have no label."""
    if not (tars := find(data_path, split)):
        where = f'they are named so, as {split}-000.tar, or lie in {split}/'
        hint = '; without them, --val_share 0.1 takes a tenth of the others for validation' if split == 'val' else ''
        raise UserError(f'{data_path} has no shards of {split}: {where}{hint}')
    found, lacking = of(data_path, tars)
    if lacking.size:
        first = found.images.name(int(lacking[0]))
        raise UserError(
            f'{lacking.size} of {len(found.images)} images of {split} in {data_path} have no label, such as '
            f'{printable(first)}: a number in key.cls, a "label" in key.json, or the folder of a class is needed'
        )
    return found


def of(data_path: Path, tars: list[str]) -> tuple[Split, np.ndarray]:
    """The images of these shards, and which of them have no label."""
    index, left = index_of(tars), LeftOut()
    for counts in index.left:
        for kind, names in counts.items():
            left.kinds[kind].update(names)
    if not len(index.images):
        raise UserError(no_images(f'the {len(tars)} shards of {data_path}', left))
    if (index.labels != NONE).any():
        classes = list(map(str, range(index.labels.max() + 1)))
        return Split(index.images, index.labels, classes, left.notes()), np.flatnonzero(index.labels == NONE)
    lacking = np.flatnonzero(index.folder == index.folders.index('')) if '' in index.folders else np.empty(0)
    return Split(index.images, index.folder.astype(np.int64), index.folders, left.notes()), lacking
