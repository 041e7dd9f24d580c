"""A new pretraining from weights of any origin: with the decoder, or from an encoder alone and with a new decoder."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import init
from training import load, train

import models_localmim
import models_mirl
from main_pretrain import find_method
from util import rng
from util.errors import CheckpointError, UserError
from util.training import move
from util.weights import load_published

SIZES = {  # one model of each family, and its image side
    'mirl_vit_tiny': 32,
    'localmim_vit_tiny': 32,
    'localmim_swin_pico': 64,
    'mixmae_tiny': 32,
    'a2mim_vit_tiny': 32,
    'a2mim_resnet_tiny': 32,
    'a2mim_convnext_pico': 64,
    'simmim_swin_pico': 64,
    'a2mim_timm': 64,
}
LARGER = {'mirl_vit_tiny': 64, 'localmim_vit_tiny': 64, 'a2mim_vit_tiny': 64, 'a2mim_resnet_tiny': 64}


FLAGS = ['--batch_size', '32', '--epochs', '1', '--warmup_epochs', '0']


def drawn(model: torch.nn.Module) -> torch.nn.Module:
    """With weights that no two models share by chance."""
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape) + 0.5)
    return model


OPTIONS = {'a2mim_timm': dict(name='regnety_002')}


def pretraining(name: str, size: int) -> torch.nn.Module:
    return drawn(getattr(find_method(name), name)(img_size=size, **OPTIONS.get(name, {})))


def assert_started(model: torch.nn.Module, before: dict, encoder: dict, report) -> None:
    """The encoder is the file's, the rest as it was, and the report accounts for every key of the model."""
    own = model.encoder_state_dict()
    taken = {name: value for name, value in encoder.items() if name in own and value.shape == own[name].shape}
    assert len(taken) > 20
    assert all(torch.equal(own[name], value) for name, value in taken.items())
    moved = {value.data_ptr() for name, value in own.items() if name in encoder}
    kept = {name: value for name, value in model.state_dict().items() if value.data_ptr() not in moved}
    assert kept
    assert all(torch.equal(value, before[name]) for name, value in kept.items())
    assert 'encoder alone: the decoder is new' in str(report)
    assert len(report.loaded) + len(report.missing) == len(model.state_dict())


@pytest.mark.parametrize('name', SIZES)
def test_a_network_without_draws_is_filled_whole(name, monkeypatch):
    """Most is not drawn, and once weights are moved in, nothing is left of that."""

    def networks():
        kwargs = {'img_size': SIZES[name], **OPTIONS.get(name, {})}
        yield getattr(find_method(name), name)(**kwargs)
        yield find_method(name).create_classifier(name, num_classes=2, **kwargs)

    whole = list(networks())
    monkeypatch.setattr(rng, 'untouched', lambda tensor, *args, **kwargs: tensor.fill_(torch.nan))
    monkeypatch.setattr(Tensor, 'erfinv_', lambda tensor: tensor.fill_(torch.nan))
    with rng.undrawn(), torch.no_grad():
        undrawn = list(networks())
    for own, other in zip(whole, undrawn, strict=True):
        left_out = sum(value.isnan().sum() for value in other.parameters())
        most = 0 if name == 'a2mim_timm' else 0.9  # regnets draw in a way of their own
        assert left_out > most * sum(value.numel() for value in other.parameters())
        move(dict(own.state_dict()), other)
        buffers = zip(own.named_buffers(), other.named_buffers(), strict=True)
        assert all(torch.equal(value, found) for (_, value), (_, found) in buffers)
        assert all(torch.equal(*pair) for pair in zip(own.parameters(), other.parameters(), strict=True))


def test_what_draws_until_it_is_satisfied(monkeypatch):
    """torch's truncated normal, by whatever name it is called, comes to an end; after that, all draw as ever."""
    by_name, weight = init.trunc_normal_, torch.full((1000,), 1e9)
    with rng.undrawn():
        assert init.trunc_normal_(weight).eq(1e9).all()
        for bounds in ((-2, 2), (2, 3)):
            assert by_name(weight.fill_(1e9), 0, 1, *bounds).abs().le(3).all()
    assert init.trunc_normal_ is by_name
    assert nn.Linear(9, 9).weight.std() > 0


@pytest.mark.parametrize('name', SIZES)
def test_every_family_starts_from_its_own(name):
    """From its pretraining, decoder included; from the encoder alone, and from what was fine-tuned."""
    source, model = pretraining(name, SIZES[name]), pretraining(name, LARGER.get(name, SIZES[name]))
    tuned = drawn(
        find_method(name).create_classifier(name, num_classes=3, img_size=SIZES[name], **OPTIONS.get(name, {}))
    )
    for encoder in (source.encoder_state_dict(), tuned.state_dict()):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        for file in ({'encoder': encoder}, encoder):
            with pytest.raises(CheckpointError):
                load_published(model, file)
        report = load_published(model, {'encoder': encoder}, new_decoder=True)
        assert_started(model, before, encoder, report)
        assert bool(report.resized) == (name in LARGER and 'vit' in name)
    file = {'model': source.state_dict(), 'encoder': source.encoder_state_dict()}
    report = load_published(model, file, new_decoder=True)
    assert 'alone' not in str(report)
    assert not report.missing
    if name not in LARGER:
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_from_others():
    """timm's networks, MAE's encoder alone and whole, another method's; another decoder is no encoder alone."""
    net = drawn(timm.create_model('vit_tiny_patch16_224', depth=3, num_classes=7, img_size=64))
    options = dict(img_size=64, patch_size=16, embed_dim=192, depth=3, num_heads=3, mlp_ratio=4)
    decoders = dict(out_indices=(0,), decoder_dim=16, decoder_depth=1, decoder_num_heads=2)
    encoder = {key: value for key, value in net.state_dict().items() if not key.startswith('head')}
    mae = {'mask_token': torch.ones(1, 1, 8), 'decoder_embed.weight': torch.ones(8, 192)}
    mae |= {'decoder_pred.weight': torch.ones(768, 8)}
    other_method = {'model': {'blocks.0.weight': torch.ones(2)}, 'encoder': encoder}
    for file in (net.state_dict(), {'model': encoder}, {'model': encoder | mae}, other_method):
        model = drawn(models_mirl.MIRL(**options, **decoders))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        assert_started(model, before, encoder, load_published(model, file, new_decoder=True))
    wide = models_mirl.MIRL(**options, **decoders | dict(decoder_dim=32))
    with pytest.raises(CheckpointError, match=r'another architecture; .*memory_embed\.weight'):
        load_published(wide, {'model': drawn(models_mirl.MIRL(**options, **decoders)).state_dict()}, new_decoder=True)
    with pytest.raises(CheckpointError, match='another architecture'):
        load_published(models_localmim.localmim_vit_tiny(img_size=32), net.state_dict(), new_decoder=True)


def test_runs(images, tmp_path, capsys):
    """--init starts at step 0 with the file's weights; a resume wins over it; another data set is pointed to it."""
    first = train('pretrain', images, tmp_path / 'a', *FLAGS, '--mean', '0.4', '0.4', '0.4')
    assert 'weights: random, from seed 0\n' in capsys.readouterr().out
    flags = [*FLAGS, '--lr', '1e-20', '--weight_decay', '0']
    start = ['--init', tmp_path / 'a' / 'checkpoint-last.pth', '--seed', '3', '--resume', 'auto']
    second = train('pretrain', images, tmp_path / 'b', *flags, *start)
    out = capsys.readouterr().out
    assert f'weights from {start[1]}: our MIRL pretraining: 120 loaded\n' in out
    assert 'resumed' not in out
    assert second['args']['mean'] == [0.4] * 3
    assert '--mean 0.4 0.4 0.4' in out
    assert all(torch.allclose(value, first['model'][key]) for key, value in second['model'].items())
    assert (second['epoch'], second['step']) == (0, 2)
    train('pretrain', images, tmp_path / 'b', *flags, '--epochs', '2', *start)
    out = capsys.readouterr().out
    assert 'weights from' not in out
    assert 'resumed from' in out
    with pytest.raises(UserError, match=r'seed: 0 then, 4 now; to start a new run from its weights: --init .*a/check'):
        train('pretrain', images, tmp_path / 'c', *FLAGS, '--resume', start[1], '--seed', '4')
    with pytest.raises(UserError, match=r'was written by .* mirl_vit_tiny, not for --model mixmae_tiny'):
        train('pretrain', images, tmp_path / 'c', *FLAGS, *start[:2], '--model', 'mixmae_tiny')
    with pytest.raises(UserError, match='--init_ema needs --init PATH'):
        train('pretrain', images, tmp_path / 'c', *FLAGS, '--init_ema')
    assert not load(tmp_path / 'b')['model'].keys() ^ first['model'].keys()
