"""Every study by its program: each kind of network, two ranks, drawn again, and mistakes in one line."""

import argparse
import functools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from training import free_port, start, train

from scripts import analyse
from util.errors import run_main

FLAGS = {  # few forwards
    'interactions': ['--grid', '4', '--pairs', '2', '--contexts', '2', '--orders', '0', '0.5', '--images', '3'],
    'fourier': [],
    'cka': ['--batch_size', '5'],
    'attention': [],
    'occlusion': ['--grid', '4', '--ratios', '0', '0.5'],
}
FIGURES = {what: {f'{what}.png'} for what in FLAGS} | {'fourier': {'fourier.png', 'fourier-depth.png'}}
KINDS = {'swin': 'mixmae_tiny', 'resnet': 'a2mim_resnet_tiny'}


@pytest.fixture(scope='module')
def files(images, tmp_path_factory):
    """A pretrained network, and the same one fine-tuned."""
    folder = tmp_path_factory.mktemp('files')
    short = ['--batch_size', '32', '--epochs', '1', '--warmup_epochs', '0', '--model_kwargs', 'depth=2']
    train('pretrain', images, folder / 'pretrain', *short)
    last = folder / 'pretrain/checkpoint-last.pth'
    train('finetune', images, folder / 'finetune', *short, '--finetune', last)
    return {'pretrained': last, 'tuned': folder / 'finetune/checkpoint-last.pth'}


def line_of(what, images, output, *more) -> list[str]:
    flags = ['--data_path', images, '--output_dir', output, '--num_workers', '0', '--device', 'cpu']
    return [what, *map(str, [*flags, '--batch_size', '4', *FLAGS[what], *more])]


def run_study(*line) -> None:
    analyse.main(analyse.parsed(line_of(*line)))


@pytest.fixture(scope='module')
def alone(images, files, tmp_path_factory):
    """Runs a study of a fine-tuned ViT, windows and convolutions, once, in one process: its flags, its JSON file."""
    nets = ['--checkpoint', f'vit={files["tuned"]}', *(f'{name}=random,model={KINDS[name]}' for name in KINDS)]

    @functools.cache
    def run(what: str) -> tuple[list[str], Path]:
        folder = tmp_path_factory.mktemp(what)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(analyse.STUDIES[what], 'draw', lambda result, path: None)
            run_study(what, images, folder, *nets)
        return nets, folder / f'{what}.json'

    return run


@pytest.mark.parametrize('what', FLAGS)
def test_study(what, alone, tmp_path, capsys):
    """It takes every kind of network; its file alone is enough to show the table and the figures."""
    _, file = alone(what)
    networks = json.loads(file.read_text())['checkpoints']
    assert [of['name'] for of in networks] == ['vit', 'swin', 'resnet']
    assert [of.get('notice') for of in networks] == [
        None,
        None,
        'ResNet has no attention' if what == 'attention' else None,
    ]
    told = capsys.readouterr().out
    analyse.main(analyse.parsed([what, '--from_json', str(file), '--output_dir', str(tmp_path)]))
    table = capsys.readouterr().out.partition('figure in')[0]
    assert [line.split()[0] for line in table.splitlines()[1:]] == ['vit', 'swin', 'resnet']
    assert f'numbers in {file.with_suffix("")}.json\n{table}' in told
    assert {path.name for path in tmp_path.iterdir()} == FIGURES[what]


@pytest.mark.parametrize(
    'what', [pytest.param(what, marks=pytest.mark.faults if what in ('fourier', 'occlusion') else ()) for what in FLAGS]
)
def test_two_ranks(what, alone, images, tmp_path, monkeypatch):
    """They write the same bytes as one. Fourier and occlusion give rows as attention does."""
    nets, file = alone(what)
    line = (what, images, tmp_path, *nets, '--dist_timeout', '120')
    ranks = {'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
    other = start([sys.executable, analyse.__file__, *line_of(*line)], RANK='1', LOCAL_RANK='1', **ranks)
    for name, value in {**ranks, 'RANK': '0', 'LOCAL_RANK': '0', 'GLOO_SOCKET_IFNAME': 'lo'}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(analyse.STUDIES[what], 'draw', lambda result, path: None)
    run_study(*line)
    _, said = other.communicate(60)
    assert other.returncode == 0, said
    assert (tmp_path / f'{what}.json').read_bytes() == file.read_bytes()


def test_options_behind_a_path(images, files, tmp_path):
    """They are of one network, and of the random one behind it."""
    nets = ['--checkpoint', f'a={files["tuned"]},cls_token=true,mean=0.5 0.5 0.25', 'b=random']
    args = analyse.parsed(line_of('cka', images, tmp_path, *nets, 'c=random,model=mirl_vit_tiny,depth=1'))
    a, b, c = analyse.networks(argparse.Namespace(**vars(args) | analyse.FIXED), 2)
    assert [len(of.core.blocks) for of in (a, b, c)] == [2, 2, 1]
    assert [of.args.global_pool for of in (a, b, c)] == [False, False, True]
    assert list(a.args.mean) == list(b.args.mean) == [0.5, 0.5, 0.25]


def test_several_files(tmp_path, capsys):
    """Networks of one name are told apart; results that do not go together are one line."""
    for place, ratios, count in (('a/x', [0, 0.5], 8), ('b/x', [0, 0.5], 9), ('c/x', [0, 0.9], 8)):
        (tmp_path / place).mkdir(parents=True)
        network = {'name': 'net', 'top1': [50.0, 20.0], 'error': [1.0, 1.0]}
        result = {'what': 'occlusion', 'ratios': ratios, 'images': count, 'checkpoints': [network]}
        (tmp_path / place / 'occlusion.json').write_text(json.dumps(result))
    a, b, c = (tmp_path / place / 'x/occlusion.json' for place in 'abc')
    both = analyse.joined('occlusion', [a, b])
    assert [of['name'] for of in both['checkpoints']] == [f'net ({a.parent})', f'net ({b.parent})']
    assert both['images'] == '8 or 9'
    out = ['--output_dir', str(tmp_path / 'out')]
    for files, words in (([a, c], 'have other columns'), ([a, a], 'twice'), ([a] * 9, 'a figure takes 8')):
        assert words in one_line(capsys, 'occlusion', '--from_json', *map(str, files), *out)


def test_all_are_tested():
    """Here, or in a file of its own."""
    assert {*FLAGS, 'knn'} == {*analyse.STUDIES}


def one_line(capsys, *line: str) -> str:
    with pytest.raises(SystemExit) as end:
        run_main(lambda: analyse.main(analyse.parsed([*line])))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1
    return said


@pytest.mark.parametrize(
    ('what', 'flags', 'words'),
    [
        (
            'interactions',
            ['a={pretrained}'],
            r'interactions needs a classifier: a has no trained head; fine-tune it, or ',
        ),
        ('occlusion', ['{pretrained}'], r'occlusion needs a classifier: pretrain/checkpoint-last has no trained head'),
        ('interactions', ['{tuned}', '--grid', '64'], r'--grid 64: the images of .* have 32 rows'),
        ('attention', ['a=random,model=a2mim_resnet_tiny'], 'a: ResNet has no attention'),
        ('cka', ['{tuned}', '--pairs', '3'], '--pairs is a flag of interactions, not of cka'),
        ('fourier', ['{tuned}', '--amp_dtype', 'bf16'], 'unknown argument --amp_dtype: it belongs to main_finetune'),
        ('fourier', ['x/y={tuned}'], 'a name is without / , : and #'),
        ('fourier', ['{tuned}', '--from_json', 'a.json'], '--from_json draws what was computed, --checkpoint computes'),
        ('occlusion', ['{tuned},cls_token=true'], r'needs all weights of a classifier: .*2 missing.*norm\.weight'),
        ('occlusion', ['{tuned},cls_token=yes'], "cls_token: expected true or false, got 'yes'"),
        (
            'cka',
            ['{tuned}', 'b=random,model=localmim_swin_tiny'],
            ': error: localmim_swin_tiny: window_size 7 does not',
        ),
    ],
)
def test_mistakes(images, files, tmp_path, capsys, what, flags, words):
    """One line, exit code 2."""
    flags = [flag.format(**files) for flag in flags]
    assert re.search(words, one_line(capsys, *line_of(what, images, tmp_path, '--checkpoint', *flags)))


def test_mistakes_in_words(capsys):
    assert 'choose from' in one_line(capsys, 'fourrier', '--checkpoint', 'a.pth')
    said = one_line(capsys, '--checkpoint', 'a.pth', '--seed', '1', 'fourier')
    assert 'fourier comes first: analyse.py fourier --checkpoint ...' in said


@pytest.mark.parametrize('what', [*FLAGS, 'knn'])
def test_files_of_something_else(what, tmp_path, capsys):
    """That are no results, or those of another study, are not drawn."""
    for of_file in ({'what': what, 'checkpoints': [{'name': 'a'}]}, {'what': what, 'checkpoints': []}):
        (tmp_path / 'a.json').write_text(json.dumps(of_file))
        said = one_line(capsys, what, '--from_json', str(tmp_path / 'a.json'), '--output_dir', str(tmp_path / 'out'))
        assert 'a.json: not a file that this program wrote' in said
    (tmp_path / 'a.json').write_text(json.dumps({'what': 'detection', 'checkpoints': []}))
    said = one_line(capsys, what, '--from_json', str(tmp_path / 'a.json'), '--output_dir', str(tmp_path / 'out'))
    assert f'a.json has results of detection, not of {what}' in said


def test_an_image_that_cannot_be_read(images, files, tmp_path, capsys, monkeypatch):
    """A study ends in one line, or skips it with --bad_images skip."""
    shutil.copytree(images / 'val', tmp_path / 'data/val')
    (tmp_path / 'data/val/class0/0.png').write_bytes(b'none')
    for what in ('occlusion', 'interactions'):
        monkeypatch.setattr(analyse.STUDIES[what], 'draw', lambda result, path: None)
        line = line_of(what, tmp_path / 'data', tmp_path / 'out', '--checkpoint', f'a={files["tuned"]}')
        assert re.search(r'cannot read the image \S+class0/0\.png: .*--bad_images skip', one_line(capsys, *line))
        analyse.main(analyse.parsed([*line, '--bad_images', 'skip', '--max_bad_images', '0.5']))
        assert 'bad images skipped: 1' in capsys.readouterr().out
        [network] = json.loads((tmp_path / 'out' / f'{what}.json').read_text())['checkpoints']
        assert network['images'] == (2 if what == 'interactions' else 14)
