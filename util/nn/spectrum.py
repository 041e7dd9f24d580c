"""Fourier spectra of images, as losses and as pictures: pure tensor functions, no state."""

import torch
from torch import Tensor


def half_spectrum(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Real maps [..., H, W] -> their orthonormal 2-D spectrum [..., H, W // 2 + 1], complex; weights [W // 2 + 1].

    The spectrum of a real map is symmetric, so half of its columns are enough. The weights, of mean 1, count each
    column as often as the whole spectrum has it: the mean of half * weights is the mean over the whole.
    """
    width = maps.shape[-1]
    spectrum = torch.fft.rfft2(maps, norm='ortho')
    counts = torch.full((spectrum.shape[-1],), 2.0, device=maps.device)
    counts[0].fill_(1.0)  # an assignment would copy the number from the host, which waits for the GPU
    if width % 2 == 0:
        counts[-1].fill_(1.0)
    return spectrum, counts / width * spectrum.shape[-1]


def focal_frequency_loss(
    difference: Tensor,
    alpha: float = 1.0,
    ave_spectrum: bool = True,
    log_matrix: bool = True,
    batch_matrix: bool = True,
) -> Tensor:
    """Squared spectral distance, weighted by itself (Jiang et al., ICCV 2021).

    difference: prediction - target, [N, C, H, W] -> scalar. A frequency of distance d has the weight
    log(1 + d ** alpha), or d ** alpha without `log_matrix`, scaled to a maximum of 1; gradients do not pass through it.
    The maximum is that of all weights with `batch_matrix`, else that of each channel of each spectrum (which the
    published code cannot run).

    `ave_spectrum` compares the means of the batch's spectra. The Fourier transform is linear, so their difference is
    the spectrum of the mean difference: one image is transformed, not 2 N.
    """
    if ave_spectrum:
        difference = difference.mean(dim=0, keepdim=True)
    spectrum, counts = half_spectrum(difference)
    squares = spectrum.real**2 + spectrum.imag**2
    weights = squares.detach() ** (alpha / 2)
    if log_matrix:
        weights = weights.log1p()
    weights = weights / weights.amax(dim=None if batch_matrix else (-2, -1), keepdim=True)
    weights = weights.nan_to_num(0.0).clamp(0.0, 1.0)  # equal images: 0 / 0
    return (weights * squares * counts).mean()


def log_amplitude(imgs: Tensor) -> Tensor:
    """[N, 3, S, S] -> [N, S * S], averaged over colours, the zero frequency in the middle."""
    amplitude = torch.fft.fftshift(torch.fft.fft2(imgs.float(), norm='ortho').abs(), dim=(2, 3))
    return (amplitude + 1e-6).log().mean(dim=1).flatten(1)


def draw_spectrum(imgs: Tensor, like: Tensor) -> Tensor:
    """[N, 3, S, S] -> log amplitudes as grays of that shape, low frequencies in the middle.

    The darkest and brightest frequency of `like`, also [N, 3, S, S], become -2 and 2, about the range of normalised
    colours.
    """
    low, high = log_amplitude(like).aminmax(dim=1, keepdim=True)
    gray = (log_amplitude(imgs) - low) / (high - low) * 4 - 2
    return gray.view(-1, 1, *imgs.shape[2:]).expand_as(imgs)
