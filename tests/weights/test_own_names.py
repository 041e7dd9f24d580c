"""A method that no table of util/weights knows: its own checkpoints load in their own names, and nothing else does."""

import re

import pytest
import torch
from torch import nn
from training import MAINS, arguments, make_images

from util import checkpoint
from util.errors import CheckpointError, UserError
from util.weights import load_published

WIDTH = 4


class Fifth(nn.Module):
    """As models_yours.py might have it: an encoder of `depth` blocks, and a decoder."""

    def __init__(self, depth=2, width=WIDTH):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.BatchNorm1d(width)
        self.decoder = nn.Linear(width, 3)

    def encoder_state_dict(self):
        return {name: value for name, value in self.state_dict().items() if not name.startswith('decoder.')}


class FifthClassifier(nn.Module):
    def __init__(self, num_classes=10, depth=2, width=WIDTH):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.BatchNorm1d(width)
        self.pool_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, imgs):
        x = self.patch_embed(imgs).mean((2, 3))
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.pool_norm(self.norm(x)))


LATER = ['pool_norm.weight', 'pool_norm.bias', 'head.weight', 'head.bias']  # what a classifier has beside its encoder


def drawn(model):
    """With every weight drawn, so that no two models agree by chance."""
    for value in model.state_dict().values():
        value.copy_(torch.randn(value.shape) * 10)
    return model


def pretraining_file(model, **others):
    return {'model': model.state_dict(), 'encoder': model.encoder_state_dict(), 'epoch': 3, **others}


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def refused(model, source, words) -> None:
    """With these words, and the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        load_published(model, source)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def assert_holds(model, state) -> None:
    own = model.state_dict()
    assert state
    assert all(torch.equal(own[name], value) for name, value in state.items())


def test_pretraining_goes_into_pretraining_whole(tmp_path):
    source, model = drawn(Fifth()), Fifth()
    checkpoint.save(tmp_path / 'a.pth', pretraining_file(source))
    report = load_published(model, tmp_path / 'a.pth')
    assert not report.missing + report.ignored
    assert 'own names of Fifth' in str(report)
    assert_holds(model, source.state_dict())

    whole = source.state_dict()
    for name in whole:
        refused(Fifth(), {'model': without(whole, name)}, rf'\(1\): {re.escape(name)}: file absent')
    refused(Fifth(), {'model': whole | {'more': torch.ones(2)}}, r'\(1\): more: file \[2\], model absent')
    refused(Fifth(), source.encoder_state_dict(), r'\(2\): decoder\.weight: file absent')
    refused(Fifth(width=6), pretraining_file(source), r'patch_embed\.weight: file \[4, 3, 8, 8\], model \[6, 3, 8, 8\]')
    refused(Fifth(), {'model': drawn(FifthClassifier()).state_dict()}, r'decoder\.weight: file absent')


def test_an_encoder_goes_into_its_classifier(tmp_path):
    """Whole; the head, and what else the encoder has nothing of, starts anew."""
    source, model = drawn(Fifth()), drawn(FifthClassifier())
    before = {name: model.state_dict()[name].clone() for name in LATER}
    checkpoint.save(tmp_path / 'a.pth', pretraining_file(source))
    report = load_published(model, tmp_path / 'a.pth')
    assert report.missing == LATER
    assert_holds(model, source.encoder_state_dict() | before)

    file, encoder = pretraining_file(source), source.encoder_state_dict()
    refused(FifthClassifier(depth=3), file, r'\(2\): blocks\.2\.weight: file absent, model \[4, 4\]; blocks\.2\.bias')
    refused(FifthClassifier(depth=1), file, r'\(2\): blocks\.1\.weight: file \[4, 4\], model absent')
    refused(FifthClassifier(width=6), file, r'patch_embed\.weight: file \[4, 3, 8, 8\], model \[6, 3, 8, 8\]')
    for name in encoder:
        refused(FifthClassifier(), {'encoder': without(encoder, name)}, rf'\(1\): {re.escape(name)}: file absent')
    compiled = {f'module._orig_mod.{name}': value for name, value in without(encoder, 'blocks.1.bias').items()}
    refused(FifthClassifier(), {'encoder': compiled}, r'\(1\): blocks\.1\.bias: file absent')


def test_what_shares_no_key_is_an_error():
    """Nothing loaded is never a success."""
    other = nn.Sequential(nn.Linear(4, 4)).state_dict()
    refused(FifthClassifier(), {'encoder': other}, r'\(2\): 0\.weight: file \[4, 4\], model absent; 0\.bias')
    for source in ({'model': other}, other):
        for model in (FifthClassifier(), Fifth()):
            refused(model, source, r'differing keys \(\d+\): patch_embed\.weight: file absent')
    refused(Fifth(), {'encoder': other}, 'no weights in it; its keys are encoder')
    refused(FifthClassifier(), {'encoder': {}}, 'no weights in it')
    refused(FifthClassifier(), {'model': Fifth().state_dict()}, r'decoder\.weight: file \[3, 4\], model absent')
    probe = nn.Module()
    probe.fc = nn.Linear(4, 2)
    refused(probe, {'model': {'fc.weight': torch.ones(3, 4), 'fc.bias': torch.ones(3)}}, 'none of its weights')


def test_fine_tuned_goes_into_the_classifier_whole():
    source, averaged = drawn(FifthClassifier()), drawn(FifthClassifier())
    file = {'model': source.state_dict(), 'ema': averaged.state_dict()}
    for ema, expected in ((False, source), (True, averaged)):
        model = FifthClassifier()
        report = load_published(model, file, ema=ema)
        assert not report.missing + report.ignored
        assert_holds(model, expected.state_dict())
    whole = source.state_dict()
    for name in whole:
        refused(FifthClassifier(), {'model': without(whole, name)}, rf'\(1\): {re.escape(name)}: file absent')
    headless = {name: value for name, value in whole.items() if not name.startswith('head.')}
    refused(FifthClassifier(), {'model': headless}, r'\(2\): head\.weight: file absent')


def test_other_classes_start_a_new_head():
    source, model = drawn(FifthClassifier(7)), drawn(FifthClassifier(10))
    before = {name: model.state_dict()[name].clone() for name in LATER[2:]}
    report = load_published(model, {'model': source.state_dict()})
    assert report.missing == ['head.weight', 'head.bias']
    assert report.ignored == ['head.weight [7, 4]', 'head.bias [7]']
    assert_holds(model, {k: v for k, v in source.state_dict().items() if not k.startswith('head.')} | before)


def test_evaluation_takes_no_new_head(tmp_path, monkeypatch):
    """--eval: every weight comes from the file."""
    main, data = MAINS['finetune'], make_images(tmp_path / 'images')
    monkeypatch.setattr(main, 'create_classifier', lambda args, num_classes: drawn(FifthClassifier(num_classes)))
    argv = arguments(data, tmp_path / 'out', '--eval', '--resume', tmp_path / 'a.pth')
    args = main.get_args_parser().parse(argv, stage='finetune')
    classes = len(list((data / 'val').iterdir()))
    for file in ({'model': drawn(FifthClassifier(classes + 1)).state_dict()}, pretraining_file(Fifth())):
        checkpoint.save(tmp_path / 'a.pth', file)
        with pytest.raises(UserError, match=r'cannot be evaluated as .* missing, stay as initialised \('):
            main.main(args)
    checkpoint.save(tmp_path / 'a.pth', {'model': drawn(FifthClassifier(classes)).state_dict()})
    main.main(args)
