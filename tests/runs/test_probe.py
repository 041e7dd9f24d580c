"""The linear probe: MAE's numbers, an encoder that stays as it is, and what a user may ask of it."""

import re

import fill
import pytest
import torch
from golden import golden
from recipes import OWN, resolve
from torch import nn
from training import SHORT, arguments, same, train

import main_finetune
from util import optim
from util.data import datasets
from util.errors import UserError
from util.nn.linear_probe import ProbeHead, make_probe
from util.recipes import RECIPES

GOLDEN = golden('analysis/linear_probe.json')
PROBE = [*SHORT, '--batch_size', '16', '--probe', 'linear', '--lr', '1']
FAMILIES = {  # the networks that are probed, each with BatchNorm, drop path or buffers of its own
    'mirl_vit_tiny': 32,
    'localmim_swin_pico': 64,
    'mixmae_tiny': 32,
    'a2mim_vit_tiny': 32,
    'a2mim_resnet_tiny': 32,
    'a2mim_convnext_pico': 64,
    'simmim_swin_pico': 32,
}


def filled(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(fill.weight(name, shape)).double()


def largest_difference(ours: torch.Tensor, theirs: list) -> float:
    return (ours.detach() - torch.tensor(theirs, dtype=torch.float64)).abs().max().item()


def parse(*flags: str):
    return main_finetune.get_args_parser().parse(list(flags), stage='finetune')


# --------------------------------------------------------------------------
# MAE's numbers


@pytest.mark.parametrize('case', GOLDEN['lars'], ids=lambda case: case['tag'])
def test_lars_steps(case, measured):
    """The case that starts from zero weights has a decay there, too small to be seen: MAE's probe has none."""
    tag, shapes = case['tag'], case['shapes']
    names = [f'lars/{tag}/0.weight', f'lars/{tag}/1.bias']
    params = [
        nn.Parameter(filled(name, shape) * (tag == 'a' or len(shape) == 1))
        for name, shape in zip(names, shapes, strict=True)
    ]
    optimizer, differences = optim.lars([{'params': params}], case['lr']), []
    for step, norms in enumerate(case['norms_after_each_step']):
        for i, param in enumerate(params):
            param.grad = filled(f'lars/{tag}/grad{i}/{step}', param.shape)
        optimizer.step()
        differences.append(largest_difference(torch.stack([param.norm() for param in params]), norms))
    for param, last in zip(params, case['last'], strict=True):
        differences.append(largest_difference(param.flatten()[: len(last)], last))
    measured(f'LARS against MAE, {tag}: largest difference {max(differences):.1e}')
    assert max(differences) < (1e-9 if tag == 'a' else 1e-6)


def test_schedule(measured):
    for case in GOLDEN['learning_rate']:
        at = optim.schedule(parse('--probe', 'linear', '--epochs', str(case['epochs'])), case['lr'])
        ours = torch.tensor([at(epoch) for epoch in case['at']], dtype=torch.float64)
        assert largest_difference(ours, case['values']) < 1e-10


def test_steps_of_the_head(measured):
    """Loss, weights and running statistics over four steps of the guarded optimiser, and logits of other features."""
    case = GOLDEN['head']
    head = ProbeHead(case['width'], case['classes']).double()
    head[1].load_state_dict({key: filled(f'probe/s/head.{key}', p.shape) for key, p in head[1].named_parameters()})
    groups = optim.param_groups(head, {name: (0, 1.0, True) for name, _ in head.named_parameters()}, 0.0)
    optimizer = optim.OPTIMIZERS['lars'](groups, case['lr'], (0.9, 0.999))
    guard = optim.GuardedOptimizer(head, optimizer, torch.device('cpu'), False, None)
    differences = []
    for step, expected in enumerate(case['steps']):
        x = 10 * filled(f'probe/s/x{step}', (case['batch'], case['width'])) + 1
        y = torch.from_numpy((5 * fill.uniform(f'probe/s/y{step}', (case['batch'],))).astype('int64'))
        loss = nn.functional.cross_entropy(head(x), y)
        guard.backward(loss)
        guard.step()
        ours = torch.stack([loss, head[1].weight.norm(), head[1].bias.norm()])
        differences.append(largest_difference(ours, [expected[key] for key in ('loss', 'weight_l2', 'bias_l2')]))
    running = torch.stack([head[0].running_mean.norm(), head[0].running_var.norm()])
    differences.append(largest_difference(running, [case['running_mean_l2'], case['running_var_l2']]))
    logits = head.eval()(10 * filled('probe/s/x4', (4, case['width'])) + 1)
    differences.append(largest_difference(logits[: len(case['eval_logits'])], case['eval_logits']))
    measured(f"the probe's head against MAE's: largest difference {max(differences):.1e}")
    assert max(differences) < 1e-6


def test_crops():
    crops = GOLDEN['crops']
    for width, height, seed, *expected in crops['rows']:
        torch.manual_seed(seed)
        assert list(datasets.mae_crop(width, height, crops['scale'], crops['ratio'])) == expected
    assert datasets.mae_crop(1, 1, crops['scale'], crops['ratio']) == (0, 0, 1, 1)


# --------------------------------------------------------------------------
# the encoder


def head_of(network: nn.Module) -> tuple[str, ProbeHead]:
    return next((name, module) for name, module in network.named_modules() if isinstance(module, ProbeHead))


@pytest.mark.parametrize('name', FAMILIES)
def test_the_encoder_stays_as_it_is(name, images, tmp_path, monkeypatch):
    """Every byte of it, buffers included; in every step it is in eval mode, and has no graph. The head learns."""
    networks, seen = [], set()

    def watch(head: ProbeHead, inputs: tuple) -> None:
        training = {module for module in networks[0].modules() if module.training}
        seen.add(('training' if training == {*head.modules()} else len(training), inputs[0].requires_grad))

    def watched(network: nn.Module) -> nn.Module:
        networks.append(make_probe(network))
        head_of(network)[1].register_forward_pre_hook(watch)
        return network

    flags = [*PROBE, '--epochs', '1', '--batch_size', '32', '--model', name, '--input_size', FAMILIES[name]]
    with monkeypatch.context() as patch:
        patch.setattr(main_finetune, 'make_probe', watched)
        saved = train('finetune', images, tmp_path, *flags, '--warmup_epochs', '0')
    assert seen == {('training', False), (0, False)}  # in training, in evaluation
    fresh = main_finetune.create_classifier(parse(*arguments(images, tmp_path, *flags)), 3)
    state, (head, _) = fresh.state_dict(), head_of(fresh)
    moved = {key for key in state if not same(saved['model'][key], state[key])}
    learned = {f'{head}.1.weight', f'{head}.1.bias'}
    assert moved == learned | {f'{head}.0.{name}' for name in ('running_mean', 'running_var', 'num_batches_tracked')}
    assert {key for group in saved['optimizer']['param_groups'] for key in group['names']} == learned
    assert {key for key, param in fresh.named_parameters() if param.requires_grad} == learned
    assert not [key for key, param in networks[0].named_parameters() if param.grad is not None]


# --------------------------------------------------------------------------
# what a user asks for


def test_the_whole_way(images, tmp_path, capsys):
    """Pretrained, probed, evaluated, and fine-tuned from there; a classifier is no probe."""

    def lines(*flags) -> str:
        main_finetune.main(parse(*arguments(images, tmp_path / 'out', '--batch_size', '16', *flags)))
        return capsys.readouterr().out

    one = ['--batch_size', '32', '--epochs', '1', '--warmup_epochs', '0']
    train('pretrain', images, tmp_path / 'pretrained', *one)
    probed = [*PROBE, *one, '--cls_token', '--use_ema', '--finetune', tmp_path / 'pretrained' / 'checkpoint-last.pth']
    saved = train('finetune', images, tmp_path / 'probed', *probed)
    assert (saved['args']['probe'], saved['args']['opt'], saved['run']['probe']) == ('linear', 'lars', 'linear')
    text, last = capsys.readouterr().out, tmp_path / 'probed' / 'checkpoint-last.pth'
    assert 'mirl_vit_tiny: 291 trainable parameters' in text  # 3 x 96 and 3
    assert 'missing, stay as initialised (head.0.running_mean' in text
    told = lines('--eval', '--resume', last)
    assert f'taken from {last}: --no_global_pool --probe linear' in told
    assert re.findall(r'^\* Acc@1 .*$', told, re.M)[-1] in text
    assert ', head.0.running_mean [96], ' in lines(*one, '--finetune', last)  # among those that are ignored
    with pytest.raises(UserError, match=r'cannot be evaluated as .* missing, stay as initialised'):
        lines('--eval', '--probe', 'linear', '--resume', tmp_path / 'out' / 'checkpoint-last.pth')


def test_defaults():
    """The protocol's; those that make sense otherwise give way to recipe and flags."""
    args = parse('--probe', 'linear')
    protocol = {'epochs': 90, 'blr': 0.1, 'warmup_epochs': 10, 'min_lr': 0, 'weight_decay': 0, 'opt': 'lars'}
    assert vars(args).items() >= {**protocol, 'smoothing': 0, 'aa': 'none', 'mixup': 0, 'drop_path': 0}.items()
    assert parse('--probe=linear', '--epochs', '50', '--blr', '0.2').warmup_epochs == 10
    assert parse('--probe', 'linear', '--opt', 'adamw', '--smoothing', '0.1').opt == 'adamw'
    assert vars(parse()).items() >= {'epochs': 50, 'blr': 1e-3, 'opt': 'adamw', 'aa': 'rand-m9-mstd0.5-inc1'}.items()


@pytest.mark.parametrize(
    ('flags', 'line'),
    [
        (['--mixup', '0.8', '--drop_path', '0.1'], 'it does not take --drop_path 0.1 --mixup 0.8$'),
        (['--grad_checkpoint'], 'it does not take --grad_checkpoint$'),
        (
            ['--config', 'mirl_vit_base_finetune'],
            'is for fine-tuning: .*mirl_vit_tiny_cifar10_linprobe.yaml$',
        ),
        (['--weight_decay', '0.1'], '--opt lars has no weight decay: give --weight_decay 0, got 0.1'),
        (['--batch_size', '1'], 'cannot take 1 image of 32 pixels: Expected more than 1 value per channel'),
    ],
)
def test_mistakes(flags, line, images, tmp_path):
    with pytest.raises(UserError, match=line):
        train('finetune', images, tmp_path, *PROBE, *flags)


def test_a_convolution_is_no_linear_layer():
    network = nn.Module()
    network.head = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match='its last layer, head, is Conv2d, not linear'):
        make_probe(network)


# --------------------------------------------------------------------------
# recipes


def text_of(name: str) -> str:
    return re.sub(r'\n# +', ' ', (RECIPES / f'{name}.yaml').read_text())


@pytest.mark.parametrize('name', sorted(path.stem for path in RECIPES.glob('*_linprobe.yaml')))
def test_recipes(name):
    """MAE's values; and a cost of that many forwards, each a third of a step of the same network's fine-tuning."""
    args, protocol, own = resolve(name), vars(parse('--probe', 'linear')), OWN in name
    main_finetune.check_probe(args)
    kept = ['probe', 'epochs', 'warmup_epochs', 'min_lr', 'opt', 'weight_decay', 'smoothing', 'hflip', 'aa', 'mixup']
    kept += [] if own else ['crop_scale', 'crop_pct']
    assert {key: getattr(args, key) for key in kept} == {key: protocol[key] for key in kept}
    lr, _ = optim.scaled_lr(args, optim.accumulation(args))
    step = args.batch_size * optim.accumulation(args)
    assert (args.batch_size, step, lr) == (512, 512 if own else 16384, pytest.approx(6.4))

    [gflop] = map(float, re.findall(r'products: ([\d.]+) GFLOP an image, forward alone', text_of(name)))
    images = (50_000 if own else 1_281_167) // step * step * args.epochs
    totals = [float(total) for total in re.findall(r'(\d\.\de\d+) FLOP', text_of(name))]
    assert totals == [pytest.approx(gflop * 1e9 * images, rel=0.05)] * 2
    for other in RECIPES.glob(f'{name.removesuffix("_linprobe")}*_finetune*.yaml'):
        [trained] = map(float, re.findall(r'products: ([\d.]+) GFLOP', text_of(other.stem)))
        if resolve(other.stem).input_size == args.input_size and resolve(other.stem).model == args.model:
            # the first layer's backward is half of others', which a tiny ResNet's large one shows
            assert gflop == pytest.approx(trained / 3, rel=0.1 if own else 0.04), other
