"""Published and own checkpoints, file by file: recognised, loaded weight by weight, and refused in one line.

`FULL_SIZE=1 pytest tests/weights/test_published.py` also writes and loads whole files of the published sizes: 2 GB.
"""

import argparse
import builtins
import functools
import os
import pickle
import zipfile
from pathlib import Path, PosixPath

import fill
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import models_mirl
from util import checkpoint
from util.errors import CheckpointError
from util.weights import load_published
from util.weights.files import read_checkpoint
from util.weights.published import INTO_MIRL

FIXTURES = Path(__file__).parent / 'fixtures'  # written by paddle.save
PADDLE = sorted(FIXTURES.glob('toy_*'))
ENCODER = dict(patch_size=4, embed_dim=16, depth=6, num_heads=2, mlp_ratio=2)
TOY = ENCODER | dict(
    img_size=8, out_indices=(0, 1, 2, 3, 4), decoder_dim=8, decoder_depth=1, decoder_num_heads=2, mask_ratio=0.75
)
OLD_ARGS = argparse.Namespace(model='vit', lr=1e-3, output_dir=PosixPath('/checkpoint/run'), betas=(0.9, 0.95))


def toy(**kwargs) -> models_mirl.MIRL:
    torch.manual_seed(0)
    return models_mirl.MIRL(**{**TOY, **kwargs})


def classifier(pool='avg', num_classes=10, img_size=8, seed=0, **kwargs):
    """A toy classifier with every weight drawn, the head's included."""
    torch.manual_seed(seed)
    options = ENCODER | dict(global_pool=pool) | kwargs
    model = models_mirl.create_classifier('mirl_vit_small', num_classes, img_size=img_size, **options).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.3)
    return model


def published_shapes(width, depth, dim, segments, decoder_depth, ratio=4, patch=16, img_size=224) -> dict[str, tuple]:
    """The names of a published MIRL pretraining checkpoint, with torch's shapes."""
    length, pixels = (img_size // patch) ** 2 + 1, patch * patch * 3

    def linear(name, out, into):
        return {f'{name}.weight': (out, into), f'{name}.bias': (out,)}

    def norm(name, size):
        return {f'{name}.weight': (size,), f'{name}.bias': (size,)}

    def block(name, size):
        return {
            **norm(f'{name}.norm1', size),
            **linear(f'{name}.attn.qkv', 3 * size, size),
            **linear(f'{name}.attn.proj', size, size),
            **norm(f'{name}.norm2', size),
            **linear(f'{name}.mlp.fc1', ratio * size, size),
            **linear(f'{name}.mlp.fc2', size, ratio * size),
        }

    shapes = {'cls_token': (1, 1, width), 'pos_embed': (1, length, width)}
    shapes |= {'patch_embed.proj.weight': (width, 3, patch, patch), 'patch_embed.proj.bias': (width,)}
    for i in range(depth):
        shapes |= block(f'blocks.{i}', width)
    shapes |= norm('norm_low', width) | norm('norm', width) | linear('decoder_embed0_1', dim, width)
    for k in range(segments):
        shapes |= norm(f'norm{k}', width) if k < segments - 1 else {}
        shapes |= {f'mask_token{k}': (1, 1, dim), f'decoder_pos_embed{k}': (1, length, dim)}
        shapes |= linear(f'decoder_embed{k}', dim, width) | norm(f'decoder_norm{k}', dim)
        for j in range(decoder_depth):
            name = f'decoder_blocks{k}.{j}'
            shapes |= block(name, dim) | norm(f'{name}.norm3', dim) | norm(f'{name}.norm4', dim)
            shapes |= linear(f'{name}.cross_attn.q', dim, dim) | linear(f'{name}.cross_attn.kv', 2 * dim, dim)
            shapes |= linear(f'{name}.cross_attn.proj', dim, dim)
        head = f'decoder_pred{k}'
        shapes |= {f'{head}.bias': (pixels,), f'{head}.weight_v': (pixels, dim), f'{head}.weight_g': (dim,)}
    return shapes


TOY_SHAPES = published_shapes(16, 6, 8, 6, 1, ratio=2, patch=4, img_size=8)
COMPUTED = ('pos_embed', 'weight_g')  # of a published file: not `fill`'s


def published_state(shapes=TOY_SHAPES) -> dict[str, torch.Tensor]:
    state = {name: torch.from_numpy(fill.weight(name, shape)) for name, shape in shapes.items()}
    return state | {name: torch.ones(shape) for name, shape in shapes.items() if name.endswith('weight_g')}


def paddle(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Arrays in Paddle's layout."""
    linear = (k for k, v in state.items() if v.ndim == 2 and k.endswith(('.weight', '.weight_v')))
    arrays = {k: v.numpy() for k, v in state.items()}
    return arrays | {k: np.ascontiguousarray(arrays[k].T) for k in linear}


def assert_filled(model: models_mirl.MIRL, shapes=TOY_SHAPES) -> int:
    """Every weight is `fill`'s of its published name, or as computed. Returns how many were filled."""
    state, filled = model.state_dict(), 0
    for name, shape in shapes.items():
        ours = INTO_MIRL[1].rename(name)
        if ours is None or name == 'pos_embed':
            continue
        value = state[ours.replace('norms.-1', f'norms.{len(model.norms) - 1}')]
        if name.endswith('weight_g'):
            assert torch.equal(value, torch.ones_like(value))
        else:
            assert torch.equal(value, torch.from_numpy(fill.weight(name, shape))), name
            filled += 1
    return filled


def images(size=8):
    return torch.from_numpy(fill.images(2, size))


# --------------------------------------------------------------------------
# Paddle


@pytest.mark.parametrize('path', PADDLE, ids=lambda path: path.name)
def test_paddle_pretraining(path, measured):
    model, fresh = toy(), toy()
    report = load_published(model, path)
    filled = assert_filled(model)
    assert torch.equal(model.pos_embed, fresh.pos_embed)  # ours and theirs are computed alike
    assert not report.missing + report.resized
    assert sorted(report.ignored)[-6:] == [f'decoder_pos_embed{k}' for k in range(6)]
    assert len(report.loaded) == len(model.state_dict()) == 278 - 6
    loss, _ = model(images(), model.plan_from_noise(torch.rand(model.noise_shape(2))))
    assert loss.isfinite()
    measured(f'{path.name}: {filled} weights equal, {report}')


@pytest.mark.parametrize('path', PADDLE, ids=lambda path: path.name)
@pytest.mark.parametrize('pool', ['avg', 'token'])
def test_paddle_encoder_into_classifier(path, pool):
    model = classifier(pool)
    report = load_published(model, path)
    for name, value in model.state_dict().items():
        if name.startswith(('cls', 'patch', 'blocks', 'norm.')):
            assert torch.equal(value, torch.from_numpy(fill.weight(name, value.shape))), name
    lacking = ['head.weight', 'head.bias'] + (['fc_norm.weight', 'fc_norm.bias'] if pool == 'avg' else [])
    assert sorted(report.missing) == sorted(lacking)


def test_paddle_is_all_there_is():
    """Both forms are read, with Paddle nowhere."""
    assert {path.suffix for path in PADDLE} == {'.pd', '.pdparams'}
    with pytest.raises(ImportError):
        import paddle  # noqa: F401


def test_paddle_before_numpy_2(tmp_path):
    """numpy 1 called its module numpy.core."""
    for path in PADDLE:
        data = path.read_bytes()
        assert data.count(b'\x8c\x16numpy._core.multiarray') == 1
        old = tmp_path / path.name
        old.write_bytes(data.replace(b'\x8c\x16numpy._core.multiarray', b'\x8c\x15numpy.core.multiarray'))
        model = toy()
        load_published(model, old)
        assert_filled(model)


@pytest.mark.parametrize('protocol', [2, 3, 4])
@pytest.mark.parametrize('pool', ['avg', 'token'])
def test_paddle_fine_tuned(tmp_path, pool, protocol):
    source = classifier(pool)
    arrays = paddle(source.state_dict())
    whole = {name: (f'linear_{i}.w_0', array) for i, (name, array) in enumerate(arrays.items())}
    scaler = {'scale': np.float32([65536.0]), 'growth': np.float64(2.0), 'none': np.zeros(0)}
    contents = {
        'a.pdparams': arrays | {'StructuredToParameterName@@': dict.fromkeys(arrays, 'w')},
        'a.pd': {'model': whole, 'epoch': 3, 'scaler': scaler, 'args': OLD_ARGS},
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol))
        model = classifier(pool, seed=1)
        report = load_published(model, tmp_path / name)
        assert not report.missing
        assert 'ViT (Paddle)' in str(report)
        assert torch.equal(model(images()), source(images()))


def test_paddle_split_arrays(tmp_path):
    source = classifier()
    arrays = paddle(source.state_dict())
    name = 'blocks.0.mlp.fc1.weight'
    array = arrays.pop(name)
    parts = {f'{name}@@.{i}': part for i, part in enumerate(np.split(array.reshape(-1), 4))}
    info = {name: {'OriginShape': array.shape, 'slices': list(parts)}}
    (tmp_path / 'a.pdparams').write_bytes(pickle.dumps(arrays | parts | {'UnpackBigParamInfor@@': info}, 2))
    model = classifier(seed=1)
    assert not load_published(model, tmp_path / 'a.pdparams').ignored
    assert torch.equal(model(images()), source(images()))
    info[name]['slices'] = ['nowhere']
    with pytest.raises(CheckpointError, match='do not fit together'):
        load_published(model, arrays | parts | {'UnpackBigParamInfor@@': info})


def test_state_dicts():
    """Arrays are in Paddle's layout, tensors in torch's; computed tables and gains may be absent."""
    state = published_state()
    bare = {k: v for k, v in state.items() if 'pos_embed' not in k and not k.endswith('weight_g')}
    for source in (state, paddle(state), bare, paddle(bare), {'model': bare}):
        model = toy()
        load_published(model, source)
        assert_filled(model)
    net = classifier(img_size=16)
    load_published(net, bare)
    assert torch.equal(net.pos_embed, toy(img_size=16).pos_embed)


# --------------------------------------------------------------------------
# torch files: kind -> what the published file holds, made from a classifier's weights


def encoder_of(state):
    return {k: v for k, v in state.items() if not k.startswith(('head', 'fc_norm'))}


def with_norm(state):
    return encoder_of(state) | {'norm.weight': torch.ones(16), 'norm.bias': torch.zeros(16)}


def mae_decoder():
    names = ['decoder_embed.weight', 'decoder_blocks.0.norm1.weight', 'decoder_norm.weight', 'decoder_pred.weight']
    return {'mask_token': torch.zeros(1, 1, 8), 'decoder_pos_embed': torch.zeros(1, 5, 8)} | {
        name: torch.zeros(8, 8) for name in names
    }


def prefixed(prefix, state):
    return {prefix + k: v for k, v in state.items()}


RUN = {'optimizer': {'state': {0: {'step': torch.tensor(1.0)}}}, 'epoch': 9, 'scaler': {'scale': 65536.0}}
KINDS = {  # kind: (pooling of the classifier, what its file holds, has the file a head?)
    'mae_pretrain': ('avg', lambda s: {'model': with_norm(s)}, False),
    'mae_pretrain_full': ('avg', lambda s: {'model': with_norm(s) | mae_decoder(), 'args': OLD_ARGS, **RUN}, False),
    'mae_finetuned': ('avg', lambda s: {'model': s, 'args': OLD_ARGS, **RUN}, True),
    'mae_finetuned_cls': ('token', lambda s: {'model': s, 'args': OLD_ARGS, **RUN}, True),
    'mirl_converted': ('avg', lambda s: {'model': with_norm(s)}, False),
    'timm': ('token', lambda s: s, True),
    'timm_train': ('token', lambda s: {'state_dict': s, 'arch': 'vit', 'args': OLD_ARGS, 'metric': 1.0}, True),
    'ddp': ('avg', lambda s: {'model': prefixed('module.', s)}, True),
    'compiled_ddp': ('avg', lambda s: {'state_dict': prefixed('module._orig_mod.', s)}, True),
    'module': ('avg', lambda s: {'module': prefixed('_orig_mod.', s)}, True),
}


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('kind', KINDS)
def test_torch_files(tmp_path, kind, zipped):
    pool, content, has_head = KINDS[kind]
    source, model = classifier(pool), classifier(pool, seed=1)
    state = source.state_dict()
    torch.save(content(state), tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
    report = load_published(model, tmp_path / 'a.pth')
    if not has_head:
        assert {name.split('.')[0] for name in report.missing} == {'fc_norm', 'head'}
        model.head, model.fc_norm = source.head, source.fc_norm
    else:
        assert not report.missing + report.ignored
    assert len(report.loaded) + len(report.missing) == len(state)
    assert torch.equal(model(images()), source(images()))
    assert str(report).count('\n') == 0


def test_safetensors(tmp_path):
    source, model = classifier('token'), classifier('token', seed=1)
    safetensors.torch.save_file(source.state_dict(), tmp_path / 'model.safetensors', {'format': 'pt'})
    assert not load_published(model, tmp_path / 'model.safetensors').missing
    assert torch.equal(model(images()), source(images()))


def test_own_checkpoints(tmp_path):
    """Pretraining resumes into the same model; its encoder goes to a classifier; `ema` picks the averages."""
    source = toy()
    load_published(source, published_state())
    content = {'model': source.state_dict(), 'encoder': source.encoder_state_dict(), **RUN, 'args': {'lr': 1e-3}}
    checkpoint.save(tmp_path / 'a.pth', content)
    model = toy()
    report = load_published(model, tmp_path / 'a.pth')
    assert len(report.loaded) == len(model.state_dict())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in source.state_dict().items())
    for pool in ('avg', 'token'):
        for state in (tmp_path / 'a.pth', {'model': content['model']}):
            net = classifier(pool)
            load_published(net, state)
            assert torch.equal(net.blocks[5].mlp.fc2.weight, source.blocks[5].mlp.fc2.weight)
    net = classifier('token')
    load_published(net, tmp_path / 'a.pth')
    assert torch.equal(net.norm.weight, source.norms[-1].weight)

    tuned, averaged = classifier(), classifier(seed=1)
    checkpoint.save(tmp_path / 'b.pth', {'model': tuned.state_dict(), 'ema': averaged.state_dict()})
    for ema, expected in ((False, tuned), (True, averaged)):
        net = classifier(seed=2)
        report = load_published(net, tmp_path / 'b.pth', ema=ema)
        assert torch.equal(net(images()), expected(images()))
        assert (', averaged weights' in str(report)) is ema
        assert ('also holds averaged weights (ema): --use_ema takes them' in str(report)) is not ema
    with pytest.raises(CheckpointError, match='no averaged weights in it: drop --use_ema'):
        load_published(net, tmp_path / 'a.pth', ema=True)


def test_reading_equals_torch(tmp_path):
    """Ours against torch.load: shared storages, strides, dtypes, parameters, nothing in them."""
    base = torch.arange(24.0)
    state = {
        'shared': {'a': base, 'b': base[4:].view(4, 5).t(), 'c': base},
        'dtypes': [torch.ones(3).to(d) for d in (torch.float64, torch.bfloat16, torch.half, torch.int64, torch.bool)],
        'parameter': torch.nn.Parameter(torch.ones(2, 3).t()),
        'nothing': torch.zeros(0, 3),
        'scalar': torch.tensor(3),
        'plain': {1: (None, True, -5, 2**40, 1e-3, 'text', [], {}, ())},
    }
    for zipped in (True, False):
        torch.save(state, tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
        ours, theirs = read_checkpoint(tmp_path / 'a.pth'), torch.load(tmp_path / 'a.pth', weights_only=True)
        assert repr(ours) == repr(theirs).replace(', requires_grad=True', '').replace('Parameter containing:\n', '')
        assert ours['shared']['a'].data_ptr() == ours['shared']['c'].data_ptr()
        assert ours['shared']['b'].data_ptr() == ours['shared']['a'].data_ptr() + 16


# --------------------------------------------------------------------------
# sizes


def test_position_embedding_is_resized(tmp_path):
    source, model = classifier(), classifier(img_size=16, seed=1)
    torch.save({'model': source.state_dict()}, tmp_path / 'a.pth')
    report = load_published(model, tmp_path / 'a.pth')
    assert report.resized == ['pos_embed [1, 5, 16] -> [1, 17, 16]']
    assert '1 resized (pos_embed [1, 5, 16] -> [1, 17, 16])' in str(report)
    grid = source.pos_embed[:, 1:].view(1, 2, 2, 16).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (4, 4), mode='bicubic', align_corners=False).flatten(2).transpose(1, 2)
    assert torch.equal(model.pos_embed[:, :1], source.pos_embed[:, :1])
    torch.testing.assert_close(model.pos_embed[:, 1:], expected)


def test_other_classes_start_a_new_head():
    model = classifier(num_classes=7)
    head = model.head.weight.clone()
    report = load_published(model, classifier(num_classes=10, seed=1).state_dict())
    assert report.missing == ['head.weight', 'head.bias']
    assert torch.equal(model.head.weight, head)
    assert str(report) == (
        'state dict: ViT: 78 loaded, 2 ignored (head.weight [10, 16], head.bias [10]), '
        '2 missing, stay as initialised (head.weight, head.bias)'
    )


SIZES = {  # width, depth, decoder width, segments, decoder depth: tensors
    'mirl_vit_base_depth48': ((768, 48, 512, 6, 2), 914),
    'mirl_vit_small_depth54': ((384, 54, 384, 6, 1), 854),
    'mirl_vit_base': ((768, 12, 512, 6, 2), None),
}


@pytest.mark.parametrize('name', SIZES)
def test_published_sizes(name, monkeypatch):
    """Every key of the published sizes has its place, in pretraining and in fine-tuning (without the numbers)."""
    # early timm reads the drop path rates, which must therefore be numbers
    monkeypatch.setattr(torch, 'linspace', functools.partial(torch.linspace, device='cpu'))
    sizes, tensors = SIZES[name]
    shapes = published_shapes(*sizes)
    assert tensors in (None, len(shapes))
    with torch.device('meta'):
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
        model = getattr(models_mirl, name)(num_segments=6)
        net = models_mirl.create_classifier(name)
    assert not load_published(model.to('meta'), state).missing
    assert load_published(net, state).missing == ['fc_norm.weight', 'fc_norm.bias', 'head.weight', 'head.bias']


@pytest.mark.skipif(not os.environ.get('FULL_SIZE'), reason='FULL_SIZE=1 writes and loads 2 GB')
@pytest.mark.parametrize('name', ['mirl_vit_base_depth48', 'mirl_vit_small_depth54'])
@pytest.mark.parametrize('suffix', ['.pdparams', '.pd', '.pth'])
def test_full_size_files(tmp_path, name, suffix, measured):
    shapes = published_shapes(*SIZES[name][0])
    state = published_state(shapes)
    path = tmp_path / f'a{suffix}'
    if suffix == '.pth':
        torch.save({'model': state, 'args': OLD_ARGS}, path)
    else:
        arrays = paddle(state)
        if suffix == '.pd':
            arrays = {'model': {k: (k, v) for k, v in arrays.items()}, 'args': OLD_ARGS, 'epoch': 799, 'scaler': {}}
        with open(path, 'wb') as file:
            pickle.dump(arrays, file, 4)
    del state
    model = getattr(models_mirl, name)()
    report = load_published(model, path)
    measured(f'{path.stat().st_size / 1e9:.2f} GB, {assert_filled(model, shapes)} weights equal, {report}')


# --------------------------------------------------------------------------
# mistakes: what the file is, and how the line ends after its name


def error(model, source) -> str:
    """The line; the model must be as it was."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_published(model, source)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    line = str(caught.value)
    assert '\n' not in line
    assert 'weights_only' not in line
    return line.removeprefix(str(source)).removeprefix('state dict')


def saved(path, content=None):
    torch.save(classifier().state_dict() if content is None else content, path)
    return path.read_bytes()


def halved(data):
    return data[: len(data) // 2]


FILES = {
    'missing': (lambda path: None, ' does not exist'),
    'folder': (lambda path: path.mkdir(), ' is a folder, not a checkpoint'),
    'empty': (lambda path: path.touch(), ' is empty'),
    'half': (lambda path: path.write_bytes(halved(saved(path))), ' is a torch file, but cut short or damaged'),
    'no end': (lambda path: path.write_bytes(saved(path)[:-100]), ' is a torch file, but cut short or damaged'),
    'half a pickle': (
        lambda path: path.write_bytes(halved(PADDLE[0].read_bytes())),
        ' is a pickle file, but cut short or damaged',
    ),
    'half safetensors': (
        lambda path: path.write_bytes(halved(safetensors.torch.save(classifier().state_dict()))),
        ' is a safetensors file, but cut short or damaged',
    ),
    'web page': (
        lambda path: path.write_text('\n<!DOCTYPE html><html><title>404</title>'),
        ' is a web page, not a checkpoint: the download went wrong',
    ),
    'random': (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), ' is not a checkpoint'),
    'text': (lambda path: path.write_text('class Foo:\n    pass\n'), ' is not a checkpoint'),
    'zip': (
        lambda path: zipfile.ZipFile(path, 'w').close(),
        ' is a zip archive, but not one that torch.save wrote',
    ),
    'list': (lambda path: saved(path, [torch.ones(2)]), ' holds a list, not a dict of weights'),
    'tensor': (lambda path: saved(path, torch.ones(2)), ' holds a Tensor, not a dict of weights'),
    'no weights': (lambda path: saved(path, {'epoch': 3, 'x': 'y'}), ': no weights in it; its keys are epoch, x'),
    'unknown': (
        lambda path: saved(path, torch.nn.Sequential(*[torch.nn.Linear(2, 2)] * 3).state_dict()),
        ': not a checkpoint for this model: its keys are 0.weight, 0.bias, 1.weight, 1.bias, ...; '
        'known are our MIRL pretraining, published MIRL pretraining, our LocalMIM pretraining, '
        'published LocalMIM pretraining, MAE pretraining, ViT, '
        'Hugging Face ViT, Hugging Face DeiT, Hugging Face BEiT',
    ),
    'global': (
        lambda path: path.write_bytes(pickle.dumps({'model': os.system})),
        ' asks for posix.system, which is not plain data; nothing in it was run',
    ),
}


@pytest.mark.parametrize('kind', FILES)
def test_mistaken_files(tmp_path, kind, measured):
    make, expected = FILES[kind]
    make(tmp_path / 'a.pth')
    line = error(classifier(), tmp_path / 'a.pth')
    assert line == expected
    measured(f'{kind}: a.pth{line}')


def test_unreadable_file(tmp_path, monkeypatch):
    saved(tmp_path / 'a.pth')

    def refuse(*args):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(builtins, 'open', refuse)  # root can read everything
    line = error(classifier(), tmp_path / 'a.pth')
    assert line == ' cannot be read: Permission denied'


def test_flipped_bits_are_noticed(tmp_path):
    """torch.load does not look at the checksums of its own format."""
    data = saved(tmp_path / 'a.pth')
    start = data.index(classifier().blocks[3].mlp.fc1.weight.detach().numpy().tobytes())
    for place in range(start, start + 800, 100):
        flipped = bytearray(data)
        flipped[place] ^= 4
        (tmp_path / 'a.pth').write_bytes(flipped)
        assert error(classifier(), tmp_path / 'a.pth') == ' is a torch file, but cut short or damaged'


def test_mistaken_architectures(measured):
    state = published_state()
    tuned = classifier().state_dict()
    four = published_state(published_shapes(16, 6, 8, 4, 1, ratio=2, patch=4, img_size=8))
    cases = {
        'segments': (toy(), four, ': has 4 segments, the model 6: pass --model_kwargs num_segments=4'),
        'own segments': (
            toy(),
            {'model': toy(out_indices=None, num_segments=2).state_dict()},
            ': has 2 segments, the model 6: pass --model_kwargs num_segments=2',
        ),
        'encoder alone': (
            toy(),
            encoder_of(tuned),
            ': ViT: holds no decoders: main_finetune.py --finetune and main_pretrain.py --init take it',
        ),
        'MAE': (
            toy(),
            with_norm(tuned) | mae_decoder(),
            ": MAE pretraining: holds MAE's decoder, not MIRL's",
        ),
        'width': (
            classifier(embed_dim=8),
            tuned,
            ': ViT, but of another architecture; differing keys (76): cls_token: file [1, 1, 16], model [1, 1, 8]; '
            'pos_embed: file [1, 5, 16], model [1, 5, 8]; '
            'patch_embed.proj.weight: file [16, 3, 4, 4], model [8, 3, 4, 4]; '
            'patch_embed.proj.bias: file [16], model [8]; blocks.0.norm1.weight: file [16], model [8]; ...',
        ),
        'patch size': (
            classifier(patch_size=2),
            tuned,
            ': ViT, but of another architecture; differing keys (1): '
            'patch_embed.proj.weight: file [16, 3, 4, 4], model [16, 3, 2, 2]',
        ),
        'depth': (
            classifier(depth=7),
            tuned,
            ': ViT, but of another architecture; differing keys (12): blocks.6.norm1.weight: file absent, model [16]; '
            'blocks.6.norm1.bias: file absent, model [16]; blocks.6.attn.qkv.weight: file absent, model [48, 16]; '
            'blocks.6.attn.qkv.bias: file absent, model [48]; '
            'blocks.6.attn.proj.weight: file absent, model [16, 16]; ...',
        ),
        'a key too many': (
            classifier(),
            tuned | {'dist_token\n': torch.ones(1)},
            r': ViT, but of another architecture; differing keys (1): dist_token\n: file [1], model absent',
        ),
        'integers': (
            classifier(),
            tuned | {'cls_token': torch.ones(1, 1, 16, dtype=torch.uint16)},
            ': ViT, but of another architecture; differing keys (1): '
            'cls_token: file [1, 1, 16] torch.uint16, model [1, 1, 16]',
        ),
        'twice': (toy(), state | {'norm5.weight': torch.ones(16)}, ': two of its keys stand for norms.5.weight'),
        'own names': (
            torch.nn.Linear(2, 2),
            {'model': dict(list(tuned.items())[:2])},
            ': own names of Linear, but of another architecture; differing keys (4): weight: file absent, '
            'model [2, 2]; bias: file absent, model [2]; cls_token: file [1, 1, 16], model absent; '
            'pos_embed: file [1, 5, 16], model absent',
        ),
    }
    for kind, (model, source, expected) in cases.items():
        line = error(model, source)
        assert line == expected
        measured(f'{kind}: a.pth{line}')
