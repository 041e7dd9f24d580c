"""What the test of a fifth method runs in a copy of the tree that has one: everything that a user would do with it."""

import pytest
import torch
from training import load, same, train

from scripts import visualize

FLAGS = ['--model', 'fifth_tiny', '--batch_size', '16', '--epochs', '2', '--warmup_epochs', '0', '--lr', '1e-3']


@pytest.fixture(scope='module')
def pretrained(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp('pretrained')
    train('pretrain', images, folder, *FLAGS, '--save_freq', '1', '--vis_freq', '1')
    return folder


def test_fifth_pretrains_and_resumes_to_the_bit(pretrained, images, tmp_path):
    assert (pretrained / 'pictures-1.png').stat().st_size > 1000
    resumed = train('pretrain', images, tmp_path, *FLAGS, '--resume', pretrained / 'checkpoint-0.pth')
    assert same(resumed['model'], load(pretrained)['model'])
    assert not same(resumed['model'], load(pretrained, 'checkpoint-0.pth')['model'])


def test_fifth_is_fine_tuned_and_evaluated(pretrained, images, tmp_path, capsys):
    flags = [*FLAGS, '--drop_path', '0', '--use_ema']
    tuned = train('finetune', images, tmp_path, *flags, '--finetune', pretrained / 'checkpoint-last.pth')
    told = capsys.readouterr().out
    assert 'checkpoint-last.pth: own names of FifthClassifier: ' in told
    assert '2 missing, stay as initialised (head.weight, head.bias)' in told
    assert torch.equal(load(tmp_path)['model']['head.bias'], tuned['model']['head.bias'])
    train('finetune', images, tmp_path, *flags, '--eval', '--resume', tmp_path / 'checkpoint-last.pth')
    assert 'Accuracy of the network on the 15 test images' in capsys.readouterr().out


def test_fifth_is_drawn(pretrained, images, tmp_path):
    line = ['--model', 'fifth_tiny', '--input_size', '32', '--device', 'cpu', '--output', str(tmp_path / 'a.png')]
    line += ['--checkpoint', str(pretrained / 'checkpoint-last.pth'), str(images / 'val')]
    visualize.main(visualize.get_args_parser().parse(line, stage='pretrain'))
    assert (tmp_path / 'a.png').stat().st_size > 1000
