"""Encoders and pyramids of detection: what ViTDet's and Swin's own code computes, any image size, optimiser groups."""

import re

import fill
import pytest
import torch
from golden import filled_state, golden, relative
from timm.models import vision_transformer_sam
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import models_a2mim
import models_localmim
import models_mirl
import models_mixmae
from main_pretrain import find_method
from util.nn.detector import create_detector
from util.nn.pos_embed import resize_bias_table
from util.nn.pyramid import FPN, SimpleFeaturePyramid, StageMaps, ViTPyramid, WindowedViT, with_neck
from util.nn.windowed import in_windows
from util.optim import param_groups
from util.weights import load_published
from util.weights.published import SWIN_DOWNSAMPLE
from util.weights.published_detectors import SIMPLE_PYRAMID, VITDET

TINY = {  # a network of each kind, and its neck
    'mirl_vit_tiny': 'simple',
    'localmim_vit_tiny': 'simple',
    'a2mim_vit_tiny': 'simple',
    'a2mim_resnet_tiny': 'fpn',
    'a2mim_convnext_pico': 'fpn',
    'simmim_swin_pico': 'fpn',
    'localmim_swin_pico': 'fpn',
    'mixmae_tiny': 'fpn',
}

# --------------------------------------------------------------------------
# parity


def difference(ours: Tensor, summary: dict) -> float:
    """Relative, of all numbers of a summary; the sum against noise in units of its standard deviation."""
    x = ours.detach().double()
    assert list(x.shape) == summary['shape']
    probe = (x * (torch.from_numpy(fill.uniform('probe', x.shape)).double() - 0.5)).sum()
    mean, std, ends = summary['mean'], summary['std'], summary['first'] + summary['last']
    return max(
        relative(x.norm(), summary['l2']),
        relative(x.std(unbiased=False), std),
        abs(float(x.mean()) - mean) / std,
        abs(float(probe) - summary['probe']) / (summary['l2'] / 12**0.5),
        float((torch.cat([x.flatten()[:8], x.flatten()[-8:]]) - torch.tensor(ends).double()).abs().max()) / std,
    )


def probed(maps: list[Tensor]) -> Tensor:
    return sum((x * (torch.from_numpy(fill.uniform('probe', x.shape)) - 0.5)).sum() for x in maps)


def largest_gradient_difference(case: dict, params: dict[str, nn.Parameter], renames: tuple) -> float:
    """Of the norms in the case, whose names `renames` makes ours."""

    def rename(name: str) -> str:
        for pattern, replacement in renames:
            if re.fullmatch(pattern, name):
                return re.sub(pattern, replacement, name)
        return name

    norms = case['gradients']['params']
    return max(relative(params[rename(name)].grad.norm(), norm) for name, norm in norms.items())


LEVELS = ('p2', 'p3', 'p4', 'p5', 'p6')


@pytest.mark.parametrize('name', ['sfp_tiny', 'sfp_odd'])
def test_simple_pyramid_parity(name, measured):
    case = golden(f'detection/{name}.json')
    args, outputs = case['args'], case['outputs']
    pyramid = SimpleFeaturePyramid(args['in_channels'], args['out_channels'], args['in_stride'])
    assert not load_published(pyramid, filled_state(case['params'])).missing
    shape = [int(n) for n in re.search(r'\[(.*?)\]', case['input'])[1].split(',')]
    x = (2 * torch.from_numpy(fill.uniform('features', shape)) - 1).requires_grad_()
    maps = pyramid(x)
    assert list(maps) == ['0', '1', '2', '3', 'pool']
    found = max(difference(y, outputs[level]) for y, level in zip(maps.values(), LEVELS, strict=True))
    probed(list(maps.values())).backward()
    inputs = difference(x.grad, case['gradients']['input'])
    grads = largest_gradient_difference(case, dict(pyramid.named_parameters()), SIMPLE_PYRAMID)
    measured(f'{name}: levels {found:.1e}, gradient of the input {inputs:.1e}, norms of the others {grads:.1e}')
    assert max(found, inputs) < 1e-5
    assert grads < 1e-4


@pytest.mark.parametrize('name', ['vitdet_relpos', 'vitdet_plain'])
def test_vitdet_parity(name, measured):
    """Blocks, levels and gradients, of images that are no square, in windows that do not divide their grids."""
    case = golden(f'detection/{name}.json')
    args, outputs = case['args'], case['outputs']
    sizes = {key: args[key] for key in ('patch_size', 'embed_dim', 'depth', 'num_heads', 'mlp_ratio')}
    vit = VisionTransformer(img_size=args['pretrain_img_size'], num_classes=0, **sizes)
    windows = dict(rel_pos=args['rel_pos'], img_size=args['rel_pos_made_for_img_size'])
    encoder = WindowedViT(vit, args['window_size'], args['global_blocks'], **windows).eval()
    network = ViTPyramid(encoder, args['out_channels'])
    state = filled_state(case['params'])
    parts = {prefix: {k: v for k, v in state.items() if k.startswith(prefix)} for prefix in ('net.', 'simfp_')}
    for module, part in ((encoder, parts['net.']), (network.pyramid, parts['simfp_'])):
        assert not load_published(module, part).missing

    blocks = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda block, args, output: blocks.append(output))
    rows, cols = args['image_size']
    imgs = torch.from_numpy(fill.images(2, max(rows, cols)))[:, :, :rows, :cols]
    maps = list(network(imgs).values())
    inside = [difference(x, summary) for x, summary in zip(blocks, outputs['blocks'], strict=True)]
    inside.append(difference(encoder.positions(rows // 16, cols // 16), outputs['pos_embed']))
    levels = max(difference(x, outputs[level]) for x, level in zip(maps, LEVELS, strict=True))
    probed(maps).backward()
    own = {f'net.{name}': param for name, param in encoder.named_parameters()}
    own |= dict(network.pyramid.named_parameters())
    grads = largest_gradient_difference(case, own, SIMPLE_PYRAMID)
    measured(f'{name}: blocks {max(inside):.1e}, levels {levels:.1e}, norms of gradients {grads:.1e}')
    assert max(*inside, levels) < 1e-5
    assert grads < 1e-4


def test_swin_fpn_parity(measured):
    case = golden('detection/swin_fpn.json')
    args, outputs = case['args'], case['outputs']
    sizes = {key: args[key] for key in ('patch_size', 'embed_dim', 'depths', 'num_heads', 'window_size', 'mlp_ratio')}
    network = FPN(StageMaps(SwinTransformer(img_size=128, num_classes=0, **sizes)), args['out_channels']).eval()
    assert not load_published(network, filled_state(case['params'])).missing
    rows, cols = args['image_size']
    imgs = torch.from_numpy(fill.images(2, max(rows, cols)))[:, :, :rows, :cols]
    stages = network.encoder(imgs)
    found = max(difference(x, outputs['stages'][f'p{i}']) for i, x in enumerate(stages))
    levels = zip(network(imgs).values(), LEVELS, strict=True)
    found = max(found, *(difference(x, outputs['fpn'][level]) for x, level in levels))
    probed(stages).backward()
    grads = largest_gradient_difference(case, dict(network.encoder.named_parameters()), SWIN_DOWNSAMPLE)
    measured(f'swin_fpn: {found:.1e}, norms of gradients {grads:.1e}')
    assert found < 1e-5
    assert grads < 1e-4


def test_vitdet_optimiser_parity():
    """Learning rate and decay of every parameter of ViTDet."""
    case = golden('detection/optim_vitdet.json')
    encoder = models_mirl.create_backbone('mirl_vit_tiny', patch_size=16, depth=case['args']['depth'])
    small = dict(width=8, fc_width=16, conv_width=8)
    detector = create_detector(encoder, 3, box_head='4conv1fc', norm='ln', rpn_depth=2, **small)
    rules = models_mirl.param_rules(detector)
    groups = param_groups(detector, rules, case['args']['weight_decay'], case['args']['layer_decay'])
    found = {name: (group['lr_scale'], group['weight_decay']) for group in groups for name in group['names']}
    for theirs, expected in case['parameters'].items():
        pattern, replacement = next(((p, r) for p, r in VITDET if re.fullmatch(p, theirs)), (theirs, theirs))
        assert found.pop(re.sub(pattern, replacement, theirs)) == pytest.approx(expected, rel=1e-12), theirs
    assert not {name for name in found if not name.startswith('roi_heads.box_predictor.')}


# --------------------------------------------------------------------------
# every method's encoder


@pytest.mark.parametrize('name', TINY)
def test_any_image(name):
    """Maps have the widths and strides that they are said to have; names are the classifier's; all parameters train."""
    method, neck = find_method(name), TINY[name]
    encoder = method.create_backbone(name, 0.1, img_size=64)
    classifier = method.create_classifier(name, 3, img_size=64).state_dict()
    new = {key for key in encoder.state_dict() if key not in classifier}
    assert all(re.match(r'norm\d\.|blocks\.\d+\.attn\.rel_pos_[hw]$', key) for key in new)
    network = with_neck(encoder, neck, width=16, norm='bn' if neck == 'fpn' else None).train()
    rows, cols = 90, 131  # of no stride a multiple
    imgs = torch.randn(2, 3, rows, cols)
    maps = encoder(imgs)
    assert [x.shape[1] for x in maps] == encoder.widths
    whole = 0 if 'convnext' in name else 1  # what is left over at a border is cut off, or makes a place
    for x, stride in zip(maps, encoder.strides, strict=True):
        assert x.shape[2:] == ((rows + whole * (stride - 1)) // stride, (cols + whole * (stride - 1)) // stride)
    levels = network(imgs)
    assert list(levels) == [*map(str, range(len(levels) - 1)), 'pool']
    assert network.strides == [network.strides[0] << i for i in range(len(levels))]
    assert {x.shape[:2] for x in levels.values()} == {(2, 16)}
    sum(x.square().sum() for x in levels.values()).backward()
    assert not [key for key, param in network.named_parameters() if param.grad is None]
    assert not [
        key for key, x in network.state_dict().items() if 'relative_position_index' in key or 'cls_token' in key
    ]


def test_c4():
    """The third stage alone; the last one is taken by who asks for it before."""
    encoder = models_a2mim.create_backbone('a2mim_resnet_tiny').eval()
    imgs = torch.randn(1, 3, 64, 96)
    *_, third, fourth = encoder(imgs)
    layer4 = encoder.layer4
    network = with_neck(encoder, 'c4')
    [(key, found)] = network(imgs).items()
    assert (key, network.strides, network.out_channels) == ('0', [16], 128)
    assert torch.equal(found, third)
    assert len(encoder(imgs)) == len(encoder.widths) == 1
    assert torch.equal(layer4(found), fourth)
    assert not [name for name in network.state_dict() if 'layer4' in name]


def test_epsilons_of_localmims_swin():
    """Those of its pretraining, in norms that it has from there; a segmenter's are all the published one's."""
    classifier, encoder, segmenter = (
        {name: norm.eps for name, norm in network.named_modules() if isinstance(norm, nn.LayerNorm)}
        for network in (
            models_localmim.create_classifier('localmim_swin_pico', 3, img_size=64),
            models_localmim.create_backbone('localmim_swin_pico'),
            models_localmim.create_segmenter('localmim_swin_pico', 3).encoder,
        )
    )
    assert encoder == {name: classifier.get(name, 1e-5) for name in encoder}
    assert segmenter == dict.fromkeys(encoder, 1e-5)


def test_mixmim_has_the_classifiers_tokens_at_224():
    """Exactly, in its windows of 14, 14, 14 and 7."""
    sizes = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
    classifier = models_mixmae.create_classifier('mixmae_base', 3, **sizes).eval()
    encoder = models_mixmae.create_backbone('mixmae_base', **sizes).eval()
    assert [stage.window_size for stage in encoder.layers] == [14, 14, 14, 7]
    state = {k: v for k, v in classifier.state_dict().items() if k.partition('.')[0] not in ('head', 'norm')}
    encoder.load_state_dict(state, strict=False)
    imgs = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        stages = zip(encoder.forward_stages(imgs), classifier.forward_stages(imgs), strict=True)
        assert all(torch.equal(x, y) for x, y in stages)


def test_mixmim_pads_after_the_norm():
    """Zeros complete windows, and are attended to: as if the normed map had been larger."""
    block = models_mixmae.WindowBlock(16, 2, 4, 4.0, 0.0)
    nn.init.normal_(block.attn.relative_position_bias_table)
    nn.init.normal_(block.attn.qkv.bias)
    x = torch.randn(2, 6, 9, 16)
    larger = x.new_zeros(2, 8, 12, 16)
    larger[:, :6, :9] = block.norm1(x)
    with torch.no_grad():
        assert torch.allclose(block(x), after(block, x, block.attn(larger)[:, :6, :9]), atol=1e-6)


def after(block: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
    x = x + attended
    return x + block.mlp(block.norm2(x))


# --------------------------------------------------------------------------
# plain ViTs


def test_global_blocks():
    for depth, blocks in {12: [2, 5, 8, 11], 24: [5, 11, 17, 23], 48: [11, 23, 35, 47], 54: [13, 26, 40, 53]}.items():
        vit = VisionTransformer(img_size=32, embed_dim=8, num_heads=1, depth=depth, num_classes=0)
        encoder = WindowedViT(vit)
        assert [i for i, block in enumerate(encoder.blocks) if not block.window] == blocks
        sides = [(len(block.attn.rel_pos_h) + 1) // 2 for block in encoder.blocks]
        assert sides == [64 if i in blocks else 14 for i in range(depth)]


@pytest.mark.parametrize('grid', [(5, 5), (4, 7)])
def test_decomposed_positions(grid):
    """timm's attention with the same tables, which are made for another grid than the second."""
    vit = VisionTransformer(img_size=32, patch_size=16, embed_dim=48, depth=1, num_heads=3, num_classes=0)
    [block] = WindowedViT(vit, global_blocks=[0], img_size=80).blocks
    theirs = vision_transformer_sam.Attention(48, 3, use_rel_pos=True, input_size=(5, 5))
    for table in (block.attn.rel_pos_h, block.attn.rel_pos_w):
        assert not table.any()
        nn.init.normal_(table)
    theirs.load_state_dict(block.attn.state_dict())
    x = torch.randn(2, *grid, 48)
    assert torch.allclose(block.attn(x), theirs(x), atol=1e-5)


def test_beits_tables():
    """As pretrained in a window of their own size; BEiT's rule elsewhere, for each axis."""
    encoder = models_a2mim.create_backbone('a2mim_vit_tiny', img_size=32, window_size=4)
    attn = encoder.blocks[0].attn
    nn.init.normal_(attn.relative_position_bias_table)
    table, index = attn.relative_position_bias_table, models_a2mim.beit(**BEIT).blocks[0].attn.relative_position_index
    native = table[index[1:, 1:]].permute(2, 0, 1)
    assert torch.equal(attn.bias(4, 4)[0], native)
    larger = resize_bias_table(table.detach(), 13**2 + 3, num_extra_rows=3)[:-3].view(13, 13, -1)
    row, col = torch.arange(49) // 7, torch.arange(49) % 7
    pairs = larger[row[:, None] - row + 6, col[:, None] - col + 6].permute(2, 0, 1)
    assert torch.allclose(attn.bias(7, 7)[0], pairs, atol=1e-5)
    tall, wide = attn.bias(7, 4), attn.bias(4, 7)  # in one row, or one column, only the other axis counts
    assert torch.allclose(wide[0, :, :7, :7], pairs[:, :7, :7], atol=1e-5)
    assert torch.allclose(tall[0, :, ::4, ::4], pairs[:, ::7, ::7], atol=1e-5)
    wide.sum().backward()
    assert table.grad is not None


BEIT = dict(img_size=32, patch_size=8, embed_dim=96, depth=1, num_heads=3)


def test_without_relative_positions():
    for name in ('mirl_vit_tiny', 'a2mim_vit_tiny'):
        encoder = find_method(name).create_backbone(name, img_size=32, rel_pos=False)
        assert not [key for key, _ in encoder.named_parameters() if 'rel' in key]
        assert encoder(torch.randn(1, 3, 40, 64))[0].shape == (1, 96, 5, 8)


def test_drop_path_takes_whole_images():
    """Not windows of them: all that a block adds to an image is there, or nothing."""
    encoder = models_mirl.create_backbone('mirl_vit_tiny', img_size=32, window_size=2, global_blocks=[])
    block = encoder.blocks[0].train()
    block.drop_path1 = models_mirl.create_backbone('mirl_vit_tiny', 0.5).blocks[-1].drop_path1
    block.mlp = nn.Identity()
    assert block.drop_path1.drop_prob == 0.5
    x = torch.randn(32, 4, 4, 96)
    with torch.no_grad():
        block.norm2 = nn.Identity()
        added = ((block(x) / 2 - x).abs().sum(-1) > 1e-3).flatten(1)
    assert set(added.float().mean(1).tolist()) == {0.0, 1.0}


def test_windows():
    """Zeros come in below and on the right, before the shift, and nothing else moves."""
    x = torch.arange(1.0, 16).view(1, 3, 5, 1)
    seen = []
    assert torch.equal(in_windows(lambda windows: seen.append(windows) or windows, x, 2, shift=1), x)
    assert torch.equal(in_windows(lambda windows: seen.append(windows) or windows, x, 2), x)
    assert seen[0][0].flatten().tolist() == [7, 8, 12, 13]
    assert seen[0][-1].flatten().tolist() == [0, 0, 0, 1]
    assert seen[1][-1].flatten().tolist() == [15, 0, 0, 0]


@pytest.mark.faults
@pytest.mark.parametrize(('name', 'sizes'), [('mirl_vit_tiny', dict(depth=2)), ('mixmae_tiny', dict(depths=(1, 1, 1)))])
def test_compiled(name, sizes):
    """Without a break, in windows that images are padded for."""
    if 'vit' in name:
        sizes = dict(sizes, window_size=3, global_blocks=[1])
    encoder = find_method(name).create_backbone(name, img_size=32, **sizes)
    torch.compiler.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend='aot_eager')
    imgs = torch.randn(1, 3, 40, 50)
    maps = compiled(imgs)
    sum(x.sum() for x in maps).backward()
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(maps, encoder(imgs), strict=True))


# --------------------------------------------------------------------------
# optimiser groups, mistakes


@pytest.mark.parametrize(
    ('name', 'spared'),
    [
        ('a2mim_resnet_tiny', r'.*(bn\d|downsample\.1)\.(weight|bias)'),
        ('simmim_swin_pico', r'.*(norm|relative_position_bias_table).*'),
        ('localmim_swin_pico', r'.*(norm|relative_position_bias_table).*'),
        ('mixmae_tiny', r'.*(norm|relative_position_bias_table).*'),
        ('a2mim_vit_tiny', r'.*(norm\d\.(weight|bias)|pos_embed)'),
        ('localmim_vit_tiny', r'.*(norm\d\.(weight|bias)|pos_embed)'),
    ],
)
def test_groups(name, spared):
    """Norms of the encoder do not decay, nor do a Swin's tables; blocks count from 1, pyramid and heads are last."""
    method = find_method(name)
    encoder = method.create_backbone(name, img_size=64)
    detector = create_detector(encoder, 3, width=8, fc_width=16, conv_width=8)
    assert list(detector.rpn.anchor_generator.sizes) == [[8 * stride] for stride in detector.backbone.strides]
    rules = method.param_rules(detector)
    assert rules.keys() == dict(detector.named_parameters()).keys()
    expected = {key for key in rules if re.fullmatch(rf'backbone\.encoder\.{spared}', key)}
    assert {key for key, (_, _, decays) in rules.items() if not decays} == expected
    new = r'(?!backbone\.encoder\.)|backbone\.encoder\.norm\d\.'  # of each map
    tops = {layer for key, (layer, _, _) in rules.items() if re.match(new, key)}
    assert tops == {max(layer for layer, _, _ in rules.values())}
    assert {scale for _, scale, _ in rules.values()} == {1.0}
    if 'vit' in name:
        assert all(layer == int(key.split('.')[3]) + 1 for key, (layer, _, _) in rules.items() if '.blocks.' in key)
        assert {rules[f'backbone.encoder.{key}'][0] for key in ('pos_embed', 'patch_embed.proj.bias')} == {0}


def backbone(name: str, neck: str = '', **options) -> None:
    encoder = find_method(name).create_backbone(name, **options)
    if neck:
        with_neck(encoder, neck)


VIT, RESNET = 'mirl_vit_tiny', 'a2mim_resnet_tiny'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(name=VIT, global_blocks=[4]), r'global_blocks \[4\] must be from 0 to 3'),
        (dict(name=VIT, window_size=0), 'window_size 0 must be at least 1'),
        (dict(name=VIT, rel_pos_size=1020), 'img_size 1020 is not a multiple of patch_size 8'),
        (dict(name=VIT, patch_size=14, rel_pos_size=1008, neck='simple'), 'a map of stride 14'),
        (dict(name=VIT, neck='c4'), "neck 'c4' is of a ResNet with maps of strides 16 and 32, not of WindowedViT"),
        (dict(name=RESNET, neck='simple'), "neck 'simple' is for the one map of a ViT, not for 4; try 'fpn'"),
        (dict(name=VIT, neck='fpn'), "neck 'fpn' is for several maps, not for the one of a ViT; try 'simple'"),
        (dict(name=RESNET, neck='none'), "neck 'none' is not one of simple, fpn, c4"),
        (dict(name=RESNET, output_stride=8, neck='fpn'), r'maps of strides \[4, 8, 8, 8\]'),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        backbone(**options)


def test_other_networks_of_timm():
    """A plain ViT is windowed; what is not plain, or takes one image size, is refused."""
    create = models_a2mim.create_backbone
    encoder = create('a2mim_timm', img_size=32, name='vit_xsmall_patch16_clip_224', pre_norm=False, depth=2)
    assert encoder(torch.randn(1, 3, 50, 64))[0].shape[2:] == (4, 4)
    with pytest.raises(ValueError, match='VisionTransformer with norm_pre is no plain ViT'):
        create('a2mim_timm', img_size=32, name='vit_xsmall_patch16_clip_224', depth=2)
    fixed = create('a2mim_timm', img_size=64, name='maxvit_rmlp_pico_rw_256')
    with pytest.raises(ValueError, match='MaxxVit takes images of 64 x 64 only, a detector any'):
        with_neck(fixed, 'fpn')
    with pytest.raises(ValueError, match="norm 'gn' is not one of ln, bn"):
        FPN(models_a2mim.create_backbone('a2mim_resnet_tiny'), norm='gn')
