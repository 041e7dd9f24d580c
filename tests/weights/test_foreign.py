"""Files as others write them: names under a prefix, the names of other libraries, averages, settings of a trainer.

And what no file should hold: weights that are not finite, fields that take for ever to compare or print.
"""

import argparse
import collections
import re
import sys
import types

import pytest
import torch

import models_a2mim
import models_mirl
from main_finetune import get_args_parser as finetune_args
from main_pretrain import get_args_parser as pretrain_args
from util import checkpoint, config
from util.errors import CheckpointError
from util.weights import load_published, read_checkpoint

SIZE = dict(patch_size=4, embed_dim=16, depth=2, num_heads=2)


def vit(seed: int = 0, pool: str = 'avg', **kwargs) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = models_mirl.create_classifier('mirl_vit_small', 3, img_size=8, global_pool=pool, **SIZE | kwargs).eval()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    return model


def under(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


@torch.no_grad()
def assert_same_answers(file, source: torch.nn.Module, target: torch.nn.Module, *words: str, **options) -> None:
    report = load_published(target, file, **options)
    side = 8 if hasattr(source, 'blocks') else 64
    imgs = torch.randn(2, 3, side, side)
    assert torch.equal(source.eval()(imgs), target.eval()(imgs))
    assert all(word in str(report) for word in words), str(report)
    assert not report.missing


@pytest.mark.parametrize('prefix', ['backbone.', 'encoder.', '_orig_mod.', 'anything.', 'model._orig_mod.'])
def test_prefixes(prefix):
    source, target, state = vit(), vit(1), under(prefix, vit().state_dict())
    for file in (state, {'state_dict': state}, {'model': {'module': state}}):
        assert_same_answers(file, source, target, f'prefix {prefix} taken off')
    for other in ('teacher.', 'ema_model.', 'momentum_encoder.'):
        file = state | under(other + prefix, vit(2).state_dict()) | {'projector.weight': torch.ones(2)}
        assert_same_answers(file, source, target, f'prefix {prefix} taken off beside', other[:-1], 'projector')
    with pytest.raises(CheckpointError, match=r'differing keys \(1\): more: file \[2\], model absent'):
        load_published(target, state | {f'{prefix}more': torch.ones(2)})
    with pytest.raises(CheckpointError, match=r'several networks for this model, under a\., b\.'):
        load_published(target, under('a.', source.state_dict()) | under('b.', source.state_dict()))


def test_wrapped_blocks_and_other_networks():
    """Blocks that were compiled or sharded one by one; a network that no table lists."""
    source, target = vit(), vit(1)
    for name in ('_orig_mod', '_fsdp_wrapped_module'):
        file = {re.sub(r'^(blocks\.\d)', rf'\1.{name}', key): value for key, value in source.state_dict().items()}
        assert_same_answers(file, source, target)
    nets = [models_a2mim.create_classifier('a2mim_timm', 3, img_size=64, name='regnety_002') for _ in range(2)]
    assert_same_answers(under('net.', nets[0].state_dict()), *nets, 'prefix net. taken off')


AVERAGES = {
    'ema': lambda state: {'ema': state},
    'state_dict_ema': lambda state: {'state_dict_ema': state},
    'model_ema': lambda state: {'model_ema': {'module': state}},
    'averaged': lambda state: {'averaged': {'decay': 0.9, 'shadow': state}},
    'ema_state_dict': lambda state: {'ema_state_dict': under('module.', state) | {'steps': torch.ones(1)}},
    'ema_*': lambda state: {'ema_' + key.replace('.', '_'): value for key, value in state.items()},
    'ema_model.*': lambda state: under('ema_model.module.', state),
}


@pytest.mark.parametrize('where', AVERAGES)
def test_averages(where):
    source, average = vit(), vit(1)
    more = AVERAGES[where](average.state_dict())
    plain = source.state_dict()
    plain = under('model.', plain) if '.' in where else plain
    file = {'state_dict': plain | more} if '*' in where else {'model': plain} | more
    also = f'the file also holds averaged weights ({where}): --init_ema takes them'
    assert_same_answers(file, source, vit(2), also, flag='--init_ema')
    assert_same_answers(file, average, vit(2), f'averaged weights ({where})', ema=True)
    with pytest.raises(CheckpointError, match='no averaged weights in it: drop --init_ema'):
        load_published(vit(), {'model': source.state_dict()}, ema=True, flag='--init_ema')


def test_averages_that_changed_places():
    """In OpenMMLab's runs: `state_dict` are the averaged weights."""
    file = {'state_dict': vit().state_dict(), 'ema_state_dict': vit(1).state_dict(), 'message_hub': {}}
    assert_same_answers(file, vit(), vit(2), 'averaged weights (state_dict)', ema=True)
    assert 'also' not in str(load_published(vit(2), file))


HF_NAMES = {
    r'blocks\.(\d+)\.attn\.proj': r'encoder.layer.\1.attention.output.dense',
    r'blocks\.(\d+)\.mlp\.fc1': r'encoder.layer.\1.intermediate.dense',
    r'blocks\.(\d+)\.mlp\.fc2': r'encoder.layer.\1.output.dense',
    r'blocks\.(\d+)\.norm1': r'encoder.layer.\1.layernorm_before',
    r'blocks\.(\d+)\.norm2': r'encoder.layer.\1.layernorm_after',
    r'blocks\.(\d+)\.gamma_': r'encoder.layer.\1.lambda_',
    r'blocks\.(\d+)\.attn\.relative': r'encoder.layer.\1.attention.attention.relative_position_bias.relative',
    r'patch_embed\.proj': 'embeddings.patch_embeddings.projection',
    'pos_embed': 'embeddings.position_embeddings',
    'cls_token': 'embeddings.cls_token',
    'fc_norm': 'pooler.layernorm',
    'norm': 'layernorm',
    'head': 'classifier',
}


def hugging_face(model: torch.nn.Module, prefix: str) -> dict:
    state = {}
    for key, value in model.state_dict().items():
        if found := re.fullmatch(r'blocks\.(\d+)\.attn\.(qkv\.|(?=[qv]_))(.*)', key):
            where = f'{prefix}encoder.layer.{found[1]}.attention.attention'
            names = ('query', 'key', 'value')
            if found[2]:
                parts = zip(names, value.chunk(3), strict=True)
                state |= {f'{where}.{name}.{found[3]}': part.clone() for name, part in parts}
            else:
                state[f'{where}.{names[" kv".index(found[3][0]) if found[3][0] == "v" else 0]}.bias'] = value
            continue
        pattern = next(pattern for pattern in HF_NAMES if re.match(pattern, key))
        name = re.sub(f'^{pattern}', HF_NAMES[pattern], key)
        state[name if name.startswith('classifier') else prefix + name] = value
    return state


@pytest.mark.parametrize(('prefix', 'pool'), [('vit.', 'token'), ('', 'token'), ('deit.', 'token'), ('beit.', 'avg')])
def test_names_of_transformers(prefix, pool):
    """Query, key and value apart; MAE's decoder is ignored."""
    if prefix == 'beit.':
        options = dict(img_size=16, patch_size=4, **{k: v for k, v in SIZE.items() if k != 'patch_size'})
        source, target = (models_a2mim.create_classifier('a2mim_vit_small', 3, **options) for _ in range(2))
        for value in source.state_dict().values():
            value.copy_(torch.randn(value.shape) if value.is_floating_point() else value)
        file = hugging_face(source, prefix)
        assert f'{prefix}encoder.layer.0.attention.attention.query.bias' in file
        report = load_published(target, file)
        assert 'Hugging Face BEiT' in str(report)
        floats = {key: value for key, value in source.state_dict().items() if value.is_floating_point()}
        assert all(torch.equal(target.state_dict()[key], value) for key, value in floats.items())
        return
    source, target = vit(pool=pool), vit(1, pool)
    file = hugging_face(source, prefix) | {'decoder.mask_token': torch.ones(1, 1, 8)}
    assert_same_answers(file, source, target, 'Hugging Face', '1 ignored (decoder.mask_token)')
    assert_same_answers(under('model.', file) if prefix else file, source, target)
    with pytest.raises(CheckpointError, match='is without its key or value'):
        load_published(target, {key: value for key, value in file.items() if '0.attention.attention.key' not in key})


RELEASED = (
    (r'stem\.(\d)', r'downsample_layers.0.\1'),
    (r'stages\.(\d)\.downsample\.', r'downsample_layers.\1.'),
    (r'stages\.(\d)\.blocks\.(\d+)\.conv_dw', r'stages.\1.\2.dwconv'),
    (r'stages\.(\d)\.blocks\.(\d+)\.mlp\.fc([12])', r'stages.\1.\2.pwconv\3'),
    (r'stages\.(\d)\.blocks\.(\d+)\.mlp\.grn\.weight', r'stages.\1.\2.grn.gamma'),
    (r'stages\.(\d)\.blocks\.(\d+)\.mlp\.grn\.bias', r'stages.\1.\2.grn.beta'),
    (r'stages\.(\d)\.blocks\.(\d+)\.(norm|gamma)', r'stages.\1.\2.\3'),
    (r'head\.norm', 'norm'),
    (r'head\.fc', 'head'),
)


def released(model: torch.nn.Module) -> dict:
    state = {}
    for key, value in model.state_dict().items():
        name = next(re.sub(f'^{a}', b, key) for a, b in RELEASED if re.match(a, key))
        state[name] = value.reshape(1, 1, 1, -1) if '.grn.' in name else value
    return state


def test_convnext_as_released():
    """ConvNeXt's and SparK's names; V2 is told from V1."""
    sizes = dict(img_size=64, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))

    def convnext(**kwargs):
        net = models_a2mim.create_classifier('a2mim_convnext_pico', 3, **sizes | kwargs)
        for value in net.state_dict().values():
            value.copy_(torch.rand(value.shape))
        return net

    v2_options = dict(use_grn=True, ls_init_value=None)
    source, v2 = convnext(), convnext(**v2_options)
    assert_same_answers({'model': released(source)}, source, convnext(), 'ConvNeXt as released')
    whole = under('sparse_encoder.sp_cnn.', released(source)) | {'dense_decoder.proj.weight': torch.ones(2)}
    assert_same_answers(
        {'module': whole}, source, convnext(), 'prefix sparse_encoder.sp_cnn. taken off', 'dense_decoder'
    )
    assert_same_answers({'model': released(v2)}, v2, convnext(**v2_options), 'ConvNeXt as released')
    for file in (released(v2), v2.state_dict()):
        with pytest.raises(CheckpointError, match=r'ConvNeXt V2 \(it has GRN\), the model is V1'):
            load_published(source, file)
    with pytest.raises(CheckpointError, match='ConvNeXt V1, the model is V2'):
        load_published(v2, released(source))


def test_settings_of_a_trainer(tmp_path, monkeypatch):
    """A trainer's file holds objects of many packages: they are dropped, and a call of theirs is refused."""
    library = types.ModuleType('pytorch_lightning')
    library.Hyper = type('Hyper', (dict,), {'__module__': library.__name__})
    library.Config = type('Config', (), {'__module__': library.__name__})
    library.call = types.FunctionType((lambda: None).__code__, {'__name__': library.__name__}, 'call')
    library.call.__qualname__ = 'call'
    monkeypatch.setitem(sys.modules, library.__name__, library)
    hyper, settings, called = library.Hyper(lr=1e-3, size=(1, 2)), library.Config(), library.Config()
    settings.names, settings.inner = ['a'], library.Hyper(x=library.Config())
    more = {'args': argparse.Namespace(), 'kind': dict, 'counts': collections.defaultdict(list, a=[1])}
    content = {
        'state_dict': under('model.', vit().state_dict()),
        'hyper_parameters': hyper,
        'callbacks': {'s': settings},
    }
    for zipped in (True, False):
        torch.save(content | more, tmp_path / 'a.ckpt', _use_new_zipfile_serialization=zipped)
        assert_same_answers(tmp_path / 'a.ckpt', vit(), vit(1), 'prefix model. taken off: 32')
    library.Config.__reduce__ = lambda self: (library.call, ())
    torch.save(content | {'hyper_parameters': called}, tmp_path / 'a.ckpt')
    with pytest.raises(
        CheckpointError, match=r'asks for pytorch_lightning\.call, which is not plain data; nothing in it was'
    ):
        read_checkpoint(tmp_path / 'a.ckpt')


@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(value):
    """Are refused, by the first such key."""
    source, target = vit(), vit(1)
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    state = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    state['blocks.1.mlp.fc2.bias'][3] = state['head.bias'][0] = value
    words = r'not finite \(nan or infinite\); first such key: blocks\.1\.mlp\.fc2\.bias, 2 of 32 tensors'
    for file in ({'model': state}, {'model': before, 'state_dict_ema': state}):
        with pytest.raises(CheckpointError, match=words):
            load_published(target, file, ema='state_dict_ema' in file)
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())
    with pytest.raises(CheckpointError, match=rf'last\.pth: its weights are {words}; resume an earlier checkpoint'):
        checkpoint.check_healthy({'model': state}, 'last.pth')
    checkpoint.check_healthy({'model': before, 'ema': before}, 'last.pth')


# --------------------------------------------------------------------------
# fields


def doubled(times: int = 60) -> tuple:
    value = ()
    for _ in range(times):
        value = (value, value)
    return value


def nested(depth: int = 20_000) -> dict:
    value = {}
    for number in range(depth):
        value = {'a': value if number % 2 else [value]}
    return value


FIELDS = {
    'tuples': doubled(),
    'a dict of them': {'a': {'b': doubled()}},
    'deep': nested(),
    'a long text': 'x' * 10**6,
    'a tensor': torch.ones(3),
    'none': None,
    'a large number': 10**300,
}


@pytest.mark.parametrize('kind', FIELDS)
def test_fields_are_bounded(kind, tmp_path):
    """Whatever stands where a file says what it is, in a file or in a dict: an end in a line, and soon."""
    value, args = FIELDS[kind], config.plain(finetune_args().parse([]))
    weights = {'model': vit().state_dict()}
    own = weights | {'run': {'stage': 'finetune', 'model': 'm'}, 'args': args}
    files = [own | {'run': {'stage': value}}, own | {'run': value}, own | {'args': value}, own | {'epoch': value}]
    files += [own | {'args': args | {name: value}} for name in ('model', 'mean', 'model_kwargs')]
    roles = pretrain_args().roles
    for file in files:
        report = load_published(vit(1), file)
        assert len(str(report.origin)) < 400
        changed = checkpoint.changed_settings(file, args, roles)
        assert all(len(line) < 2000 for line in changed)
    if kind != 'deep':  # which pickle itself does not write
        for field in ('run', 'args', 'optimizer', 'record', 'logger', 'epoch'):
            torch.save(own | {field: {'of': [value]}}, tmp_path / 'a.pth')
            for part in read_checkpoint(tmp_path / 'a.pth').values():
                repr(part)
            load_published(vit(1), tmp_path / 'a.pth')
    state = own | {'optimizer': {'param_groups': []}, 'scaler': {}, 'logger': {}, 'record': {}}
    state |= {'epoch': 1, 'step': 1, 'steps': 2, 'schema': 1}
    current = {'stage': 'finetune', 'model': 'm', 'mean': [0.5]}
    for key, words in (('stage', 'is a checkpoint of main_'), ('model', 'other settings'), ('mean', 'other settings')):
        with pytest.raises(CheckpointError, match=words) as caught:
            checkpoint.check_same_run(state | {'run': current | {key: value}}, current, 'a.pth')
        assert len(str(caught.value)) < 500
    for key in ('run', 'record', 'epoch'):
        if not (key == 'epoch' and kind == 'a large number') and not (key == 'record' and isinstance(value, dict)):
            with pytest.raises(CheckpointError):
                checkpoint.check_same_run(state | {key: value}, current, 'a.pth')
