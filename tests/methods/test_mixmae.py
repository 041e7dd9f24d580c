"""What MixMAE promises beyond the contract: what is mixed, who sees whom, and that fast forms equal the plain ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import draw_plan

import models_mixmae
from models_mixmae import MixPlan
from util.errors import CheckpointError
from util.nn.grad_checkpoint import checkpoint_blocks
from util.nn.patches import patch_mask_to_pixels, patchify
from util.weights import load_published

SMALL = dict(img_size=96, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=(6, 6, 6, 3))
DECODER = dict(decoder_dim=16, decoder_depth=1, decoder_num_heads=2)


@pytest.fixture
def model():
    """9 cells, in windows that do not coincide with them; every weight drawn."""
    torch.manual_seed(0)
    model = models_mixmae.MixMAE(**SMALL, **DECODER)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.1)
    return model


@pytest.fixture
def inputs(model):
    torch.manual_seed(1)
    return torch.randn(4, 3, 96, 96), draw_plan(model, 4, 1)


# --------------------------------------------------------------------------
# mask and mixture


def test_mask_polarity_and_partner(model):
    """1 = hidden: the int(L * ratio) cells of the smallest noise show image N-1-i; an odd N's middle stays whole."""
    noise = torch.linspace(0.99, 0, 9)
    plan = model.plan_from_noise(noise.view(1, 9))
    assert plan.mask.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1]]
    imgs = torch.arange(5.0).view(5, 1, 1, 1).expand(-1, 3, 96, 96)
    mixed = patchify(model.mix(imgs, plan.mask), 32)
    assert mixed[:, :5].unique(dim=1).unique(dim=2).flatten().tolist() == [0, 1, 2, 3, 4]
    assert mixed[:, 5:].unique(dim=1).unique(dim=2).flatten().tolist() == [4, 3, 2, 1, 0]


def test_one_plan_for_any_batch(model):
    plans = [draw_plan(model, n, 0) for n in (1, 2, 64)]
    assert all(torch.equal(plan.mask, plans[0].mask) for plan in plans)
    assert model.noise_shape(1) == model.noise_shape(64) == (1, 9)


@pytest.mark.parametrize(('drawn', 'hidden'), [(0.0, 3), (0.5, 4), (0.99, 6)])
def test_drawn_ratio(drawn, hidden):
    """The last number of the noise decides the ratio: 9 cells times 0.4 + drawn * 0.3."""
    model = models_mixmae.MixMAE(**SMALL, **DECODER, mask_ratio=0.4, range_mask_ratio=0.3)
    assert model.noise_shape(2) == (1, 10)
    plan = model.plan_from_noise(torch.cat([torch.rand(1, 9), torch.tensor([[drawn]])], dim=1))
    assert plan.mask.sum() == hidden
    shapes = {draw_plan(model, 2, seed).mask.shape for seed in range(9)}
    assert shapes == {(1, 9)}


def test_the_two_images_never_meet(model, inputs):
    """No feature of one image depends on a pixel of the other; whole cells of features, at the end of all stages."""
    imgs, plan = inputs
    hidden = patch_mask_to_pixels(plan.mask, 32)
    mixed = model.mix(imgs, plan.mask)
    before = model.forward_features(mixed, plan.mask)
    after = model.forward_features(mixed + torch.randn_like(mixed) * hidden, plan.mask)
    same = (before == after).all(dim=-1)
    assert torch.equal(same, (1 - plan.mask).bool().expand(4, -1))


def test_without_mask_they_do(model, inputs):
    imgs, plan = inputs
    before = model.forward_features(imgs)
    imgs = imgs + torch.randn_like(imgs) * patch_mask_to_pixels(plan.mask, 32)
    assert not (before == model.forward_features(imgs)).all(dim=-1).any()


def test_what_is_released_does_not_mix(model, inputs):
    """Each image as its own partner: the same loss and gradients, to rounding. So does the complementary mask.

    Losses are computed in float32 whatever the network's numbers are; float64 in all the rest leaves their rounding.
    """
    model.double()
    imgs, plan = inputs[0].double(), inputs[1]

    def gradients(plan: MixPlan) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        loss, _ = model(imgs, plan)
        loss.backward()
        return loss.detach(), torch.cat([param.grad.flatten() for param in model.parameters()])

    loss, grads = gradients(plan)
    mixed = model.mix(imgs, plan.mask)
    for pairing, other_plan in (('flip', MixPlan(1 - plan.mask)), ('self', plan)):
        model.pairing = pairing
        other_loss, other_grads = gradients(other_plan)
        assert torch.allclose(loss, other_loss, rtol=1e-7, atol=0)
        assert (grads - other_grads).norm() < 1e-7 * grads.norm()
    assert torch.equal(model.mix(imgs, plan.mask), imgs)
    assert not torch.equal(mixed, imgs)


def test_pictures_without_mixing(model, inputs):
    """Every image is its own partner in them too."""
    imgs, plan = inputs
    model.pairing = 'self'
    panels = model.reconstruct(imgs, plan)
    assert torch.equal(panels['mixed'], imgs)
    assert torch.equal(panels['partner'], imgs)
    with pytest.raises(ValueError, match="pairing 'none' is not one of flip, self"):
        models_mixmae.mixmae_tiny(img_size=32, pairing='none')


# --------------------------------------------------------------------------
# fast forms and plain ones


def plain_attention(attn: nn.Module, x: Tensor, cells: Tensor | None) -> Tensor:
    """As in the published code: windows as a batch, logits in full, the mask rebuilt and subtracted."""
    n, side, _, dim = x.shape
    w, heads = attn.window_size, attn.num_heads

    def windows(x: Tensor) -> Tensor:
        x = x.view(x.shape[0], side // w, w, side // w, w, -1).transpose(2, 3)
        return x.reshape(-1, w * w, x.shape[-1])

    q, k, v = attn.qkv(windows(x)).view(-1, w * w, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    logits = q * (dim // heads) ** -0.5 @ k.transpose(-1, -2)
    for i in range(w * w):
        for j in range(w * w):
            row = (i // w - j // w + w - 1) * (2 * w - 1) + i % w - j % w + w - 1
            logits[:, :, i, j] = logits[:, :, i, j] + attn.relative_position_bias_table[row]
    if cells is not None:
        cell = side // round(cells.shape[1] ** 0.5)
        m = windows(patch_mask_to_pixels(cells, cell).view(1, side, side, 1).expand(n, -1, -1, -1))
        logits = logits - 1e30 * (1 - m @ m.transpose(1, 2) - (1 - m) @ (1 - m).transpose(1, 2)).unsqueeze(1)
    x = (logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(n, side // w, side // w, w, w, dim)
    return attn.proj(x.transpose(2, 3).reshape(n, side, side, dim))


@pytest.mark.parametrize('masked', [True, False])
def test_attention_equals_the_plain_form(model, inputs, masked):
    for stage, side in zip(model.layers, (24, 12, 6, 3), strict=True):
        attn = stage.blocks[0].attn
        mask = inputs[1].mask if masked else None
        window_mask = None if mask is None else models_mixmae.separating_mask(mask, side, attn.window_size)
        grads = []
        x = torch.randn(2, side, side, attn.proj.in_features)
        weights = torch.randn_like(x)
        for output in (attn(x, window_mask), plain_attention(attn, x, mask)):
            attn.zero_grad()
            output.mul(weights).sum().backward()
            grads.append([output.detach(), *(param.grad.clone() for param in attn.parameters())])
        for ours, plain in zip(*grads, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


def test_no_mask_equals_one_that_separates_nothing(model, inputs):
    imgs, plan = inputs
    for mask in (torch.zeros_like(plan.mask), torch.ones_like(plan.mask)):
        torch.testing.assert_close(model.forward_features(imgs), model.forward_features(imgs, mask))


def test_loss_of_scored_cells_equals_the_plain_form(model, inputs):
    """Only scored cells are normed and projected; the published code does all of both passes, and drops half."""
    imgs, plan = inputs
    loss, terms = model(imgs, plan)
    halves = model.forward_decoder(model.forward_features(model.mix(imgs, plan.mask), plan.mask), plan.mask)
    own, partner = (model.forward_pred(half) for half in halves)
    hidden = plan.mask.unsqueeze(-1)
    unmixed = own * hidden + partner.flip(0) * (1 - hidden)
    errors = (unmixed - model.target(imgs)).square()
    assert torch.allclose(loss, errors.mean(), rtol=1e-6)
    parts = {'own_loss': errors[:, plan.mask[0] == 1].mean(), 'partner_loss': errors[:, plan.mask[0] == 0].mean()}
    assert terms.keys() == parts.keys() | {'explained'}
    assert all(torch.allclose(terms[name], parts[name], rtol=1e-6) for name in parts)


def test_loss_under_autocast(model, inputs):
    imgs, plan = inputs
    with torch.autocast('cpu', torch.bfloat16):
        loss, _ = model(imgs, plan)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, model(imgs, plan)[0], rtol=0.05)


def test_checkpointing_changes_nothing(model, inputs):
    """Under masks, and with drawn paths, which must repeat: same loss and gradients, with a fraction kept."""
    imgs, plan = inputs
    classifier = models_mixmae.MixMIMClassifier(**SMALL, num_classes=5, drop_path_rate=0.5)
    for network, call in ((model, lambda: model(imgs, plan)[0]), (classifier, lambda: classifier(imgs).square().sum())):
        results = []
        for enable in (False, True):
            if enable:
                assert checkpoint_blocks(network) == 5 + (network is model)  # the decoder's too
            kept: list[int] = []
            torch.manual_seed(3)
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x
            ):
                loss = call()
            network.zero_grad()
            loss.backward()
            results.append((loss.detach(), [param.grad for param in network.parameters()], sum(kept)))
        (loss, grads, size), (other_loss, other_grads, other_size) = results
        assert torch.equal(loss, other_loss)
        assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))
        assert other_size < size / 2


# --------------------------------------------------------------------------
# sizes, refusals, first weights


@pytest.mark.parametrize(
    ('img_size', 'windows'),
    [(224, [14, 14, 14, 7]), (384, [16, 16, 24, 12]), (64, [16, 8, 4, 2]), (256, [16, 16, 16, 8]), (448, [14] * 4)],
)
def test_windows_follow_the_image(img_size, windows):
    with torch.device('meta'):
        for network in (
            models_mixmae.mixmae_base(img_size=img_size),
            models_mixmae.create_classifier('mixmae_base', img_size=img_size),
        ):
            assert [stage.window_size for stage in network.layers] == windows


def test_windows_are_no_larger_than_their_stage():
    with torch.device('meta'):
        model = models_mixmae.MixMAE(**SMALL | dict(window_size=(8, 12, 14, 14)), **DECODER)
    assert [stage.window_size for stage in model.layers] == [8, 12, 6, 3]


@pytest.mark.parametrize('img_size', [16, 32, 64, 96, 128])
def test_tiny_sizes(img_size):
    model = models_mixmae.mixmae_tiny(img_size=img_size)
    assert model.num_cells == (img_size // 8) ** 2
    assert model(torch.randn(2, 3, img_size, img_size))[0].isfinite()


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(img_size=100), 'img_size 100 is not a multiple of 8 x patch_size = 32'),
        (dict(window_size=(7, 6, 6, 3)), 'window_size 7 does not divide the 24 x 24 tokens of stage 0 at img_size 96'),
        (dict(window_size=(6, 6, 4, 3)), 'window_size 4 does not divide the 6 x 6 tokens of stage 2'),
        (dict(window_size=(6, 6, 6)), 'lengths differ'),
        (dict(num_heads=(1, 2, 4)), 'lengths differ'),
        (dict(num_heads=(1, 2, 5, 8)), "a stage's width 64 is not a multiple of its 5 heads"),
        (dict(embed_dim=18), 'divisible by 4, got 18'),
        (dict(decoder_num_heads=3), 'decoder_dim 16 is not a multiple of its 3 heads'),
        (dict(mask_ratio=0.1), 'mask_ratio 0.1 hides 0 of 9 cells of 32 pixels'),
        (dict(mask_ratio=1.0), 'mask_ratio 1.0 hides 9 of 9 cells'),
        (dict(range_mask_ratio=0.5), 'mask_ratio 1.0 hides 9 of 9 cells'),
        (
            dict(img_size=32, window_size=None),
            '1 of the cells of 32 pixels a side in an image of this size: too few to hide some',
        ),
    ],
)
def test_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        models_mixmae.MixMAE(**SMALL | DECODER | options)


def test_refuses_another_head_layer():
    with pytest.raises(ValueError, match="head_layer 'last' is not one of published, own"):
        models_mixmae.param_rules(models_mixmae.mixmae_tiny(img_size=32), head_layer='last')


def test_first_weights():
    """Linear layers xavier-uniform, tables and mask token N(0, 0.02), the patch projection as torch draws it."""
    torch.manual_seed(0)
    model = models_mixmae.MixMAE(img_size=224, embed_dim=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
    for name, param in model.named_parameters():
        if name.startswith('patch_embed.proj'):
            bound = 48**-0.5  # torch's: 1 / sqrt(fan in)
            assert 0.9 * bound < param.abs().max() <= bound, name
        elif 'norm' in name:
            assert torch.all(param == name.endswith('weight')), name
        elif param.ndim == 1:
            assert not param.any(), name
        elif name.endswith(('bias_table', 'mask_token')):
            assert 0.8 * 0.02 < param.std() < 1.2 * 0.02, name
        else:
            bound = (6 / sum(param.shape)) ** 0.5
            assert 0.95 * bound < param.abs().max() <= bound, name
    head = models_mixmae.create_classifier('mixmae_tiny', img_size=32).head
    assert 1e-5 < head.weight.std() < 3e-5
    assert not head.bias.any()


def test_panels(model, inputs):
    """Un-mixed images show visible cells as they are and hidden ones as predicted: the original, if that is exact."""
    imgs, plan = inputs
    panels = model.reconstruct(imgs, plan)
    composites = {'composite': 'original', 'composite of partner': 'partner'}
    assert list(panels) == [
        *('composite', 'masked', 'original', 'composite (oracle)', 'mixed'),
        *('partner', 'composite of partner', 'composite (oracle) of partner'),
    ]
    hidden = patch_mask_to_pixels(plan.mask, 32)
    assert torch.equal(panels['partner'], imgs.flip(0))
    assert torch.equal(panels['mixed'], imgs * (1 - hidden) + imgs.flip(0) * hidden)
    for kind in ('composite', 'composite (oracle)'):
        panel = panels[f'{kind} of partner']
        assert torch.equal(panel * hidden, panels['partner'] * hidden)
        assert not torch.equal(panel, panels['partner'])

    model.norm_pix_loss = False  # then there is nothing to leak
    assert not [name for name in model.reconstruct(imgs, plan) if 'oracle' in name]
    model.norm_pix_loss = True
    target = model.target(imgs)
    model.forward_pred = lambda x: target if x is model.own else target.flip(0)

    def forward_decoder(x, mask):
        model.own = x
        return x, x + 1

    model.forward_decoder = forward_decoder
    panels = model.reconstruct(imgs, plan)
    for composite, original in composites.items():
        exact = panels[composite.replace('composite', 'composite (oracle)')]
        torch.testing.assert_close(exact, panels[original], atol=1e-4, rtol=0)


# --------------------------------------------------------------------------
# checkpoints


def in_mmpretrain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under mmpretrain's names, patch merging in the order of nn.Unfold."""
    renamed = {}
    for key, value in state.items():
        neck = key.startswith(('mask_token', 'decoder_'))
        if '.downsample.' in key:
            value = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2)
        for ours, theirs in (
            ('norm1.', 'ln1.'),
            ('norm2.', 'ln2.'),
            ('mlp.fc1.', 'ffn.layers.0.0.'),
            ('mlp.fc2.', 'ffn.layers.1.'),
            ('patch_embed.proj.', 'patch_embed.projection.'),
            ('decoder_norm.', 'ln1.'),
            ('head.', 'head.fc.'),
        ):
            key = key.replace(ours, theirs)
        prefix = '' if key.startswith('head') else 'neck.' if neck else 'backbone.'
        renamed[prefix + key] = value
    renamed['backbone.layers.0.blocks.0.attn.relative_position_index'] = torch.zeros(36, 36, dtype=torch.int64)
    return renamed


def drawn(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.normal_()
    return network


def test_mmpretrain_merging_is_unfold(model):
    """A merging as mmcv computes it, from the file's weights, equals ours from the loaded ones."""
    file = in_mmpretrain(drawn(models_mixmae.MixMAE(**SMALL, **DECODER)).state_dict())
    load_published(model, file)
    x = torch.randn(2, 12, 12, 32)
    name = 'backbone.layers.1.downsample.'
    unfolded = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)  # [N, L, C * 4]
    normed = F.layer_norm(unfolded, (128,), file[name + 'norm.weight'], file[name + 'norm.bias'])
    merged = F.linear(normed, file[name + 'reduction.weight'])
    torch.testing.assert_close(model.layers[1].downsample(x).flatten(1, 2), merged, rtol=1e-4, atol=1e-4)


def test_every_format_loads(model):
    pretrained = drawn(models_mixmae.MixMAE(**SMALL, **DECODER)).state_dict()
    network = models_mixmae.MixMIMClassifier(**SMALL, num_classes=5)
    tuned = drawn(models_mixmae.MixMIMClassifier(**SMALL, num_classes=5)).state_dict()
    encoder = {key: value for key, value in tuned.items() if not key.startswith('head.')}
    head = ['head.weight', 'head.bias']
    cases = [
        (model, pretrained, 'MixMAE pretraining', []),
        (model, in_mmpretrain(pretrained), 'mmpretrain MixMIM pretraining', []),
        (network, pretrained, 'MixMAE pretraining', head),
        (network, in_mmpretrain(pretrained), 'mmpretrain MixMIM', head),
        (network, tuned, 'MixMIM', []),
        (network, in_mmpretrain(tuned), 'mmpretrain MixMIM', []),
        (network, encoder, 'MixMIM', head),
    ]
    for net, source, name, missing in cases:
        drawn(net)
        report = load_published(net, {'state_dict': source})
        assert (report.format, report.missing) == (name, missing)
        origin = pretrained if 'mask_token' in source or 'neck.mask_token' in source else tuned
        loaded = net.state_dict()
        assert all(torch.equal(loaded[key], origin[key]) for key in report.loaded)


def test_pretraining_goes_on_at_another_size(model):
    source = drawn(models_mixmae.MixMAE(**SMALL | dict(img_size=192), **DECODER)).state_dict()
    report = load_published(model, source)
    assert report.resized == [
        'absolute_pos_embed [1, 2304, 16] -> [1, 576, 16]',
        'decoder_pos_embed [1, 36, 16] -> [1, 9, 16]',
    ]


def test_mistaken_files(model):
    tuned = models_mixmae.MixMIMClassifier(**SMALL).state_dict()
    with pytest.raises(CheckpointError, match=r'MixMIM classifier: holds no decoder: main_finetune\.py --finetune'):
        load_published(model, tuned)
    with pytest.raises(CheckpointError, match='mmpretrain MixMIM classifier: holds no decoder'):
        load_published(model, in_mmpretrain(tuned))
    wider = models_mixmae.MixMIMClassifier(**SMALL | dict(num_heads=(2, 4, 8, 16))).state_dict()
    with pytest.raises(CheckpointError, match=r'relative_position_bias_table: file \[121, 2\], model \[121, 1\]'):
        load_published(models_mixmae.MixMIMClassifier(**SMALL), wider)
    odd = in_mmpretrain(tuned) | {'backbone.layers.0.downsample.norm.weight': torch.ones(63)}
    with pytest.raises(CheckpointError, match=r'downsample.norm.weight: file \[63\], model \[64\]'):
        load_published(models_mixmae.MixMIMClassifier(**SMALL), odd)
