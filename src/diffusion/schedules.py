"""Variance schedules: pure functions from a number of steps to betas, (T,) float64, strictly inside (0, 1).

beta_t is the variance that step t of the forward chain adds: q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1},
beta_t I) (Ho et al. 2020, eq. 2); alpha_bar_t = prod_{s <= t} (1 - beta_s). Schedules that are defined by
alpha_bar as a function of u = t / T become betas by `from_alpha_bar`. Two transforms, `snr_shift` and
`zero_terminal_snr`, take betas and give betas.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MIN_STEPS, MAX_STEPS = 10, 10_000


def linear(num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02, max_beta: float = 0.999) -> Tensor:
    """beta linear in t (Ho et al. 2020, sec. 4), its ends rescaled by 1000 / T so that any T reaches noise.

    The rescaling is Nichol & Dhariwal's (2021, released code); at T = 1000 it does nothing.
    """
    _check_steps(num_steps)
    scale = 1000 / num_steps
    betas = torch.linspace(scale * beta_start, scale * beta_end, num_steps, dtype=torch.float64)
    return check_betas(betas.clamp(max=max_beta))


def quadratic(num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """sqrt(beta) linear in t: "quad" of Ho et al.'s code, "scaled_linear" of latent diffusion (2112.10752).

    The ends are taken as they are, whatever T.
    """
    _check_steps(num_steps)
    if beta_start < 0 or beta_end < 0:
        raise ValueError(
            f"beta_start and beta_end must be positive, got {beta_start} and {beta_end}: raise schedule.beta_start"
        )
    return check_betas(torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64).square())


def cosine(num_steps: int, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """alpha_bar(u) = cos^2(pi/2 (u + s) / (1 + s)), s = `offset` (Nichol & Dhariwal 2021, eq. 17)."""

    def alpha_bar(u: Tensor) -> Tensor:
        return torch.cos((u + offset) / (1 + offset) * math.pi / 2).square()

    return from_alpha_bar(alpha_bar, num_steps, max_beta)


def sigmoid_jabri(
    num_steps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0, max_beta: float = 0.999
) -> Tensor:
    """alpha_bar a sigmoid of u between `start` and `end`, temperature `tau` (Jabri et al., 2212.11972, alg. 1)."""
    if not start < end or tau <= 0:
        raise ValueError(f"needs start < end and tau > 0, got {start}, {end}, {tau}: change schedule.start or .tau")
    first, last = torch.tensor([start, end], dtype=torch.float64).div(tau).sigmoid()

    def alpha_bar(u: Tensor) -> Tensor:
        fall: Tensor = (last - torch.sigmoid((u * (end - start) + start) / tau)) / (last - first)
        return fall

    return from_alpha_bar(alpha_bar, num_steps, max_beta)


def sigmoid_geodiff(num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """beta a sigmoid of t over [-6, 6], from `beta_start` to `beta_end` (GeoDiff, 2203.02923; diffusers)."""
    _check_steps(num_steps)
    rise = torch.linspace(-6, 6, num_steps, dtype=torch.float64).sigmoid()
    return check_betas(beta_start + (beta_end - beta_start) * rise)


def constant(num_steps: int, beta: float = 0.02) -> Tensor:
    """The same beta at every step ("const" of Ho et al.'s code): alpha_bar_t = (1 - beta)^t."""
    _check_steps(num_steps)
    return check_betas(torch.full((num_steps,), beta, dtype=torch.float64))


def inverse(num_steps: int, max_beta: float = 0.999) -> Tensor:
    """beta = 1/T, 1/(T-1), ..., 1 (Sohl-Dickstein et al. 2015, sec. 2.4.1): alpha_bar falls linearly to 0.

    The last beta, 1, is capped at `max_beta`.
    """
    _check_steps(num_steps)
    betas = 1 / torch.arange(num_steps, 0, -1, dtype=torch.float64)
    return check_betas(betas.clamp(max=max_beta))


def exponential(num_steps: int, rate: float = 12.0, max_beta: float = 0.999) -> Tensor:
    """alpha_bar(u) = exp(-rate u) ("exp" of the diffusers library): every beta is 1 - exp(-rate / T)."""
    return from_alpha_bar(lambda u: torch.exp(-rate * u), num_steps, max_beta)


def laplace(num_steps: int, mu: float = 0.0, scale: float = 0.5, power: float = 0.5, max_beta: float = 0.999) -> Tensor:
    """log-SNR Laplace-distributed over uniform u (Hang et al., 2407.03297, tab. 1): most steps near SNR = 1.

    lambda(u) = mu - scale sgn(1/2 - u) log(1 - 2 |u - 1/2|), alpha_bar = sigmoid(lambda)^power. The paper's
    own alpha_bar has power = 1; the diffusers library takes the square root, which is the default here.
    """
    if scale <= 0 or power <= 0:
        raise ValueError(f"scale and power must be positive, got {scale} and {power}: raise schedule.scale or .power")

    def alpha_bar(u: Tensor) -> Tensor:
        # 1e-6 keeps lambda finite at both ends, as in the diffusers library.
        tail = torch.log(1 - 2 * (0.5 - u).abs() + 1e-6)
        sign = torch.where(u <= 0.5, 1.0, -1.0).double()
        return torch.sigmoid(mu - scale * sign * tail) ** power

    return from_alpha_bar(alpha_bar, num_steps, max_beta)


def custom(betas: Sequence[float]) -> Tensor:
    """The betas as they are given; T is their number."""
    _check_steps(len(betas))
    return check_betas(torch.tensor(betas, dtype=torch.float64))


def from_alpha_bar(alpha_bar: Callable[[Tensor], Tensor], num_steps: int, max_beta: float = 0.999) -> Tensor:
    """beta_t = 1 - alpha_bar((t + 1) / T) / alpha_bar(t / T), capped (Nichol & Dhariwal 2021, sec. 3.2)."""
    _check_steps(num_steps)
    if not 0 < max_beta < 1:
        raise ValueError(f"max_beta must lie in (0, 1), got {max_beta}: 0.999 is usual")
    table = alpha_bar(torch.arange(num_steps + 1, dtype=torch.float64) / num_steps)
    return check_betas((1 - table[1:] / table[:-1]).clamp(max=max_beta))


def snr_shift(betas: Tensor, factor: float) -> Tensor:
    """Multiply the SNR of every step by factor^2 (Hoogeboom et al., 2301.11093; factor = 64 / image size).

    A larger image keeps more of its content under the same noise, since neighbouring pixels agree; shifting the
    schedule down restores the noise that its coarse structure sees. betas (T,) -> (T,).
    """
    if factor <= 0:
        raise ValueError(f"snr_shift must be positive, got {factor}: 64 / image size is usual, 1 changes nothing")
    log_alpha_bar = torch.log1p(-betas).cumsum(0)
    snr = torch.exp(log_alpha_bar) / -torch.expm1(log_alpha_bar) * factor**2
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), snr / (1 + snr)])
    return check_betas(1 - alpha_bar[1:] / alpha_bar[:-1])


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Make the last step pure noise: alpha_bar_T = 0, so that beta_T = 1 (Lin et al., 2305.08891, alg. 1).

    sqrt(alpha_bar) is shifted to end at 0 and scaled to keep its first value. betas (T,) -> (T,) in (0, 1].
    """
    alpha = torch.cumprod(1 - betas, 0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), alpha.square()])
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


def check_betas(betas: Tensor) -> Tensor:
    """`betas`, if they all lie strictly inside (0, 1). Raises ValueError otherwise."""
    low, high = betas.min().item(), betas.max().item()
    if not (low > 0 and high < 1):  # also catches NaN
        raise ValueError(
            f"betas must lie strictly inside (0, 1), got [{low:.4g}, {high:.4g}]: change the schedule's parameters"
        )
    return betas


def _check_steps(num_steps: int) -> None:
    if not MIN_STEPS <= num_steps <= MAX_STEPS:
        raise ValueError(
            f"num_steps must lie in [{MIN_STEPS}, {MAX_STEPS}], got {num_steps}: "
            "set schedule.num_steps (1000 is usual; fewer steps at sampling are sampler.steps)"
        )
