"""Variance schedules: pure functions from a number of steps T to betas, (T,) float64 in (0, 1).

beta_t is the variance added by step t of the forward process: q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)
(Ho et al. 2020, eq. 2), and alpha_bar_t = prod_{s <= t} (1 - beta_s). `from_alpha_bar` converts alpha_bar(u),
u = t / T, to betas. `snr_shift` and `zero_terminal_snr` transform betas.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MIN_STEPS, MAX_STEPS = 10, 10_000


def linear(num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02, max_beta: float = 0.999) -> Tensor:
    """Return betas linear in t, their ends scaled by 1000 / T so that every T ends in noise.

    Source: Ho et al. 2020 (arXiv 2006.11239), sec. 4; the scaling is from the code of Nichol & Dhariwal 2021.
    """
    _check_steps(num_steps)
    scale = 1000 / num_steps
    betas = torch.linspace(scale * beta_start, scale * beta_end, num_steps, dtype=torch.float64)
    return check_betas(betas.clamp(max=max_beta))


def quadratic(num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Return betas whose square roots are linear in t; the ends do not depend on T.

    Source: "quad" in the code of Ho et al. 2020; "scaled_linear" in latent diffusion (arXiv 2112.10752).
    """
    _check_steps(num_steps)
    if beta_start < 0 or beta_end < 0:
        name, value = ("beta_start", beta_start) if beta_start < 0 else ("beta_end", beta_end)
        raise ValueError(f"schedule.{name}={value} must be positive; 1e-4 and 0.02 are usual")
    return check_betas(torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64).square())


def cosine(num_steps: int, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """Return the betas of alpha_bar(u) = cos^2(pi/2 (u + s) / (1 + s)), s = `offset`.

    Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17.
    """

    def alpha_bar(u: Tensor) -> Tensor:
        return torch.cos((u + offset) / (1 + offset) * math.pi / 2).square()

    return from_alpha_bar(alpha_bar, num_steps, max_beta)


def sigmoid_jabri(
    num_steps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0, max_beta: float = 0.999
) -> Tensor:
    """Return the betas of an alpha_bar that is a sigmoid of u over [start, end] with temperature `tau`.

    Source: Jabri et al. 2022 (arXiv 2212.11972), alg. 1.
    """
    if not start < end or tau <= 0:
        raise ValueError(f"schedule.start={start} must be below schedule.end={end}, and schedule.tau={tau} positive")
    first, last = torch.tensor([start, end], dtype=torch.float64).div(tau).sigmoid()

    def alpha_bar(u: Tensor) -> Tensor:
        fall: Tensor = (last - torch.sigmoid((u * (end - start) + start) / tau)) / (last - first)
        return fall

    return from_alpha_bar(alpha_bar, num_steps, max_beta)


def sigmoid_geodiff(num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Return betas that follow a sigmoid over [-6, 6] from `beta_start` to `beta_end`.

    Source: Xu et al. 2022 (GeoDiff, arXiv 2203.02923); "sigmoid" in diffusers.
    """
    _check_steps(num_steps)
    rise = torch.linspace(-6, 6, num_steps, dtype=torch.float64).sigmoid()
    return check_betas(beta_start + (beta_end - beta_start) * rise)


def constant(num_steps: int, beta: float = 0.02) -> Tensor:
    """Return the same beta for every step: alpha_bar_t = (1 - beta)^t.

    Source: "const" in the code of Ho et al. 2020.
    """
    _check_steps(num_steps)
    return check_betas(torch.full((num_steps,), beta, dtype=torch.float64))


def inverse(num_steps: int, max_beta: float = 0.999) -> Tensor:
    """Return betas 1/T, 1/(T-1), ..., 1, capped at `max_beta`: alpha_bar decreases linearly to 0.

    Source: Sohl-Dickstein et al. 2015 (arXiv 1503.03585), sec. 2.4.1.
    """
    _check_steps(num_steps)
    betas = 1 / torch.arange(num_steps, 0, -1, dtype=torch.float64)
    return check_betas(betas.clamp(max=max_beta))


def exponential(num_steps: int, rate: float = 12.0, max_beta: float = 0.999) -> Tensor:
    """Return the betas of alpha_bar(u) = exp(-rate u): every beta is 1 - exp(-rate / T). Source: "exp" in diffusers."""
    return from_alpha_bar(lambda u: torch.exp(-rate * u), num_steps, max_beta)


def laplace(num_steps: int, mu: float = 0.0, scale: float = 0.5, power: float = 0.5, max_beta: float = 0.999) -> Tensor:
    """Return the betas whose log-SNR is Laplace-distributed for uniform u: most steps are near SNR = 1.

    lambda(u) = mu - scale sgn(1/2 - u) log(1 - 2 |u - 1/2|) and alpha_bar = sigmoid(lambda)^power. The paper has
    power = 1; the default 1/2 is that of diffusers.

    Source: Hang et al. 2024 (arXiv 2407.03297), tab. 1.
    """
    if scale <= 0 or power <= 0:
        name, value = ("scale", scale) if scale <= 0 else ("power", power)
        raise ValueError(f"schedule.{name}={value} must be positive; 0.5 is usual")

    def alpha_bar(u: Tensor) -> Tensor:
        # 1e-6, as in diffusers, keeps lambda finite at both ends.
        tail = torch.log(1 - 2 * (0.5 - u).abs() + 1e-6)
        sign = torch.where(u <= 0.5, 1.0, -1.0).double()
        return torch.sigmoid(mu - scale * sign * tail) ** power

    return from_alpha_bar(alpha_bar, num_steps, max_beta)


def custom(betas: Sequence[float]) -> Tensor:
    """Return the given betas as a tensor; T is their number."""
    if not MIN_STEPS <= len(betas) <= MAX_STEPS:
        raise ValueError(
            f"schedule.betas has {len(betas)} numbers and must have {MIN_STEPS} to {MAX_STEPS}, one per step"
        )
    if wrong := [beta for beta in betas if not 0 < beta < 1]:  # also catches NaN
        raise ValueError(f"schedule.betas contains {wrong[0]:g}; each number must be in (0, 1)")
    return torch.tensor(betas, dtype=torch.float64)


def from_alpha_bar(alpha_bar: Callable[[Tensor], Tensor], num_steps: int, max_beta: float = 0.999) -> Tensor:
    """Return beta_t = 1 - alpha_bar((t + 1) / T) / alpha_bar(t / T), capped at `max_beta`.

    Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), sec. 3.2.
    """
    _check_steps(num_steps)
    if not 0 < max_beta < 1:
        raise ValueError(f"schedule.max_beta={max_beta} must be in (0, 1); 0.999 is usual")
    table = alpha_bar(torch.arange(num_steps + 1, dtype=torch.float64) / num_steps)
    return check_betas((1 - table[1:] / table[:-1]).clamp(max=max_beta))


def snr_shift(betas: Tensor, factor: float) -> Tensor:
    """Multiply the SNR of every step by factor^2: betas (T,) -> (T,).

    A larger image keeps more of its content under the same noise, since neighboring pixels are alike. The factor
    64 / image size restores the noise on its coarse structure.

    Source: Hoogeboom et al. 2023 (arXiv 2301.11093).
    """
    if factor <= 0:
        raise ValueError(f"snr_shift={factor} must be positive; 64 / image size is usual, 1 has no effect")
    log_alpha_bar = torch.log1p(-betas).cumsum(0)
    snr = torch.exp(log_alpha_bar) / -torch.expm1(log_alpha_bar) * factor**2
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), snr / (1 + snr)])
    return check_betas(1 - alpha_bar[1:] / alpha_bar[:-1])


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Make the last step pure noise, alpha_bar_T = 0 and beta_T = 1: betas (T,) -> (T,) in (0, 1].

    Shift sqrt(alpha_bar) to end at 0 and scale it to keep its first value.

    Source: Lin et al. 2023 (arXiv 2305.08891), alg. 1.
    """
    alpha = torch.cumprod(1 - betas, 0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), alpha.square()])
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


def check_betas(betas: Tensor) -> Tensor:
    """Return `betas`; raise ValueError unless all of them are in (0, 1)."""
    low, high = betas.min().item(), betas.max().item()
    if not (low > 0 and high < 1):  # also catches NaN
        raise ValueError(f"schedule: betas in [{low:.4g}, {high:.4g}] must be in (0, 1); change its arguments")
    return betas


def _check_steps(num_steps: int) -> None:
    if not MIN_STEPS <= num_steps <= MAX_STEPS:
        raise ValueError(
            f"schedule.num_steps={num_steps} must be in [{MIN_STEPS}, {MAX_STEPS}]; 1000 is usual "
            "(sampler.steps sets the number of sampling steps)"
        )
