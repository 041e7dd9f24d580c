"""Detection checkpoints into detectors, pretrained files of any origin into their encoders, and back, key by key."""

import copy
import functools
import json
import pickle
import re
import shlex

import pytest
import test_a2mim_published as a2mim
import torch
from golden import golden
from test_segmentation_files import TINY, assert_holds, classifier, drawn, pretraining, refused, segmenter
from torch import nn
from torch.nn.functional import interpolate

import main_finetune
from main_pretrain import find_method
from scripts import export, finetune_detection, finetune_segmentation, inspect_checkpoint, visualize
from util import checkpoint, config
from util.errors import UserError
from util.nn.detector import create_detector
from util.weights import class_names, find_origin, load_published, read_source
from util.weights.files import read_checkpoint

SMALL = dict(width=8, fc_width=16, conv_width=8, mask_convs=2)
FOUR = dict(anchor_sizes=(8, 16, 32, 64))  # of three maps, and one more
DETECTORS = {name: (name, FOUR if name == 'mixmae_tiny' else {}) for name in TINY}
DETECTORS['c4'] = 'a2mim_resnet_tiny', dict(neck='c4', norm='bn')
VITDET = dict(box_head='4conv1fc', norm='ln', rpn_depth=2, mask_convs=4)
OWN = {'args': {'model': 'mirl_vit_tiny', 'model_kwargs': {}}, 'run': {'stage': 'detect'}, 'classes': ['a', 'b', 'c']}


@functools.cache
def template(name: str, num_classes: int, sizes: tuple, options: tuple) -> nn.Module:
    sizes = {'img_size': TINY.get(name, 64), **dict(sizes)}
    windows = dict(window_size=3, rel_pos_size=64) if '_vit' in name else {}
    encoder = find_method(name).create_backbone(name, **windows | sizes)
    return create_detector(encoder, num_classes, **SMALL | dict(options))


def detector(name: str, num_classes: int = 3, sizes: dict | None = None, **options) -> nn.Module:
    """`sizes` are the encoder's."""
    made = template(name, num_classes, tuple((sizes or {}).items()), tuple(options.items()))
    return drawn(copy.deepcopy(made))


def assert_accounted(report, model: nn.Module, file: dict) -> None:
    """Every key of the model is loaded or missing, unless it is computed; each of the file is loaded or ignored."""
    own = {key for key in model.state_dict() if not key.endswith('absolute_pos_embed') or key in report.loaded}
    assert sorted(report.loaded + report.missing) == sorted(own)
    assert len(report.loaded) + len(report.ignored) == len(file)


# --------------------------------------------------------------------------
# our own files


@pytest.mark.parametrize('case', ['a2mim_vit_tiny', 'a2mim_convnext_pico', 'c4', 'vitdet', 'boxes'])
def test_own_checkpoints(case, tmp_path):
    """Plain or averaged weights, strictly; other classes only where they may be new."""
    more = {'vitdet': ('localmim_vit_tiny', VITDET), 'boxes': ('mixmae_tiny', dict(masks=False, **FOUR))}
    name, options = (DETECTORS | more)[case]
    source, averaged, target = (detector(name, **options) for _ in range(3))
    file = {'model': source.state_dict(), 'ema': averaged.state_dict(), **OWN}
    checkpoint.save(tmp_path / 'a.pth', file)
    for given, ema, expected in ((file, False, source), (tmp_path / 'a.pth', True, averaged)):
        report = load_published(target, given, ema=ema)
        assert not report.missing + report.ignored + report.resized
        assert report.format.startswith('our detection')
        assert report.origin.stage == 'detect'
        assert_holds(target, expected.state_dict())

    other, whole = detector(name, num_classes=5, **options), source.state_dict()
    refused(other, file, 'knows 3 classes, the model 5')
    before = {key: x.clone() for key, x in other.state_dict().items() if re.search('cls_score|bbox_pred|logits', key)}
    before = {key: x for key, x in before.items() if key.startswith('roi_heads.')}
    assert len(before) == (4 if case == 'boxes' else 6)
    report = load_published(other, file, new_classes=True)
    assert_accounted(report, other, whole)
    assert sorted(report.missing) == sorted(before) == sorted(line.partition(' ')[0] for line in report.ignored)
    assert_holds(other, before | {key: x for key, x in whole.items() if key not in before})
    encoder = next(key for key in whole if key.startswith('backbone.encoder.patch_embed') or 'conv' in key)
    for key in ('rpn.head.cls_logits.bias', 'roi_heads.box_predictor.bbox_pred.bias', encoder):
        refused(target, {'model': {k: x for k, x in whole.items() if k != key}}, rf'{re.escape(key)}: file absent')


def test_origin_and_classes():
    assert str(find_origin({'model': {}, **OWN})) == 'scripts/finetune_detection.py --model mirl_vit_tiny'
    assert class_names(OWN) == ['a', 'b', 'c']


def test_a_batchnorm_that_is_frozen():
    """It counts no batches."""
    free, frozen = (detector('a2mim_resnet_tiny', norm=norm) for norm in (None, 'frozen'))
    same = frozen.state_dict().keys() & free.state_dict().keys()
    assert not load_published(frozen, {'model': free.state_dict()}).missing
    assert_holds(frozen, {key: free.state_dict()[key] for key in same})
    report = load_published(drawn(free), {'model': frozen.state_dict()})
    assert not report.missing
    tuned = classifier('a2mim_resnet_tiny')
    assert_accounted(load_published(frozen, tuned.state_dict()), frozen, tuned.state_dict())


# --------------------------------------------------------------------------
# files of others into the encoder, and the encoder into others


def assert_started(model: nn.Module, report, file: dict, values: dict) -> None:
    """The encoder holds these values; neck, heads, and norms and relative positions of maps alone are new."""
    assert 'encoder alone: the heads are new' in str(report)
    assert_accounted(report, model, file)
    new = r'backbone\.(pyramid|fpn)\.|rpn\.|roi_heads\.(?!layer4)|backbone\.encoder\.(norm\d\.|.*rel_pos_[hw]$)'
    assert all(re.match(new, name) for name in report.missing)
    own = model.state_dict()
    places = ('backbone.encoder.', 'roi_heads.')
    same = {p + key: x for key, x in values.items() for p in places if p + key in own and x.shape == own[p + key].shape}
    assert len(same) > 20
    known = same.keys() | {line.partition(' ')[0] for line in report.resized}
    assert all('encoder.norm3' in key for key in known.symmetric_difference(report.loaded))
    assert_holds(model, same)


@pytest.mark.parametrize('case', DETECTORS)
def test_own_pretraining_and_classifiers(case):
    """All of the encoder, with the stage of it that C4 has in its head; what is beyond it is named."""
    name, options = DETECTORS[case]
    source, target = pretraining(name), detector(name, **options)
    encoder = source.encoder_state_dict()
    for file in ({'model': source.state_dict(), 'encoder': encoder}, encoder):
        report = load_published(target, file)
        assert_started(target, report, encoder, encoder)
        assert len(report.resized) == (name == 'simmim_swin_pico')  # whose last map was a smaller window
        drawn(target)
    tuned = classifier(name)
    report = load_published(target, {'model': tuned.state_dict()})
    assert_started(target, report, tuned.state_dict(), tuned.state_dict())
    dropped = {line.partition(' ')[0] for line in report.ignored if 'absolute' not in line}
    expected = {key for key in tuned.state_dict() if re.match(r'(head\.(?!norm)|fc\.|fc_norm|norm\.|cls_token)', key)}
    assert dropped - expected <= {f'blocks.{i}.attn.k_bias' for i in range(4)}
    assert expected <= dropped


@pytest.mark.parametrize('family', ['vit', 'swin'])
def test_openmixup_pretraining(family):
    name, sizes = a2mim.SMALL[family][:2]
    rows = a2mim.whole(family)
    state = a2mim.filled(rows)
    target = detector(name, sizes=sizes)
    report = load_published(target, {'state_dict': state})
    assert 'OpenMixup' in report.format
    values = a2mim.encoder_of(a2mim.expected(rows, state))
    assert not [name for name in report.missing if name.startswith('backbone.encoder.') and 'norm' not in name]
    assert_holds(target.backbone.encoder, {k: x for k, x in values.items() if f'backbone.encoder.{k}' in report.loaded})


@pytest.mark.parametrize('case', ['mirl_vit_tiny', 'a2mim_vit_tiny', 'c4', 'a2mim_convnext_pico', 'mixmae_tiny'])
def test_between_tasks(case):
    """A segmenter's encoder starts a detector, and a detector's starts classifiers, pretraining and segmenters."""
    name, options = DETECTORS[case]
    source = detector(name, **options)
    prefix = re.compile(r'backbone\.encoder\.|roi_heads\.')
    encoder = {prefix.sub('', key, count=1): x for key, x in source.state_dict().items()}
    sizes = dict(rel_pos_bias=False, init_values=None) if name in ('mirl_vit_tiny', 'localmim_vit_tiny') else {}
    others = [(classifier(name), {}), (pretraining(name), {'new_decoder': True}), (segmenter(name, **sizes), {})]
    for model, given in others:
        report = load_published(model, {'model': source.state_dict(), **OWN}, **given)
        assert 'taken off beside rpn, roi_heads' in report.format.replace('backbone, ', '')
        own = model.encoder_state_dict() if given else getattr(model, 'encoder', model).state_dict()
        same = [key for key, x in own.items() if key in encoder and x.shape == encoder[key].shape]
        assert all(torch.equal(own[key], encoder[key]) for key in same)
        new = {key for key in own if key not in encoder}
        assert all(re.match(r'(head|fc|fc_norm|norm)\.|cls_token|blocks\.\d\.attn\.k_bias', key) for key in new)
        assert len(same) > 20
    segmented, target = others[-1][0], detector(name, **options)
    drawn(segmented)
    file = {'model': segmented.state_dict()}
    report = load_published(target, file)
    assert_started(target, report, file['model'], segmented.encoder.state_dict())


def test_positions():
    """Relative ones of another size are stretched linearly; those of a class token are new, or go."""
    source = detector('mirl_vit_tiny')
    larger = detector('mirl_vit_tiny', sizes=dict(rel_pos_size=96, window_size=3))
    report = load_published(larger, {'model': source.state_dict()})
    assert len(report.resized) == 8
    assert 'linearly' in str(report)
    table = source.backbone.encoder.blocks[3].attn.rel_pos_h
    wanted = interpolate(table.T[None], 23, mode='linear')[0].T
    assert torch.equal(larger.backbone.encoder.blocks[3].attn.rel_pos_h, wanted)
    bare = source.backbone.encoder.state_dict()
    bare['pos_embed'] = bare['pos_embed'][:, 1:]
    target = detector('mirl_vit_tiny')
    first = target.backbone.encoder.pos_embed[:, :1].clone()
    load_published(target, bare)
    assert torch.equal(target.backbone.encoder.pos_embed, torch.cat([first, bare['pos_embed']], dim=1))
    without = detector('a2mim_vit_tiny', sizes=dict(rel_pos=False, window_size=3))
    tables = [f'blocks.{i}.attn.relative_position_bias_table' for i in range(4)]
    report = load_published(without, pretraining('a2mim_vit_tiny').encoder_state_dict())
    assert {line.partition(' ')[0] for line in report.ignored} >= set(tables)


# --------------------------------------------------------------------------
# detectron2's ViTDet


NAMES = (  # ours -> theirs
    (r'backbone\.encoder\.', 'backbone.net.'),
    (r'rpn\.head\.conv\.(\d)\.0\.', r'proposal_generator.rpn_head.conv.conv\1.'),
    (r'rpn\.head\.cls_logits\.', 'proposal_generator.rpn_head.objectness_logits.'),
    (r'rpn\.head\.bbox_pred\.', 'proposal_generator.rpn_head.anchor_deltas.'),
    (r'roi_heads\.box_head\.5\.', 'roi_heads.box_head.fc1.'),
    (r'roi_heads\.mask_predictor\.conv5_mask\.', 'roi_heads.mask_head.deconv.'),
    (r'roi_heads\.mask_predictor\.mask_fcn_logits\.', 'roi_heads.mask_head.predictor.'),
)
BEFORE = (4, 1, 0, 1)  # modules before the lateral convolution of a level, of which max-pooling is one


def their_name(key: str) -> str:
    if level := re.match(r'backbone\.pyramid\.levels\.(\d)\.(\w+)\.(\d)\.(\w+)', key):
        number, part, i, end = level.groups()
        number = int(number)
        if part == 'scale':
            return f'backbone.simfp_{number + 2}.{i}.{end}'
        place = BEFORE[number] + (part == 'output')
        return f'backbone.simfp_{number + 2}.{place}.{"norm." * int(i)}{end}'
    if conv := re.match(r'roi_heads\.(box|mask)_head\.(\d)\.([01])\.(\w+)', key):
        name = {'box': 'box_head.conv', 'mask': 'mask_head.mask_fcn'}[conv[1]]
        return f'roi_heads.{name}{int(conv[2]) + 1}.{"norm." * int(conv[3])}{conv[4]}'
    for pattern, name in NAMES:
        if re.match(pattern, key):
            return re.sub(f'^{pattern}', name, key)
    return key


def detectron2(state: dict) -> dict:
    """Their file of these weights: background last, and without box and mask."""
    found = {}
    for key, value in state.items():
        if 'cls_score' in key:
            value = torch.cat([value[1:], value[:1]])
        elif 'roi_heads.box_predictor.bbox_pred' in key:
            value = value[4:]
        elif 'mask_fcn_logits' in key:
            value = value[1:]
        found[their_name(key)] = value
    return found


def vitdet(num_classes: int = 3, **sizes) -> nn.Module:
    return detector('mirl_vit_tiny', num_classes, sizes=dict(patch_size=16, **sizes), **VITDET)


def test_detectron2(tmp_path):
    """Every key of a ViTDet, from the pickle of arrays that they hand out, and as training writes it."""
    source, target = vitdet(), vitdet()
    for name, value in source.state_dict().items():
        if re.match(r'roi_heads\.(box_predictor\.bbox_pred|mask_predictor\.mask_fcn_logits)', name):
            value[: 4 if 'bbox' in name else 1] = 0  # rows of the background
    state = detectron2(source.state_dict())
    assert state.keys() == golden('detection/optim_vitdet.json')['parameters'].keys()
    file = tmp_path / 'model_final.pkl'
    arrays = {key: value.numpy() for key, value in state.items()}
    file.write_bytes(pickle.dumps({'model': arrays, '__author__': 'someone', 'matching_heuristics': True}, protocol=4))
    torch.save({'model': state | {'pixel_mean': torch.ones(3, 1, 1)}, 'iteration': 7}, tmp_path / 'model.pth')
    for path in (file, tmp_path / 'model.pth'):
        report = load_published(target, path)
        assert report.format == 'detectron2 ViTDet'
        assert not report.missing + report.resized
        assert set(report.ignored) <= {'pixel_mean'}
        assert_holds(target, source.state_dict())
        drawn(target)
    report = load_published(vitdet(5), file, new_classes=True)
    assert len(report.missing) == 6
    refused(vitdet(5), read_checkpoint(file), 'knows 3 classes, the model 5')
    last = {key: value for key, value in arrays.items() if key != 'backbone.simfp_5.2.norm.bias'}
    refused(
        target, {'model': last}, r'differing keys \(1\): backbone\.pyramid\.levels\.3\.output\.1\.bias: file absent'
    )
    cascade = {f'roi_heads.box_predictor.{i}.cls_score.weight': torch.ones(4, 16) for i in range(3)}
    refused(
        target, {'model': {k: x for k, x in state.items() if 'box_predictor' not in k} | cascade}, 'three box heads'
    )

    network = drawn(
        find_method('mirl_vit_base').create_classifier(
            'mirl_vit_base', num_classes=3, img_size=32, embed_dim=96, depth=4, num_heads=3
        )
    )
    report = load_published(network, read_source(file))
    assert_holds(network, {'blocks.3.attn.proj.weight': state['backbone.net.blocks.3.attn.proj.weight']})


def test_mistaken_files(measured):
    """Other families, necks and sizes, each in one line; nothing is loaded."""
    vit, swin = detector('mirl_vit_tiny'), detector('simmim_swin_pico')
    file = {'model': swin.state_dict(), **OWN}
    lines = [
        refused(vit, file, r'differing keys .* it was written by scripts/finetune_detection\.py'),
        refused(vit, pretraining('simmim_swin_pico').state_dict(), 'not a checkpoint for this model'),
        refused(boxes := detector('simmim_swin_pico', masks=False), file, r'roi_heads\.mask_head\.0\.0\.weight: file'),
        refused(classifier('mirl_vit_tiny'), file, 'not a checkpoint for this model'),
        refused(vit, {'roi_heads.box_predictor.cls_score.bias': torch.ones(4)}, 'known are our detection, detectron2'),
        refused(vit, {'model': segmenter('mirl_vit_tiny').state_dict()}, 'for which this ViT has no place'),
    ]
    for line in lines:
        measured(line)
    assert any('mask_head' in name for name in load_published(boxes, file, new_classes=True).ignored)


# --------------------------------------------------------------------------
# programs


def saved(path, name: str, *flags: str):
    """A detection file, without its optimiser; in it is what a run of these flags would write."""
    words = ['--model', name, '--input_size', '64', '--pretrain_size', str(TINY[name]), '--width', '8', *flags]
    args = finetune_detection.get_args_parser().parse([*words, '--detector_kwargs', 'fc_width=16', 'conv_width=8'])
    core = drawn(finetune_detection.create_detector(args, 3))
    checkpoint.save(path, {'model': core.state_dict(), **OWN, 'args': config.plain(args)})
    return core


def inspected(path, capsys) -> dict:
    """What is told of it; its commands are for one program."""
    inspect_checkpoint.main(inspect_checkpoint.get_args_parser().parse([str(path), '--json']))
    told = json.loads(capsys.readouterr().out)
    told['flags'] = {what: shlex.split(command)[2:] for what, command in told['commands'].items()}
    for what, command in told['commands'].items():
        assert shlex.split(command)[:2] == ['python', 'scripts/finetune_detection.py']
        told['flags'][what] = finetune_detection.get_args_parser().parse(shlex.split(command)[2:])
    return told


def test_inspect(tmp_path, capsys):
    """What a file is, and commands that make its very network."""
    path = tmp_path / 'own.pth'
    core = saved(path, 'a2mim_resnet_tiny', '--neck', 'c4', '--norm', 'bn')
    told = inspected(path, capsys)
    assert told['origin'].startswith('detection of this program: scripts/finetune_detection.py')
    assert told['classes'] == '3: a, b, c'
    assert {'evaluate it', 'find objects in pictures with it', 'train it for other classes'} == told['flags'].keys()
    args = told['flags']['train it for other classes']
    again = finetune_detection.create_detector(args, 3)
    assert not load_published(again, args.finetune, new_classes=True).ignored
    assert_holds(again, core.state_dict())

    heads = inspect_checkpoint.detector_heads(detectron2(vitdet(80).state_dict()))
    tested = dict(pretrain_size=32, test_size=1024, max_size=1024)
    assert heads == dict(box_head='4conv1fc', norm='ln', rpn_depth=2, box_only=False) | tested
    heads = inspect_checkpoint.detector_heads(detector('a2mim_resnet_tiny', masks=False).state_dict())
    assert heads == dict(box_head='2fc', norm='none', rpn_depth=1, box_only=True)


def test_other_programs(images, tmp_path):
    """What a detection file is not is one line; its encoder can be handed on, without the options of a detector."""
    path = tmp_path / 'own.pth'
    core = saved(path, 'mirl_vit_tiny', '--model_kwargs', 'window_size=3', 'global_blocks=1,3')
    told = 'it was written by scripts/finetune_detection.py --model mirl_vit_tiny'
    for main, flags, lacks in (
        (main_finetune, ['--eval', '--resume'], 'has no classifier to evaluate: fine-tune it, with --finetune'),
        (finetune_segmentation, ['--eval', '--resume'], 'has no segmentation heads: train them, with --finetune'),
        (visualize, [str(images / 'val'), '--checkpoint'], 'is without the decoders that pictures need'),
        (export, ['--with_decoder', str(tmp_path / 'out')], 'is without decoders'),
    ):
        flags = [flags[0], str(path), flags[1]] if main is export else [*flags, str(path)]
        with pytest.raises(UserError, match=f'own.pth {lacks}.*{told}'):
            main.main(main.get_args_parser().parse(flags))
    export.main(export.get_args_parser().parse([str(path), str(tmp_path / 'out'), '--format', 'torch']))
    encoder = torch.load(tmp_path / 'out' / 'model.pth')
    same = core.backbone.encoder.state_dict()
    assert all(torch.equal(encoder[name], same[name]) for name in encoder.keys() & same.keys() - {'pos_embed'})
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert '| as initialised | `cls_token`, `fc_norm.weight`, `fc_norm.bias` |' in card
