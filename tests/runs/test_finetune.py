"""Fine-tuning and evaluation: exact over ranks, the same in a new process, and what a run leaves behind."""

import json
import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.models.vision_transformer import VisionTransformer
from training import arguments, load, run, train

import main_finetune
from engine_finetune import evaluate
from models_mirl import MIRL
from util import rng
from util.data import augment, datasets


def closing_line(text: str) -> str:
    return re.findall(r'^\* Acc@1 .*$', text, re.MULTILINE)[-1]


def test_the_whole_way(images, tmp_path, capsys):
    """Pretrain, fine-tune with everything on, evaluate what was saved: the same figures over one or two ranks."""
    pretrained = tmp_path / 'pretrain'
    flags = ['--batch_size', '16', '--epochs', '2', '--warmup_epochs', '1', '--lr', '1e-3']
    train('pretrain', images, pretrained, *flags, '--vis_freq', '1')
    tuned = tmp_path / 'finetune'
    more = ['--finetune', pretrained / 'checkpoint-last.pth', '--mixup', '0.8', '--cutmix', '1', '--use_ema']
    checkpoint = train('finetune', images, tuned, *flags, *more)
    line = closing_line(capsys.readouterr().out)

    for ranks in (0, 2):
        evaluation = ['--eval', '--resume', tuned / 'checkpoint-last.pth', '--predictions', tmp_path / f'{ranks}.csv']
        evaluation += ['--batch_size', '4', '--num_workers', ranks]
        done = run('finetune', images, tmp_path / 'eval', *evaluation, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert closing_line(done.stdout) == line
        assert 'Accuracy of the network on the 15 test images: ' in done.stdout

    for name in ('.csv', '.classes.csv'):
        assert (tmp_path / f'0{name}').read_bytes() == (tmp_path / f'2{name}').read_bytes()

    # the best weights, and the averaged ones
    best = load(tuned, 'checkpoint-best.pth')
    assert best['best_acc1'] == checkpoint['record']['best_acc1']
    argv = arguments(images, tmp_path / 'eval', '--eval', '--resume', tuned / 'checkpoint-best.pth')
    main_finetune.main(main_finetune.get_args_parser().parse(argv))
    assert f'* Acc@1 {best["best_acc1"]:.3f}' in capsys.readouterr().out

    # what is left to read
    lines = [json.loads(text) for text in (tuned / 'log.txt').read_text().splitlines()]
    assert [entry['epoch'] for entry in lines] == [0, 1]
    assert all(entry['time'] > 0 and entry['images_per_s'] > 0 for entry in lines)
    keys = {'train_loss', 'train_lr', 'test_acc1', 'test_acc5', 'test_loss', 'test_ema_acc1', 'n_parameters'}
    assert keys <= lines[0].keys()
    events = EventAccumulator(str(pretrained), size_guidance={'images': 0})
    events.Reload()
    assert {'loss', 'lr', 'train/grad_norm', 'train/images_per_s'} <= {*events.Tags()['scalars']}
    assert [event.step for event in events.Scalars('loss')] == [250, 500, 750, 1000, 1250, 1500, 1750, 2000]
    alone = [tag for tag in events.Tags()['scalars'] if '/' not in tag]  # the cards of the first page
    assert {'explained0', 'loss'} <= {*alone} <= {'explained0', 'explained1', 'loss', 'lr'}
    [table] = events.Tensors('arguments/text_summary')
    assert '| batch_size | 16 |' in table.tensor_proto.string_val[0].decode()
    assert len(events.Images('reconstruction')) == 2
    assert (pretrained / 'pictures-1.png').is_file()
    assert json.loads((tuned / 'args.json').read_text())['mixup'] == 0.8


def test_fine_tuning_starts_from_the_encoder(images, tmp_path):
    flags = ['--batch_size', '16', '--epochs', '1', '--warmup_epochs', '0']
    pretrained = train('pretrain', images, tmp_path / 'pretrain', *flags)
    source = ['--finetune', tmp_path / 'pretrain' / 'checkpoint-last.pth']
    tuned = train('finetune', images, tmp_path / 'finetune', *flags, *source, '--lr', '1e-30', '--min_lr', '0')
    kept = {k: v for k, v in pretrained['encoder'].items() if not k.startswith('norm.')}
    assert all(torch.allclose(tuned['model'][k], v, rtol=0, atol=1e-20) for k, v in kept.items())
    # the encoder shares the model's storage in the file
    names = [name for name in pretrained['encoder'] if name.startswith('blocks.')]
    assert all(pretrained['encoder'][n].data_ptr() == pretrained['model'][n].data_ptr() for n in names)


def test_evaluations_now_and_then(images, tmp_path):
    """--test_freq leaves evaluations out, not the last one; training, of a share of the labels, is the same."""
    flags = ['--batch_size', '16', '--epochs', '3', '--warmup_epochs', '1', '--lr', '1e-3', '--label_share', '0.5']
    often = train('finetune', images, tmp_path / 'often', *flags)
    seldom = train('finetune', images, tmp_path / 'seldom', *flags, '--test_freq', '2')
    assert all(torch.equal(a, b) for a, b in zip(often['model'].values(), seldom['model'].values(), strict=True))
    logs = [
        [json.loads(text) for text in (tmp_path / name / 'log.txt').read_text().splitlines()]
        for name in ('often', 'seldom')
    ]
    assert [['test_acc1' in line for line in log] for log in logs] == [[True] * 3, [False, True, True]]
    assert logs[0][2]['test_acc1'] == logs[1][2]['test_acc1']
    assert often['step'] == 2  # of 33 images, half of 66


def test_evaluate_is_the_plain_average(images):
    files, labels, *_ = datasets.labelled_files(images, 'val')
    dataset = datasets.ImageFiles(files, labels, augment.eval_transform(32, 0.875), 0)
    core = main_finetune.find_method('mirl_vit_tiny').create_classifier('mirl_vit_tiny', num_classes=7, img_size=32)
    normalise = datasets.Normalisation.of((0.5,) * 3, (0.5,) * 3, torch.device('cpu'))
    stats = evaluate(core, datasets.loader(dataset, datasets.eval_batches(15, 4, 0, 1), 0, False), normalise, None)
    core.eval()
    with torch.no_grad():
        logits = core(normalise(torch.stack([dataset[0, i][0] for i in range(15)])))
    target = torch.from_numpy(labels)
    assert stats['images'] == 15
    assert stats['acc1'] == pytest.approx(100 * (logits.argmax(1) == target).float().mean().item())
    assert stats['acc5'] == pytest.approx(
        100 * (logits.topk(5).indices == target[:, None]).any(1).float().mean().item()
    )
    assert stats['loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, target).item(), rel=1e-6)
    batches = datasets.loader(dataset, datasets.eval_batches(15, 4, 0, 1), 0, False)
    among = evaluate(core, batches, normalise, None, absent=[3, 4, 5, 6])  # as if the network had no such outputs
    loss = torch.nn.functional.cross_entropy(logits[:, :3], target).item()
    assert among['loss'] == pytest.approx(loss, rel=1e-6)
    assert among['acc1'] == pytest.approx(100 * (logits[:, :3].argmax(1) == target).float().mean().item())


@pytest.mark.parametrize('dtype', ['bf16', 'fp16'])
def test_mixed_precision(images, tmp_path, dtype):
    flags = ['--batch_size', '16', '--epochs', '1', '--warmup_epochs', '0', '--lr', '1e-3', '--clip_grad', '1']
    saved = train('pretrain', images, tmp_path, *flags, '--amp_dtype', dtype)
    assert all(value.isfinite().all() for value in saved['model'].values())
    assert bool(saved['scaler']) == (dtype == 'fp16')


def test_batch_augmentation():
    argv = ['--mixup', '0.8', '--reprob', '0.9', '--smoothing', '0']
    args = main_finetune.get_args_parser().parse(argv)
    args_off = main_finetune.get_args_parser().parse(['--reprob', '0'])
    rng.seed_all(0, rng.STEP, 0)
    imgs, labels = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16), torch.arange(8)
    same_imgs, same_labels = augment.batch_augmentation(args_off, 8, 'cpu')(imgs.clone(), labels)
    assert torch.equal(same_imgs, imgs)
    assert torch.equal(same_labels, labels)
    mixed, targets = augment.batch_augmentation(args, 8, 'cpu')(imgs.clone(), labels)
    ratio = targets[0, 0]
    assert 0 < ratio < 1
    assert torch.allclose(targets, ratio * torch.eye(8) + (1 - ratio) * torch.eye(8).flip(0))
    plain = ratio * imgs + (1 - ratio) * imgs.flip(0)
    erased = ~torch.isclose(mixed, plain)
    assert 0.05 < erased.float().mean() < 0.7  # boxes of noise, of at most a third, in most images and their partners


def test_a_models_notice_is_printed_once(images, tmp_path, capsys, monkeypatch):
    flags = ['--batch_size', '16', '--epochs', '1', '--warmup_epochs', '0']
    for stage, network in (('pretrain', MIRL), ('finetune', VisionTransformer)):
        monkeypatch.setattr(network, 'notice', f'the {stage}ing network is another', raising=False)
        train(stage, images, tmp_path / stage, *flags)
        assert capsys.readouterr().out.count(f'the {stage}ing network is another\n') == 1


def test_criteria():
    """Binary cross-entropy is summed over the classes and averaged over the samples, on soft or smoothed targets."""
    torch.manual_seed(0)
    logits, labels, soft = torch.randn(4, 5), torch.tensor([0, 4, 2, 2]), torch.rand(4, 5)

    def loss(targets, *flags):
        return augment.criterion(main_finetune.get_args_parser().parse(list(flags)))(logits, targets)

    def binary(targets):
        chances = logits.sigmoid()
        return -(targets * chances.log() + (1 - targets) * (1 - chances).log()).sum(1).mean()

    smoothed = 0.1 / 5 + 0.9 * torch.eye(5)[labels]
    assert loss(soft, '--criterion', 'bce', '--mixup', '0.8') == pytest.approx(binary(soft).item(), rel=1e-6)
    assert loss(labels, '--criterion', 'bce') == pytest.approx(binary(smoothed).item(), rel=1e-6)
    assert loss(labels, '--criterion', 'bce', '--smoothing', '0') == pytest.approx(binary(torch.eye(5)[labels]).item())
    soft_ce = -(soft * logits.log_softmax(1)).sum(1).mean()
    assert loss(soft, '--mixup', '0.8') == pytest.approx(soft_ce.item(), rel=1e-6)
    assert loss(labels) == pytest.approx(-(smoothed * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-6)


def test_flags_reach_the_network_and_its_optimiser(images, tmp_path, monkeypatch):
    averages = []

    def average(core, *options, average=main_finetune.WeightAverage):
        averages.append(options)
        return average(core, *options)

    monkeypatch.setattr(main_finetune, 'WeightAverage', average)
    flags = ['--batch_size', '16', '--epochs', '1', '--warmup_epochs', '0', '--drop_path', '0.3', '--use_ema']
    flags += ['--ema_decay', '0.5', '--ema_warmup_epochs', '2.5', '--ema_warmup_ratio', '0.7']
    args = main_finetune.get_args_parser().parse(arguments(images, tmp_path, *flags))
    network = main_finetune.create_classifier(args, 3)
    rates = [getattr(block.drop_path1, 'drop_prob', 0.0) for block in network.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    saved = train('finetune', images, tmp_path, *flags, '--layer_decay', '0.5', '--weight_decay', '0.2', '--lr', '0.1')
    assert averages == [(0.5, 10.0, 0.7)]  # 4 steps an epoch
    groups = saved['optimizer']['param_groups']
    assert {group['lr_scale'] for group in groups} == {0.5**k for k in range(6)}
    assert {group['weight_decay'] for group in groups} == {0.0, 0.2}
    start, end, ema = network.state_dict()['head.weight'], saved['model']['head.weight'], saved['ema']['head.weight']
    assert not torch.equal(ema, start)
    assert not torch.equal(ema, end)
