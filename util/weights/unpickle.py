"""Pickles of plain data, read without running anything in them: those of Paddle, and those inside torch's files.

A pickle is a program for a small machine, and its opcodes may call any Python function. `run` is that machine for the
opcodes of plain data. All it can call is in `ALLOWED`: functions of ours that do nothing but build data. Objects of
other packages (settings and callbacks of a trainer) are dropped. Calls of them, and what else is asked of Python,
torch or numpy, are refused. A size that a file declares is believed only as far as there are bytes for it.

`torch.load(weights_only=True)` runs no foreign code either, but it does not do for files of others: it allocates the
4 GB that a pickle of 100 bytes asks of `bytearray`, hashes a nested key of 60 tuples for ever, takes a tensor of a
terabyte (stride 0), looks at no checksum, and does not know pickle protocol 4.
"""

import math
import pickletools
import re
import sys
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from util.errors import printable


class Refused(Exception):
    """What a file is, or asks for, that no checkpoint should. The message completes 'FILE ...'."""


# --------------------------------------------------------------------------
# what a pickle may call


MOST_AXES = 32


class Dropped:
    """Stands for an object that no weight depends on (the arguments of a run, a path); what it held is dropped."""

    def __init__(self, *args):
        pass


class Foreign:
    """A class of another package, of which instances are dropped. A call of it, or of a function, is refused."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *args):
        raise Refused(refusal(self.name))


class Dtype:
    """numpy.dtype, of plain numbers only."""

    def __init__(self, code: str, *flags):
        if not re.fullmatch('[fiub][1248]', code):
            raise Refused(f'holds an array of dtype {printable(code, 80)}, which is not plain data')
        self.code, self.order = code, '='

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


def new_array(*args) -> np.ndarray:
    """numpy's _reconstruct: an array that its BUILD opcode fills."""
    if args != ('ndarray', (0,), b'b'):
        raise ValueError('not how numpy starts an array')
    return np.empty(0, 'u1')


def numpy_scalar(dtype: Dtype, data: bytes) -> int | float | bool:
    return np.frombuffer(data, dtype.numpy(), count=1)[0].item()


def rebuild_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *flags) -> Tensor:
    if len(size) > MOST_AXES or math.prod(size) > storage.numel():  # with strides of 0, as_strided takes any size
        raise ValueError(f'more than its storage of {storage.numel()} numbers')
    return storage.as_strided(size, stride, offset)


STORAGES = {
    'Double': torch.float64,
    'Float': torch.float32,
    'Half': torch.float16,
    'BFloat16': torch.bfloat16,
    'Long': torch.int64,
    'Int': torch.int32,
    'Short': torch.int16,
    'Char': torch.int8,
    'Byte': torch.uint8,
    'Bool': torch.bool,
}
ALLOWED = {
    'builtins.tuple': lambda items: items,  # of a tuple
    'collections.OrderedDict': lambda: {},
    'builtins.set': lambda items: items,
    'builtins.bytes': lambda: b'',  # how protocol 2 spells bytes: none, and some
    '_codecs.encode': lambda text, encoding: text.encode('latin1'),
    'numpy.ndarray': 'ndarray',
    'numpy.dtype': Dtype,
    'numpy.core.multiarray._reconstruct': new_array,
    'numpy.core.multiarray.scalar': numpy_scalar,
    'numpy._core.multiarray._reconstruct': new_array,  # since numpy 2
    'numpy._core.multiarray.scalar': numpy_scalar,
    'torch._utils._rebuild_tensor_v2': rebuild_tensor,
    'torch._utils._rebuild_parameter': lambda data, *flags: data,
    **{f'torch.{name}Storage': dtype for name, dtype in STORAGES.items()},
    'collections.defaultdict': lambda *factory: {},
    'yacs.config.CfgNode': lambda: {},  # Microsoft's runs
    'mmengine.logging.history_buffer.HistoryBuffer': Dropped,  # OpenMMLab's
}
OWN = {*sys.stdlib_module_names, 'torch', '__torch__', 'numpy'}  # what of these is not allowed is refused
DROPPED = re.compile(  # of these, what settings are made of
    r'torch\.(Size|device|dtype)|argparse\.Namespace|types\.SimpleNamespace|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path'
    r'|builtins\.(bool|complex|dict|float|frozenset|int|list|object|range|slice|str)|collections\.(Counter|deque)'
    r'|typing\.\w+|datetime\.\w+|uuid\.UUID|decimal\.Decimal'
)


def look_up(name: str):
    name = re.sub(r'^__builtin__\.', 'builtins.', name)  # protocol 2 keeps Python 2's name
    if name in ALLOWED:
        return ALLOWED[name]
    if DROPPED.fullmatch(name):
        return Dropped
    if name.partition('.')[0] in OWN:
        raise Refused(refusal(name))
    return Foreign(name)


def refusal(name: str) -> str:
    return f'asks for {printable(name, 80)}, which is not plain data; nothing in it was run'


# --------------------------------------------------------------------------
# the machine

VALUES = {
    *('BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8'),
    *('BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8'),
}
CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}


def run(file: BinaryIO, find_storage: Callable[..., Tensor] | None = None):
    """The object that the pickle at the file's position builds.

    `find_storage(dtype, key, numel)` gives the tensor that a persistent id of torch stands for.
    Raises Refused if the pickle asks for anything that is not plain data, and another error if it is malformed.
    """
    stack, marks, memo = [], [], {}
    for opcode, value, _ in pickletools.genops(file):
        takes, items = opcode.stack_before, []
        if pickletools.markobject in takes:  # everything above the last mark, and what is named before it
            takes = takes[: takes.index(pickletools.markobject)]
            items, stack = stack, marks.pop()
        items = [stack.pop() for _ in takes][::-1] + items
        match opcode.name, items:
            case 'STOP', [result]:
                return result
            case 'PROTO' | 'FRAME', []:
                pass
            case 'MARK', []:
                marks.append(stack)
                stack = []
            case name, [] if name in VALUES:
                stack.append(value)
            case name, [] if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case 'EMPTY_DICT', []:
                stack.append({})
            case 'EMPTY_LIST', []:
                stack.append([])
            case 'EMPTY_TUPLE' | 'TUPLE' | 'TUPLE1' | 'TUPLE2' | 'TUPLE3', _:
                stack.append(tuple(items))
            case 'APPEND' | 'APPENDS', [list() as target, *more]:
                stack.append(target)
                target.extend(more)
            # plain keys alone: to hash a tuple of tuples of ... can take for ever
            case 'SETITEM' | 'SETITEMS', [dict() as target, *more] if all(isinstance(k, str | int) for k in more[::2]):
                stack.append(target)
                target.update(zip(more[::2], more[1::2], strict=True))
            case 'APPEND' | 'APPENDS' | 'SETITEM' | 'SETITEMS', [Dropped() as target, *_]:
                stack.append(target)
            case 'BINPUT' | 'LONG_BINPUT', []:
                memo[value] = stack[-1]
            case 'MEMOIZE', [item]:
                stack.append(item)
                memo[len(memo)] = item
            case 'BINGET' | 'LONG_BINGET', []:
                stack.append(memo[value])
            case 'GLOBAL', [] if re.fullmatch(r'[\w.]+ [\w.]+', value):
                stack.append(look_up(value.replace(' ', '.')))
            case 'STACK_GLOBAL', [str() as module, str() as name]:
                stack.append(look_up(f'{module}.{name}'))
            case 'NEWOBJ', [Foreign(), tuple()]:
                stack.append(Dropped())
            case 'REDUCE' | 'NEWOBJ', [function, tuple() as args]:
                stack.append(function(*args))  # nothing callable is on the stack but what look_up gave
            case 'BUILD', [target, state]:
                stack.append(target)
                build(target, state)
            case 'BINPERSID', [('storage', torch.dtype() as dtype, str() as key, _, int() as n, *rest)] if not any(
                rest
            ):
                stack.append(find_storage(dtype, key, n))
            case name, _:
                raise ValueError(f'{name} is not for plain data, or not for what it is given')
    raise EOFError


def build(target, state) -> None:
    """Give an object its state: an array its data, a dtype its byte order. That of other objects is dropped."""
    if isinstance(target, np.ndarray):
        _, shape, dtype, fortran, data = state
        if (
            len(shape) > MOST_AXES
            or any(type(n) is not int or n < 0 for n in shape)
            or math.prod(shape) * dtype.numpy().itemsize != len(data)
        ):
            raise ValueError(f'not the {len(data)} bytes of its shape')
        target.__setstate__((1, shape, dtype.numpy(), fortran, bytes(data)))
    elif isinstance(target, Dtype):
        if state[1] not in ('<', '>', '=', '|'):
            raise ValueError('not a byte order')
        target.order = state[1]
    elif not isinstance(target, Dropped | dict):
        raise TypeError(f'BUILD of a {type(target).__name__}')
