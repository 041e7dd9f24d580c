"""Parameter groups from a model's rules, learning rates as a function of the epoch, and the guarded optimiser."""

import argparse
import math
from collections.abc import Callable
from functools import partial

import torch
from timm import optim as timm_optim
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from util import dist
from util.errors import UserError
from util.recipes import of_recipe

Rules = dict[str, tuple[int, float, bool]]


def param_groups(model: nn.Module, rules: Rules, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """One group per (learning-rate scale, weight decay); scale = lr_scale * layer_decay ** (last layer - layer).

    The last layer is the highest of the rules, or the model's `last_layer` if no parameter is in that.
    """
    last = max(getattr(model, 'last_layer', 0), *(layer_id for layer_id, _, _ in rules.values()))
    groups: dict[tuple[float, float], dict] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        layer_id, lr_scale, decays = rules[name]
        key = (lr_scale * layer_decay ** (last - layer_id), weight_decay if decays else 0.0)
        group = groups.setdefault(key, dict(params=[], names=[], lr_scale=key[0], weight_decay=key[1]))
        group['params'].append(param)
        group['names'].append(name)
    return list(groups.values())


def learning_rate(
    epoch: float,
    *,
    lr: float,
    epochs: int,
    warmup_epochs: float = 0,
    warmup_lr_ratio: float = 0.0,
    warmup_shape: str = 'flat',
    min_lr: float = 0.0,
    sched: str = 'cosine',
    cosine_start: str = 'warmup',
    decay_epochs: tuple[int, ...] = (),
    decay_rate: float = 0.1,
    per_epoch: bool = False,
    power: float = 1.0,
) -> float:
    """The learning rate at a fractional epoch: a half-cosine or a polynomial from `lr` to `min_lr`, or steps.

    The warm-up is a linear ramp from `warmup_lr_ratio` to 1, per iteration. A 'flat' one multiplies `lr`, as MAE's
    does; a 'scaled' one multiplies what the schedule says of that moment, as mmcv's does. `cosine_start` is where the
    cosine has its peak: at the end of the warm-up (before it, the curve is mirrored), or at epoch zero. The polynomial
    begins at epoch zero and falls as (1 - epoch / epochs) ** power, as mmcv's 'poly'. `per_epoch` holds the scheduled
    rate constant within an epoch.
    """
    ramp = 1.0
    if epoch < warmup_epochs:
        ramp = warmup_lr_ratio + (1 - warmup_lr_ratio) * (epoch / warmup_epochs)
        if warmup_shape == 'flat':
            return lr * ramp
    if sched == 'step':
        return ramp * lr * decay_rate ** sum(epoch >= boundary for boundary in decay_epochs)
    first = warmup_epochs if cosine_start == 'warmup' and sched == 'cosine' else 0
    if per_epoch:
        epoch = max(first, math.floor(epoch))
    progress = (epoch - first) / (epochs - first)
    left = (1 - progress) ** power if sched == 'poly' else 0.5 * (1 + math.cos(math.pi * progress))
    return ramp * (min_lr + (lr - min_lr) * left)


def accumulation(args: argparse.Namespace) -> int:
    """Forwards per optimiser step, from --accum_iter or solved from --effective_batch_size."""
    per_forward = args.batch_size * dist.place().world_size
    if args.effective_batch_size is None:
        return args.accum_iter
    if args.effective_batch_size % per_forward:
        recipe = of_recipe(args, 'effective_batch_size')
        hint = recipe and '; --accum_iter N or another --effective_batch_size replaces it'
        raise UserError(
            f'--effective_batch_size {args.effective_batch_size}{recipe} is not a multiple of '
            f'batch {args.batch_size} x ranks {dist.place().world_size} = {per_forward}{hint}'
        )
    solved = args.effective_batch_size // per_forward
    if args.accum_iter not in (1, solved):
        raise UserError(
            f'--accum_iter {args.accum_iter} contradicts --effective_batch_size {args.effective_batch_size}, '
            f'which at {per_forward} images a forward needs {solved}'
        )
    return solved


def scaled_lr(args: argparse.Namespace, accum_iter: int) -> tuple[float, str]:
    """The learning rate, and the line that says where it comes from."""
    ranks = dist.place().world_size
    batch = args.batch_size * accum_iter * ranks
    batches = f'batch {args.batch_size} x accum {accum_iter} x ranks {ranks} = {batch}'
    if args.lr is not None and getattr(args, 'lr_batch', None):
        lr = args.lr * batch / args.lr_batch
        return lr, f'{batches}, lr = {args.lr:g} x {batch} / {args.lr_batch} = {lr:g}'
    if args.lr is not None:
        return args.lr, f'{batches}, lr = {args.lr:g} as given'
    lr = args.blr * batch / 256
    return lr, f'{batches}, lr = blr {args.blr:g} x {batch} / 256 = {lr:g}'


def schedule(args: argparse.Namespace, lr: float) -> Callable[..., float]:
    """`learning_rate` as a run's arguments have it, a function of the fractional epoch; `lr=` replaces its peak."""
    return partial(
        learning_rate,
        lr=lr,
        epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        warmup_lr_ratio=args.warmup_lr_ratio,
        warmup_shape=args.warmup_shape,
        min_lr=args.min_lr,
        sched=args.lr_sched,
        cosine_start=args.cosine_start,
        decay_epochs=tuple(args.lr_decay_epochs),
        decay_rate=args.lr_decay_rate,
        per_epoch=args.sched_per_epoch,
        power=getattr(args, 'lr_power', 1.0),
    )


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Take over the moments of a saved state, parameter by parameter; the groups and their options stay as they are.

    A step counter that groups share (LAMB's) is taken over too; moments get their parameters' memory format.
    """
    own = optimizer.state_dict()
    index = {n: i for group in saved['param_groups'] for n, i in zip(group['names'], group['params'], strict=True)}
    names = {i: n for group in own['param_groups'] for n, i in zip(group['names'], group['params'], strict=True)}
    state = {i: saved['state'][index[name]] for i, name in names.items() if index.get(name) in saved['state']}
    if counters := [int(group['step']) for group in saved['param_groups'] if 'step' in group]:
        own['param_groups'] = [group | {'step': max(counters)} for group in own['param_groups']]
    optimizer.load_state_dict({'state': state, 'param_groups': own['param_groups']})
    for param, values in optimizer.state.items():
        for key, value in values.items():
            if value.shape == param.shape and value.stride() != param.stride():
                values[key] = torch.empty_like(param).copy_(value)


class GuardedOptimizer:
    """Backward, clip and step, such that a loss or gradient that is not finite never reaches the weights.

    Everything is decided on the device. A loss that is not finite makes its gradients NaN, and the gradient reduction
    carries that to every rank, so all skip the same step. BatchNorm's running statistics, which the forward has changed
    by then, go back to what they were (but for their count of batches, which nothing reads).

    More than `allowed` bad steps in a row trip the guard: from then on every step counts as bad, so that whenever the
    host reads the streak, weights, moments and running statistics are those from before it. Default: `PATIENCE`, or
    under fp16, whose loss scale searches by overflow, `FP16_PATIENCE`.
    """

    PATIENCE, FP16_PATIENCE = 3, 20

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        fp16: bool,
        clip_grad: float | None,
        max_bad_steps: int | None = None,
    ):
        self.inner = optimizer
        self.moments = len(getattr(optimizer, 'moments', ('exp_avg', 'exp_avg_sq')))  # that it holds of a parameter
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.clip_grad = clip_grad
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        patience = self.FP16_PATIENCE if fp16 else self.PATIENCE
        self.allowed = patience if max_bad_steps is None else max_bad_steps
        self.streak = torch.zeros((), device=device)  # bad steps in a row
        self.total = torch.zeros((), device=device)  # bad steps of the run
        self.skipped = torch.zeros((), device=device)  # 1 if the latest step was bad
        self.scale = torch.ones((), device=device)  # of the loss; of the latest step, until the guard is tripped
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
        self.running = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
        self.keep_running()

    def set_lr(self, lr: float, floor: float = 0.0) -> None:
        """Give each group its share of the learning rate; only what lies above `floor` is scaled."""
        for group in self.inner.param_groups:
            group['lr'] = floor + (lr - floor) * group['lr_scale']

    def keep_running(self) -> None:
        """Remember the running statistics, which bad steps put back."""
        self.kept = [buffer.clone() for buffer in self.running]

    def backward(self, loss: Tensor) -> None:
        good = loss.detach().isfinite() & (self.streak <= self.allowed)
        poison = torch.where(good, 1.0, torch.nan)
        self.scaler.scale(loss * poison).backward()

    def step(self) -> Tensor:
        """Apply the accumulated gradients, if they are finite, and clear them. Returns their norm before clipping."""
        self.scaler.unscale_(self.inner)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        skip = ~norm.isfinite()
        bad = skip.float()
        if self.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(self.params, self.clip_grad, norm)
        # torch's fused kernels, and `SkipsSteps`, leave weights and state alone where this is 1. Not by `scaler.step`,
        # which would go by its own finding: that misses a norm that overflows, and what a scale of 0 makes of gradients
        self.inner.found_inf = bad
        self.inner.step()
        scale = self.scaler.scale(torch.ones_like(self.scale))
        self.scale = torch.where(self.streak > self.allowed, self.scale, scale)
        self.scaler.update()
        self.inner.zero_grad(set_to_none=True)
        if self.running:
            self.kept = [torch.where(skip, *pair) for pair in zip(self.kept, self.running, strict=True)]
            torch._foreach_copy_(self.running, self.kept)
        self.streak = (self.streak + 1) * bad
        self.total = self.total + bad
        self.skipped = bad
        return norm

    def counts(self) -> dict[str, int]:
        """Bad steps: in a row until now, and of the whole run. Waits for the device."""
        streak, total = torch.stack([self.streak, self.total]).int().tolist()
        return {'streak': streak, 'bad_steps': total}

    def state(self) -> dict:
        """What a checkpoint holds of it. Waits for the device."""
        return {'optimizer': self.inner.state_dict(), 'scaler': self.scaler.state_dict(), 'guard': self.counts()}

    def restore(self, saved: dict) -> None:
        """Take over the `state` in a checkpoint, once the model has its weights.

        A streak of bad steps that is longer than this run allows ends it at the next bad step, not before.
        """
        self.keep_running()
        load_optimizer_state(self.inner, saved['optimizer'])
        if saved['scaler']:
            self.scaler.load_state_dict(saved['scaler'])
        if 'guard' in saved:
            self.streak.fill_(min(saved['guard']['streak'], self.allowed))
            self.total.fill_(saved['guard']['bad_steps'])

    def loss_scale(self) -> float | None:
        """Of the latest step, or of the one that tripped the guard; None but under fp16. Waits for the device."""
        return self.scale.item() if self.scaler.is_enabled() else None


def adamw(groups: list[dict], lr: float, betas: tuple[float, float], eps: float | None = None) -> torch.optim.AdamW:
    """Fused AdamW: it can skip a step on the device, which `GuardedOptimizer` relies on. Default `eps` 1e-8."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8 if eps is None else eps, fused=True)


def lamb(groups: list[dict], lr: float, betas: tuple[float, float], eps: float | None = None) -> 'Lamb':
    """LAMB without a clipping of its own, and without trust ratio where nothing decays. Default `eps` 1e-6."""
    return Lamb(groups, lr=lr, betas=betas, eps=1e-6 if eps is None else eps, max_grad_norm=None)


def lars(groups: list[dict], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float | None = None) -> 'Lars':
    """LARS as MAE's linear probe has it: trust ratio 0.001 for weights of more than one axis, none for others.

    Its momentum is the first of `betas`. Default `eps` 1e-8, below the trust ratio. Raises UserError for groups that
    decay: timm's ratio is not MAE's then.
    """
    split = []
    for group in groups:
        check_decay('lars', group.get('weight_decay', 0.0))
        for adapt in (True, False):
            places = [place for place, param in enumerate(group['params']) if (param.ndim > 1) == adapt]
            kept = {key: [group[key][place] for place in places] for key in ('params', 'names') if key in group}
            split += [{**group, **kept, 'always_adapt': adapt}] if places else []
    return Lars(split, lr=lr, momentum=betas[0], trust_coeff=0.001, eps=1e-8 if eps is None else eps)


def sgd(groups: list[dict], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float | None = None) -> 'Sgd':
    """torch's SGD, whose momentum is the first of `betas` and whose weight decay is part of the gradient."""
    return Sgd(groups, lr=lr, momentum=betas[0], fused=True)


def check_decay(name: str, weight_decay: float) -> None:
    """Raise UserError if the optimiser of this name cannot have the decay."""
    if name == 'lars' and weight_decay:
        raise UserError(f'--opt lars has no weight decay: give --weight_decay 0, got {weight_decay:g}')


OPTIMIZERS = {'adamw': adamw, 'lamb': lamb, 'lars': lars, 'sgd': sgd}


class Sgd(torch.optim.SGD):
    """torch's fused SGD, with momentum from the start: else the first step makes it, of nothing if it is a bad one."""

    moments = ('momentum_buffer',)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for group in self.param_groups:
            for param in group['params']:
                self.state[param] = {'momentum_buffer': torch.zeros_like(param)}


class SkipsSteps:
    """What makes an optimiser of timm's skip a step on the device, where `found_inf` is 1.

    Such a step is taken and undone: weights and moments are copied before it and put back after it. That is room for
    three copies of the weights, at a time when activations have none, and one more pass over them.
    """

    moments: tuple[str, ...]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.found_inf: Tensor | None = None
        for param in self.params():  # made before the first step, which may be a bad one
            self.state[param] = {name: torch.zeros_like(param) for name in self.moments}

    def params(self) -> list[nn.Parameter]:
        return [param for group in self.param_groups for param in group['params']]

    @torch.no_grad()
    def step(self, closure=None):
        tensors = [tensor for param in self.params() for tensor in (param, *self.state[param].values())]
        before = [tensor.clone() for tensor in tensors]
        result = super().step(closure)
        if self.found_inf is not None:
            for tensor, old in zip(tensors, before, strict=True):
                torch.where(self.found_inf > 0, old, tensor, out=tensor)
        return result


class Lars(SkipsSteps, timm_optim.Lars):
    """timm's LARS, which also skips a step on the device."""

    moments = ('momentum_buffer',)


class Lamb(SkipsSteps, timm_optim.Lamb):
    """timm's LAMB, which also skips a step on the device.

    The step counter of the bias correction lives on the host and is put right when the state is saved.
    """

    moments = ('exp_avg', 'exp_avg_sq')
    skipped: Tensor | int = 0  # steps that the counter has too many

    def step(self, closure=None):
        result = super().step(closure)
        if self.found_inf is not None:
            self.skipped = self.skipped + self.found_inf
        return result

    def state_dict(self) -> dict:
        """As ever, less the steps that were skipped. Waits for the device."""
        for group in self.param_groups:
            if 'step' in group:
                group['step'] -= int(self.skipped)
        self.skipped = 0
        return super().state_dict()


class WeightAverage(ModelEmaV3):
    """timm's average of a network's weights; buffers, such as BatchNorm's running statistics, are the latest.

    Its decay grows to `decay`: at step t from 0 as min(decay, (1 + t) / (10 + t)), or, given `warmup_steps` T, linearly
    from `warmup_ratio` of it, decay * (1 - (1 - t / T) (1 - warmup_ratio)) before step T.
    """

    def __init__(self, model: nn.Module, decay: float, warmup_steps: float = 0, warmup_ratio: float = 0.9):
        super().__init__(model, decay=decay, exclude_buffers=True)
        self.warmup_steps, self.warmup_ratio = warmup_steps, warmup_ratio

    def get_decay(self, step: int) -> float:
        if not self.warmup_steps:
            return min(self.decay, (1 + step) / (10 + step))
        return self.decay * (1 - max(0.0, 1 - step / self.warmup_steps) * (1 - self.warmup_ratio))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, skipped: Tensor) -> None:
        """Move towards the weights after optimiser step `step`, unless it was skipped (1 or 0, on the device).

        A skipped step leaves no trace: if the average moved while the weights stand still, it would depend on how late
        the host learns that the run has diverged.
        """
        share = (1 - self.get_decay(step)) * (1 - skipped)
        averages, weights = list(self.module.parameters()), list(model.parameters())
        ahead = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(ahead, share)
        torch._foreach_add_(averages, ahead)
        for own, latest in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(latest)
