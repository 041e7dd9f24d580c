"""Parameter groups from a model's rules, learning rates as a function of the epoch, and the guarded optimiser step."""

import math

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

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
    min_lr: float = 0.0,
    sched: str = 'cosine',
    decay_epochs: tuple[int, ...] = (),
    decay_rate: float = 0.1,
    per_epoch: bool = False,
) -> float:
    """The learning rate at a fractional epoch: linear warm-up per iteration, then a half-cosine to `min_lr`, or steps.

    `per_epoch` holds the rate after the warm-up constant within an epoch.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    if per_epoch:
        epoch = math.floor(epoch)
    if sched == 'step':
        return lr * decay_rate ** sum(epoch >= boundary for boundary in decay_epochs)
    progress = max(0.0, epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Take over the moments of a saved state, parameter by parameter; the groups and their options stay as they are."""
    own = optimizer.state_dict()
    place = {n: i for group in saved['param_groups'] for n, i in zip(group['names'], group['params'], strict=True)}
    names = {i: n for group in own['param_groups'] for n, i in zip(group['names'], group['params'], strict=True)}
    state = {i: saved['state'][place[name]] for i, name in names.items() if place.get(name) in saved['state']}
    optimizer.load_state_dict({'state': state, 'param_groups': own['param_groups']})


class GuardedStep:
    """Backward, clip and step, such that a non-finite loss or gradient never reaches the weights.

    Everything is decided on the device. A non-finite loss makes all of its gradients NaN, and the gradient reduction
    carries that to every rank, so all leave out the same step. `check` reads the count when the host waits anyway.
    fp16 has a dynamic loss scale, for which overflow is normal: there only a run of `FP16_PATIENCE` bad steps counts.
    """

    FP16_PATIENCE = 20

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        fp16: bool,
        clip_grad: float | None,
    ):
        self.optimizer = optimizer
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.clip_grad = clip_grad
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.allowed = self.FP16_PATIENCE if fp16 else 0
        self.streak = torch.zeros((), device=device)  # bad steps in a row
        self.longest = torch.zeros((), device=device)
        self.steps = 0
        self.first_bad = torch.full((), -1, device=device)  # which of them

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group['lr'] = lr * group['lr_scale']

    def backward(self, loss: Tensor) -> None:
        poison = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        self.scaler.scale(loss * poison).backward()

    def step(self) -> Tensor:
        """Apply the accumulated gradients, if they are finite, and clear them. Returns their norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        bad = (~norm.isfinite()).float()
        if self.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(self.params, self.clip_grad, norm)
        self.optimizer.found_inf = bad  # torch's fused kernels leave weights and state alone where this is 1
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.streak = (self.streak + 1) * bad
        self.longest = torch.maximum(self.longest, self.streak)
        self.first_bad = torch.where((self.first_bad < 0) & (bad > 0), self.steps, self.first_bad)
        self.steps += 1
        return norm

    def check(self, epoch: int, step: int, steps: int) -> None:
        """Raise FloatingPointError if too many steps in a row were bad, after `step` steps of `epoch`. Syncs."""
        if (bad := int(self.longest)) > self.allowed:
            first = epoch * steps + step - (self.steps - int(self.first_bad))
            raise FloatingPointError(
                f'epoch {first // steps}, step {first % steps + 1} of {steps}: loss or gradient was not finite '
                f'(up to {bad} such steps in a row); no such step changed a weight'
            )


def adamw(groups: list[dict], lr: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW: it can leave out a step on the device, which `GuardedStep` relies on."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def make_ema(model: nn.Module, decay: float) -> ModelEmaV3:
    """timm's average of the weights, started from them; decay min(decay, (1 + t) / (10 + t)) at step t from 0."""
    return ModelEmaV3(model, decay=decay, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)


def update_ema(ema: ModelEmaV3, model: nn.Module, step: int) -> None:
    """Average in the weights after optimiser step `step`; timm counts its steps from two later."""
    ema.update(model, step=step + 2)
