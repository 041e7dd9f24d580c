"""Networks of every family and origin: handed on to timm, opened there, and back; and what is told of them."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import fill
import pytest
import timm
import torch
from golden import filled_state, golden
from training import MAINS, same, train

import main_finetune
import main_pretrain
from scripts import analyse, export, inspect_checkpoint, visualize
from util import checkpoint, config
from util.errors import StorageError, UserError
from util.nn.linear_probe import make_probe
from util.weights import load_published, read_source

FIXTURE = Path(__file__).parent / 'fixtures' / 'toy_paddle331_numpy2.pdparams'
PADDLE = dict(patch_size=4, embed_dim=16, depth=6, num_heads=2, mlp_ratio=2)
FAMILIES = {  # model: image side, options of an encoder, options of pretraining
    'mirl_vit_tiny': (32, {}, dict(num_segments=4)),
    'localmim_vit_tiny': (32, {}, {}),
    'localmim_swin_pico': (64, {}, {}),
    'a2mim_vit_tiny': (32, {}, dict(fft_weight=0.2)),
    'a2mim_resnet_tiny': (32, {}, {}),
    'a2mim_convnext_pico': (64, {}, {}),
    'simmim_swin_pico': (64, {}, {}),
    'a2mim_timm': (64, dict(name='resnet10t'), {}),
    'mixmae_tiny': (32, dict(mlp_ratio=2), {}),
}


def drawn(network: torch.nn.Module) -> torch.nn.Module:
    """With weights that are no initial ones, the norms' too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point() and 'pos_embed' not in name:
                value += 0.05 * torch.randn(value.shape)
                value.abs_() if name.endswith('running_var') else None
    return network.eval()


def own_file(path: Path, name: str, stage: str) -> Path:
    """A checkpoint as a run of this stage writes it, without its optimiser."""
    size, of_encoder, of_pretraining = FAMILIES[name]
    options = of_encoder | (of_pretraining if stage == 'pretrain' else {})
    method, main = main_pretrain.find_method(name), MAINS[stage]
    if stage == 'pretrain':
        network = drawn(getattr(method, name)(img_size=size, **options))
        more = {'encoder': network.encoder_state_dict()}
    else:
        network = drawn(method.create_classifier(name, num_classes=3, img_size=size, **options))
        more = {'classes': ['ant', 'bee', 'cat']}
    args = vars(main.get_args_parser().parse(['--model', name, '--device', 'cpu', '--mean', '0.1', '0.2', '0.3']))
    args |= dict(input_size=size, model_kwargs=options, data_path='my data', given=['model'])
    state = {'model': network.state_dict(), 'args': config.plain(main_finetune.argparse.Namespace(**args))}
    checkpoint.save(path, state | more | {'run': {'stage': stage}, 'epoch': 1, 'step': 2, 'steps': 4})
    return path


def run(script, *argv) -> None:
    script.main(script.get_args_parser().parse([str(word) for word in argv]))


def exported(path: Path, out: Path, *more: str) -> Path:
    run(export, path, out, '--device', 'cpu', *more)
    return out


def encoder(name: str, source, **options) -> torch.nn.Module:
    """Our network that fine-tuning starts from, filled by `load_published`."""
    size, of_encoder, _ = FAMILIES.get(name, (options.pop('img_size', 224), {}, {}))
    torch.manual_seed(0)
    make = main_pretrain.find_method(name).create_classifier
    network = make(name, num_classes=3, img_size=size, **of_encoder, **options).eval()
    load_published(network, source)
    return network


@torch.no_grad()
def difference(ours: torch.nn.Module, theirs: torch.nn.Module, size: int, answers: bool) -> float:
    """Of features, and of answers or of what a head is given, relative to the largest."""
    imgs = torch.from_numpy(fill.images(2, size))
    tokens, other = ours.forward_features(imgs), theirs.eval().forward_features(imgs)
    pairs = [(tokens, other)]
    if hasattr(ours, 'timm_state_dict'):
        pairs = [(ours.norm(tokens), other.flatten(1, 2))]
    elif answers:
        pairs += [(ours(imgs), theirs(imgs))]
    else:
        pairs += [(ours.forward_head(tokens, pre_logits=True), theirs(imgs))]
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


def own_eps(network: torch.nn.Module) -> torch.nn.Module:
    """LocalMIM's Swin in timm with the two epsilons that it has here."""
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5 if name.endswith('norm2') else 1e-6
    return network


@pytest.mark.parametrize('name', FAMILIES)
def test_pretraining(name, tmp_path, measured):
    """An encoder goes to timm with the features that fine-tuning starts from, and comes back as it was."""
    size, options, _ = FAMILIES[name]
    path = own_file(tmp_path / 'a.pth', name, 'pretrain')
    out = exported(path, tmp_path / 'out')
    ours = encoder(name, path)
    if name != 'mixmae_tiny':
        network = timm.create_model(f'local-dir:{out}', pretrained=True)
        assert network.num_classes == 0
        assert network.pretrained_cfg['mean'] == [0.1, 0.2, 0.3]
        found = difference(ours, network, size, answers=False)
        measured(f'{name}, own pretraining: {found:.1e} from timm')
        if name == 'localmim_swin_pico':
            assert 1e-6 < found < 1e-4  # as the README in the folder says
            found = difference(ours, own_eps(network), size, answers=False)
        assert found <= 1e-6
    else:
        assert torch.load(out / 'model.pth', weights_only=True).keys() < ours.state_dict().keys()
    assert same(dict(encoder(name, out).state_dict()), dict(ours.state_dict()))
    weights = next(file for file in out.iterdir() if file.suffix in ('.safetensors', '.pth'))
    assert same(dict(encoder(name, weights).state_dict()), dict(ours.state_dict()))
    text = (out / 'README.md').read_text()
    assert checkpoint.digests.sum_of(path) in text
    assert '1 epochs and 2 steps' in text
    assert read_source(out)['args']['model_kwargs'] == options


@pytest.mark.parametrize('name', ['mirl_vit_tiny', 'a2mim_resnet_tiny', 'localmim_swin_pico', 'mixmae_tiny'])
def test_fine_tuned(name, tmp_path, measured):
    """A classifier goes with its answers and the names of its classes, or says why not."""
    path = own_file(tmp_path / 'a.pth', name, 'finetune')
    ours = encoder(name, path)
    if name in ('localmim_swin_pico', 'mixmae_tiny'):
        with pytest.raises(UserError, match='--format torch'):
            exported(path, tmp_path / 'out', '--format', 'timm')
    out = exported(path, tmp_path / 'out')
    if name in ('mirl_vit_tiny', 'a2mim_resnet_tiny'):
        network = timm.create_model(f'local-dir:{out}', pretrained=True)
        assert network.pretrained_cfg['label_names'] == ['ant', 'bee', 'cat']
        found = difference(ours, network, FAMILIES[name][0], answers=True)
        measured(f'{name}, fine-tuned: {found:.1e} from timm')
        assert found <= 1e-6
        assert timm.create_model(f'local-dir:{out}', pretrained=True, num_classes=7).num_classes == 7
    assert same(dict(encoder(name, out).state_dict()), dict(ours.state_dict()))
    assert read_source(out)['classes'] == ['ant', 'bee', 'cat']
    if name == 'localmim_swin_pico':
        exported(path, out, '--no_head')  # in the place of the other
        assert difference(ours, own_eps(timm.create_model(f'local-dir:{out}', pretrained=True)), 64, False) <= 1e-6


def published(name: str) -> dict:
    """A pretraining checkpoint in a paper's own names, from what its code left in tests/parity."""
    data = golden(name)
    if name.startswith('mixmae'):
        rows = [(key, shape) for key, shape, *_ in data['param_names_shapes_requires_grad'] + data['buffers']]
        return filled_state([row for row in rows if row[0] not in data['not_filled']])
    if name.startswith('a2mim'):
        rows = [(key, shape) for key, shape, *_ in data['params'] + data['buffers'] if 'index' not in key]
        return {'state_dict': filled_state([row for row in rows if 'num_batches' not in row[0]])}
    return {'model': filled_state(data['state_dict'], data['not_filled'])}


TINY_SWIN = dict(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4))
PUBLISHED = {  # file or golden: model, image side, options
    'paddle': ('mirl_vit_small', 8, PADDLE),
    'localmim/tiny_vit_hog.json': ('localmim_vit_small', 64, dict(embed_dim=64, depth=8, num_heads=4)),
    'localmim/tiny_swin_pixel.json': ('localmim_swin_tiny', 224, TINY_SWIN),
    'a2mim/tiny_vit.json': ('a2mim_vit_small', 96, dict(embed_dim=64, depth=3, num_heads=4, mlp_ratio=2.5)),
    'a2mim/tiny_convnext.json': ('a2mim_convnext_tiny', 96, dict(depths=(1, 1, 2, 1), dims=(16, 32, 64, 128))),
}


@pytest.mark.parametrize('origin', PUBLISHED)
def test_published(origin, tmp_path, measured):
    name, size, options = PUBLISHED[origin]
    path = FIXTURE
    if origin != 'paddle':
        path = tmp_path / 'a.pth'
        torch.save(published(origin), path)
    words = config.as_words({'model': name, 'model_kwargs': options, 'input_size': size})
    out = exported(path, tmp_path / 'out', *words)
    ours = encoder(name, path, img_size=size, **options)
    network = timm.create_model(f'local-dir:{out}', pretrained=True)
    found = difference(ours, own_eps(network) if 'swin' in origin else network, size, answers=False)
    measured(f'{origin}, published names: {found:.1e} from timm')
    assert found <= 1e-6
    assert same(dict(encoder(name, out, img_size=size, **options).state_dict()), dict(ours.state_dict()))


def test_alone_in_a_new_process(tmp_path):
    """timm opens an export where nothing of this project is to be found."""
    path = own_file(tmp_path / 'a.pth', 'mirl_vit_tiny', 'finetune')
    out = exported(path, tmp_path / 'out')
    ours = encoder('mirl_vit_tiny', path)
    torch.save(torch.from_numpy(fill.images(2, 32)), tmp_path / 'images.pt')
    code = (
        'import sys, timm, torch; network = timm.create_model("local-dir:out", pretrained=True).eval(); '
        'assert "util" not in sys.modules; transform = timm.data.resolve_model_data_config(network); '
        'answers = network(torch.load("images.pt")).tolist(); '
        'print(answers, tuple(transform["input_size"]), network.pretrained_cfg["label_names"])'
    )
    line = [sys.executable, '-I', '-W', 'ignore', '-c', code]
    told = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    with torch.no_grad():
        answers = ours(torch.load(tmp_path / 'images.pt')).tolist()
    assert told.stdout.strip() == f"{answers} (3, 32, 32) ['ant', 'bee', 'cat']", told.stderr
    assert (out / 'model.safetensors.sha256').is_file()


def test_linear_probe_and_average(tmp_path, measured, capsys):
    """A probe's BatchNorm goes into its linear layer; --use_ema takes the average."""
    path = own_file(tmp_path / 'a.pth', 'mirl_vit_tiny', 'finetune')
    state = torch.load(path, weights_only=True)
    probe = make_probe(encoder('mirl_vit_tiny', path))
    drawn(probe)
    average = {name: value + 1 for name, value in probe.state_dict().items()}
    checkpoint.save(
        path, state | {'model': probe.state_dict(), 'ema': average, 'args': state['args'] | {'probe': 'linear'}}
    )
    assert inspected(path, capsys)['origin'].startswith('linear probe of this program: main_finetune.py')
    for flags, weights in (([], probe.state_dict()), (['--use_ema'], average)):
        out = exported(path, tmp_path / 'out', *flags)
        probe.load_state_dict(weights)
        found = difference(probe.eval(), timm.create_model(f'local-dir:{out}', pretrained=True), 32, answers=True)
        measured(f'a linear probe, its BatchNorm folded: {found:.1e} from timm')
        assert found < 5e-6


def test_pretraining_model_as_torch_weights(tmp_path):
    """--with_decoder: from Paddle's file to PyTorch's, and back into the same model."""
    segments = dict(num_segments=6, decoder_dim=8, decoder_depth=1, decoder_num_heads=2)
    options = PADDLE | segments | dict(out_indices=(0, 1, 2, 3, 4))
    words = config.as_words({'model': 'mirl_vit_small', 'model_kwargs': options, 'input_size': 8})
    out = exported(FIXTURE, tmp_path / 'out', '--with_decoder', *words)
    models = [main_pretrain.find_method('mirl_vit_small').mirl_vit_small(img_size=8, **options) for _ in range(2)]
    for model, source in zip(models, (FIXTURE, out), strict=True):
        assert not load_published(model, source).missing
    assert same(*(dict(model.state_dict()) for model in models))


def test_training_starts_from_an_export(images, tmp_path):
    """And so does an evaluation, which needs nothing but the folder."""
    out = exported(own_file(tmp_path / 'a.pth', 'mirl_vit_tiny', 'pretrain'), tmp_path / 'out')
    train(
        'finetune',
        images,
        tmp_path / 'run',
        '--finetune',
        out,
        '--epochs',
        '1',
        '--warmup_epochs',
        '0',
        '--batch_size',
        '32',
    )
    tuned = exported(tmp_path / 'run' / 'checkpoint-last.pth', tmp_path / 'tuned')
    accuracy = []
    for source in (tmp_path / 'run' / 'checkpoint-last.pth', tuned):
        args = main_finetune.get_args_parser().parse(['--eval', '--resume', str(source), '--data_path', str(images)])
        _, core, _, told = main_finetune.evaluated_network(args)
        accuracy.append(dict(core.state_dict()))
        assert 'missing' not in ' '.join(told)
    assert same(*accuracy)


def test_mistakes(tmp_path, monkeypatch):
    path, tuned = (own_file(tmp_path / f'{stage}.pth', 'mirl_vit_tiny', stage) for stage in ('pretrain', 'finetune'))
    (tmp_path / 'file').touch()
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'thesis.tex').touch()
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'config.json').write_text('{}')
    weights = tmp_path / 'a.pth'
    torch.save(encoder('mirl_vit_tiny', path).state_dict(), weights)

    def refused(words: str, *argv) -> None:
        with pytest.raises(UserError, match=words):
            run(export, *argv, '--device', 'cpu')

    out = tmp_path / 'out'
    refused('does not exist', tmp_path / 'none.pth', out)
    refused('full is a folder, not a checkpoint', tmp_path / 'full', out)
    refused('file: an export is a folder', path, tmp_path / 'file')
    refused(r'holds files that no export wrote \(thesis.tex\)', path, tmp_path / 'full')
    refused(r'holds files that no export wrote \(config.json\)', path, tmp_path / 'mine')
    refused('file is a file, not a folder', path, tmp_path / 'file' / 'out')
    refused('names no model: give --model NAME', weights, out)
    refused('unknown --model mirl_vit_tinny; did you mean mirl_vit_tiny', weights, out, '--model', 'mirl_vit_tinny')
    refused('has no classifier: ', path, out, '--head')
    refused('has no classifier of 5 classes', path, out, '--nb_classes', '5')
    refused('has no classifier of 3 classes of the class token', tuned, out, '--cls_token')
    refused('is without decoders', tuned, out, '--with_decoder')
    assert not out.exists()
    assert not list(tmp_path.glob('.*'))

    out = tmp_path / 'new' / 'out'
    exported(path, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full_disk(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('util.digests.os.fsync', full_disk)
    with pytest.raises(StorageError, match=r'cannot write .*out: No space left on device'):
        run(export, tuned, out, '--device', 'cpu')
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}
    assert not list(out.parent.glob('.*'))

    monkeypatch.undo()
    rename = Path.rename
    monkeypatch.setattr(Path, 'rename', lambda file, to: full_disk() if file.suffix == '.tmp' else rename(file, to))
    with pytest.raises(StorageError, match='cannot write'):
        run(export, tuned, out, '--device', 'cpu')
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}, 'the earlier export is lost'


# --------------------------------------------------------------------------
# scripts/inspect_checkpoint.py


def inspected(path, capsys) -> dict:
    """What it tells; every command is one that its program takes."""
    run(inspect_checkpoint, path, '--json')
    told = json.loads(capsys.readouterr().out)
    programs = {'main_finetune.py': main_finetune, 'main_pretrain.py': main_pretrain, 'scripts/export.py': export}
    programs |= {'scripts/analyse.py': analyse, 'scripts/visualize.py': visualize}
    for command in told['commands'].values():
        python, program, *argv = shlex.split(command)
        assert python == 'python'
        programs[program].get_args_parser().parse(argv)
        assert str(path) in argv
    return told


def test_inspect_own(images, tmp_path, capsys):
    train('pretrain', images, tmp_path / 'a run', '--epochs', '1', '--warmup_epochs', '0', '--batch_size', '32')
    path = tmp_path / 'a run' / 'checkpoint-last.pth'
    state = torch.load(path, weights_only=True)
    capsys.readouterr()
    told = inspected(path, capsys)
    assert 'as in checkpoint-last.pth.sha256' in told['file']
    assert 'main_pretrain.py --model mirl_vit_tiny' in told['origin']
    assert told['network'] == ['mirl_vit_tiny, 0.5 M parameters, 32 pixels']
    assert 'draw what it reconstructs' in told['commands']
    assert 'go on with the run' not in told['commands']  # it is done
    checkpoint.save(path, state | {'step': 1})
    line = inspected(path, capsys)['commands']['go on with the run']
    args = main_pretrain.get_args_parser().parse(shlex.split(line)[2:])
    assert (args.epochs, args.batch_size, args.output_dir) == (1, 32, path.parent)

    out = exported(path, tmp_path / 'out')
    capsys.readouterr()
    told = inspected(out, capsys)
    assert 'as in model.safetensors.sha256' in told['file']
    told = inspected(own_file(tmp_path / 'b.pth', 'a2mim_resnet_tiny', 'finetune'), capsys)
    assert told['classes'] == '3: ant, bee, cat'
    assert next(iter(told['commands'])) == 'evaluate it'
    assert "--data_path 'my data'" in told['commands']['fine-tune it']


def test_inspect_files_of_others(tmp_path, capsys, monkeypatch):
    """All models that take one are named. Only the small ones are tried here."""
    monkeypatch.setattr(main_pretrain, 'METHODS', tuple(map(Small, main_pretrain.METHODS)))
    torch.save(published('localmim/tiny_vit_hog.json'), tmp_path / 'localmim.pth')
    models = {
        FIXTURE: 'published MIRL pretraining (Paddle)',
        tmp_path / 'localmim.pth': 'published LocalMIM pretraining',
    }
    for path, name in models.items():
        told = inspected(path, capsys)
        assert told['format'].startswith(name)
        assert 'num_heads is a guess' in told['network'][1]
    network = encoder('mixmae_tiny', own_file(tmp_path / 'b.pth', 'mixmae_tiny', 'pretrain'))
    torch.save({'state_dict_ema': network.state_dict()}, tmp_path / 'average.pth')
    with pytest.raises(UserError, match=r'average\.pth is for no model of this program: .*differing keys \(\d+\)'):
        run(inspect_checkpoint, tmp_path / 'average.pth')
    torch.save({'weights': {'a.weight': torch.zeros(2, 3)}, 'note': 'x'}, tmp_path / 'alien.pth')
    capsys.readouterr()
    with pytest.raises(UserError, match=r'alien\.pth is for no model of this program: '):
        run(inspect_checkpoint, tmp_path / 'alien.pth')
    assert 'a.weight [2, 3]' in capsys.readouterr().out
    with pytest.raises(UserError, match='is not a checkpoint'):
        run(inspect_checkpoint, __file__)


class Small:
    """A method with few of its models."""

    def __init__(self, method):
        self.method = method
        self.__all__ = [
            name for name in method.__all__ if name.endswith(('mirl_vit_tiny', 'localmim_vit_tiny', 'mixmae_tiny'))
        ]

    def __getattr__(self, name):
        return getattr(self.method, name)
