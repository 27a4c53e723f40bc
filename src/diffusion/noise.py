"""Noise levels, and the two types of schedules that define them.

A schedule maps u in [0, 1] to (alpha, sigma), from clean data to noise, and divides [0, 1] into transitions.
`NoiseSchedule` is a table of betas, and training uses its rows; `ContinuousSchedule` is a function of any u.
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

Spacing = Literal["trailing", "leading", "linspace", "karras", "log_snr"]

# sigma_max and rho of EDM's time grid (Karras et al. 2022, tab. 1).
MAX_RATIO = 80.0
KARRAS_RHO = 7.0


class DefaultSpacing(NamedTuple):
    """The default spacings of a sampler by type of schedule, as measured in docs/results.md."""

    table: Spacing  # for a table of betas
    curve: Spacing  # for a continuous schedule, unless it ends in pure noise: only `trailing` starts there

    def on(self, schedule: "Schedule") -> Spacing:
        if isinstance(schedule, NoiseSchedule):
            return self.table
        return "trailing" if terminal_alpha_bar(schedule) == 0 else self.curve


class NoiseLevel(NamedTuple):
    """x = alpha x_0 + sigma eps. Fields are scalars, or (B, 1, ..., 1) to broadcast against data (B, *data).

    `time` in [0, 1] is the input of the network: (t + 1) / T for row t of a table, 0 for clean data. Scalars are
    float64 on the CPU, which neither promote the dtype of data nor synchronize with a GPU.
    """

    alpha: Tensor
    sigma: Tensor
    time: Tensor

    @property
    def snr(self) -> Tensor:
        """alpha^2 / sigma^2, in the shape of the fields; infinite for clean data."""
        return (self.alpha / self.sigma).square()

    @property
    def ratio(self) -> Tensor:
        """sigma / alpha, EDM's sigma: infinite for pure noise."""
        return self.sigma / self.alpha

    @property
    def norm(self) -> Tensor:
        """sqrt(alpha^2 + sigma^2): the standard deviation of noised data of unit variance."""
        return torch.hypot(self.alpha, self.sigma)


class Transition(NamedTuple):
    """One of the `num_transitions` steps of the forward process, from level s to the noisier level t."""

    t: NoiseLevel
    s: NoiseLevel
    num_transitions: int


class Schedule(Protocol):
    """The interface of schedules."""

    num_steps: int
    first: float  # the position u of the cleanest noisy level
    decoder_scale: float  # the variance of the decoder p(x_0 | x_t) in units of (sigma / alpha)^2

    def row(self, t: int) -> NoiseLevel:
        """Return the scalar level t in [0, num_steps - 1], the noisier end of transition t, or clean data for -1."""

    def transition(self, v: Tensor, like: Tensor) -> Transition:
        """Return the transitions that contain v (B,) in [0, 1), as (B, 1, ..., 1) to broadcast against `like`.

        Transition t, between the levels t - 1 and t, contains [t / T, (t + 1) / T).
        """

    def level_at(self, v: Tensor, like: Tensor) -> NoiseLevel:
        """Return the levels at v (B,) in [0, 1), as (B, 1, ..., 1); a table rounds up to its next row."""

    def at(self, u: Tensor) -> list[NoiseLevel]:
        """Return the scalar levels at positions u (N,) float64 in [0, 1]."""

    def position(self, angle: Tensor) -> Tensor:
        """Return the positions (N,) where atan(sigma / alpha) equals `angle` (N,), float64."""

    def at_ratio(self, ratio: Tensor) -> NoiseLevel:
        """Return the scalar level where sigma / alpha equals the finite `ratio`, even beyond the noisiest level."""

    def log_snr_rate(self, time: Tensor) -> Tensor:
        """Return -d log SNR / d time at `time`, in its shape; a table uses central differences."""


class TimeGrid(tuple[NoiseLevel, ...]):
    """The scalar levels that a sampler visits, noisiest first, clean data last, and their schedule."""

    schedule: Schedule

    def __new__(cls, levels: Iterable[NoiseLevel], schedule: Schedule) -> "TimeGrid":
        grid = super().__new__(cls, levels)
        grid.schedule = schedule
        return grid


CLEAN = NoiseLevel(*torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))


def make_time_grid(schedule: Schedule, steps: int, spacing: Spacing | DefaultSpacing = "trailing") -> TimeGrid:
    """Return `steps` + 1 levels for a sampler, noisiest first, clean data last.

    - trailing: u from 1 to 0 in equal strides;
    - leading: u in multiples of 1 / steps up from `schedule.first`, which do not reach 1;
    - linspace: u from 1 to `schedule.first` inclusive, in equal strides;
    - karras: uniform in (sigma / alpha)^(1/7);
    - log_snr: uniform in log-SNR.

    The last two start at sigma / alpha = 80, or at the noisiest level if that is less, and end at `schedule.first`.

    Source: Lin et al. 2023 (arXiv 2305.08891), tab. 2, for the first three; Karras et al. 2022 (arXiv 2206.00364),
    eq. 5; Lu et al. 2022 (DPM-Solver, arXiv 2206.00927).
    """
    if steps < 1:
        raise ValueError(f"sampler.steps={steps} must be at least 1; 20 to 100 is usual")
    if isinstance(spacing, DefaultSpacing):
        spacing = spacing.on(schedule)
    count = torch.arange(steps, dtype=torch.float64)
    fraction = count / max(steps - 1, 1)
    first = schedule.first
    match spacing:
        case "trailing":
            u = (steps - count) / steps  # equals the positions of rows if `steps` divides their number
        case "leading":
            # Limit the stride, so that more steps than rows do not exceed u = 1.
            u = first + min(1 / steps, (1 - first) / max(steps - 1, 1)) * (steps - 1 - count)
        case "linspace":
            u = 1 - (1 - first) * fraction
        case "karras" | "log_snr":
            noisiest, cleanest = schedule.at(torch.tensor([1.0, first], dtype=torch.float64))
            high, low = min(noisiest.ratio.item(), MAX_RATIO), cleanest.ratio.item()
            if spacing == "karras":
                power = 1 / KARRAS_RHO
                ratio = (high**power + fraction * (low**power - high**power)).pow(KARRAS_RHO)
            else:
                ratio = torch.exp(math.log(high) + fraction * (math.log(low) - math.log(high)))
            u = schedule.position(ratio.atan()).clamp(first, 1)
        case _:
            raise ValueError(f"sampler.spacing={spacing} must be one of {', '.join(get_args(Spacing))}")
    return TimeGrid([*schedule.at(u), CLEAN], schedule)


class NoiseSchedule(nn.Module):
    """The T levels of betas (T,) in (0, 1], and clean data as the last row, so that index -1 is x_0.

    alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar) (Ho et al. 2020, eq. 4). `rows` has them in float64.
    Non-persistent float32 buffers follow the device but not the dtype.
    """

    alpha: Tensor
    sigma: Tensor
    time: Tensor
    rate: Tensor

    def __init__(self, betas: Tensor) -> None:
        super().__init__()
        betas = betas.double()
        if not (betas.min() > 0 and betas.max() <= 1):
            low, high = betas.min(), betas.max()
            raise ValueError(f"schedule: betas in [{low:.4g}, {high:.4g}] must be in (0, 1]; change its arguments")
        self.num_steps = len(betas)
        self.first = 1 / self.num_steps
        # The posterior variance at t = 1 is 0; use that at t = 2, (1 - alpha_bar_1) / (1 - alpha_bar_2) beta_2, as in
        # the code of Ho et al. 2020.
        b1, b2 = betas[0].item(), betas[min(1, len(betas) - 1)].item()
        self.decoder_scale = (1 - b1) * b2 / (b1 + b2 - b1 * b2)
        self.betas = betas
        # log1p and expm1: the difference 1 - alpha_bar cancels in the first steps.
        log_alpha_bar = torch.log1p(-betas).cumsum(0)
        alpha, sigma = torch.exp(log_alpha_bar / 2), torch.sqrt(-torch.expm1(log_alpha_bar))
        time = torch.arange(1, self.num_steps + 1, dtype=torch.float64) / self.num_steps
        rows = [torch.cat([table, clean[None]]) for table, clean in zip((alpha, sigma, time), CLEAN, strict=True)]
        self.rows = NoiseLevel(*rows)
        for name, table in zip(NoiseLevel._fields, rows, strict=True):
            self.register_buffer(name, table.float(), persistent=False)
        log_snr = 2 * (alpha.log() - sigma.log())
        finite = log_snr[log_snr.isfinite()]
        if len(finite) < 2:
            raise ValueError(f"schedule: {len(finite)} betas below 1 must be at least 2; add steps to schedule.betas")
        (rate,) = torch.gradient(-finite, spacing=1 / self.num_steps)
        # At pure noise and clean data, where log-SNR is infinite, use the rate of the neighboring row.
        rate = torch.cat([rate, rate[-1:].expand(self.num_steps - len(rate)), rate[:1]])
        self.register_buffer("rate", rate.float(), persistent=False)
        # Here clean data come first, so that the angle increases with the position.
        alpha, sigma = rows[0].roll(1), rows[1].roll(1)
        self._alpha, self._sigma, self._angle = alpha, sigma, torch.atan2(sigma, alpha)
        # pi / 2 - angle: near pure noise it keeps digits of alpha that the angle loses.
        self._complement = torch.atan2(alpha, sigma)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NoiseSchedule":
        # Move the buffers to the device of the network, but keep float32.
        super()._apply(lambda table: table.to(fn(table).device), recurse)  # type: ignore[no-untyped-call]
        return self

    def row(self, t: int) -> NoiseLevel:
        return NoiseLevel(*(table[t] for table in self.rows))

    def level(self, t: Tensor, like: Tensor) -> NoiseLevel:
        """Return the levels of integers t (B,) in [-1, T - 1], as (B, 1, ..., 1) to broadcast against `like`."""
        return NoiseLevel(*(per_sample(table[t], like) for table in (self.alpha, self.sigma, self.time)))

    def transition(self, v: Tensor, like: Tensor) -> Transition:
        t = (v * self.num_steps).long()
        return Transition(self.level(t, like), self.level(t - 1, like), self.num_steps)

    def level_at(self, v: Tensor, like: Tensor) -> NoiseLevel:
        return self.level((v * self.num_steps).long(), like)

    def at(self, u: Tensor) -> list[NoiseLevel]:
        # Between rows, interpolate linearly in atan(sigma / alpha).
        index = u * self.num_steps
        row = index.round()
        is_row, row = row / self.num_steps == u, row.long()
        below = index.floor().clamp(max=self.num_steps - 1).long()
        angle, complement = (torch.lerp(x[below], x[below + 1], index - below) for x in (self._angle, self._complement))
        alpha = torch.where(is_row, self._alpha[row], complement.sin())
        sigma = torch.where(is_row, self._sigma[row], angle.sin())
        return [NoiseLevel(*level) for level in zip(alpha, sigma, u, strict=True)]

    def position(self, angle: Tensor) -> Tensor:
        above = torch.searchsorted(self._angle, angle).clamp(1, self.num_steps)
        start, stop = self._angle[above - 1], self._angle[above]
        # Rows near pure noise may have equal angles.
        fraction = torch.where(stop > start, (angle - start) / (stop - start), 1.0)
        return ((above - 1 + fraction) / self.num_steps).clamp(0, 1)

    def at_ratio(self, ratio: Tensor) -> NoiseLevel:
        norm = torch.hypot(torch.ones_like(ratio), ratio)
        return NoiseLevel(1 / norm, ratio / norm, self.position(ratio.atan()[None])[0])

    def log_snr_rate(self, time: Tensor) -> Tensor:
        return self.rate[(time * self.num_steps).round().long() - 1]


Curve = Callable[[Tensor], tuple[Tensor, Tensor]]
"""u in [0, 1], of any shape and dtype -> (alpha, sigma); see `src.diffusion.curves`."""


class ContinuousSchedule(nn.Module):
    """A curve of noise levels whose time is u, with `num_steps` transitions for the variational bound.

    The curve starts nearly clean, at u = 0. The last transition, and the last step of a sampler, end at clean data
    (Kingma et al. 2021, arXiv 2107.00630).
    """

    def __init__(self, curve: Curve, num_steps: int = 1000) -> None:
        super().__init__()
        if num_steps < 2:
            raise ValueError(f"schedule.num_steps={num_steps} must be at least 2; 1000 is usual")
        self.decoder_scale = 1.0
        self.curve = curve
        self.num_steps = num_steps
        self.first = 0.0

    def row(self, t: int) -> NoiseLevel:
        return CLEAN if t == -1 else self.at(torch.tensor([(t + 1) / self.num_steps], dtype=torch.float64))[0]

    def transition(self, v: Tensor, like: Tensor) -> Transition:
        # Round to multiples of 1 / num_steps, as in the code of Kingma et al. 2021.
        below = (v * self.num_steps).floor()
        t, s = (self._level(index / self.num_steps) for index in (below + 1, below))
        s = NoiseLevel(*(torch.where(below > 0, x, clean) for x, clean in zip(s, (1.0, 0.0, 0.0), strict=True)))
        t, s = (NoiseLevel(*(per_sample(x, like) for x in level)) for level in (t, s))
        return Transition(t, s, self.num_steps)

    def level_at(self, v: Tensor, like: Tensor) -> NoiseLevel:
        return NoiseLevel(*(per_sample(x, like) for x in self._level(v)))

    @torch.no_grad()
    def at(self, u: Tensor) -> list[NoiseLevel]:
        return [NoiseLevel(*level) for level in zip(*self._level(u), strict=True)]

    @torch.no_grad()
    def position(self, angle: Tensor) -> Tensor:
        return self._bisect(angle, 1.0)

    @torch.no_grad()
    def at_ratio(self, ratio: Tensor) -> NoiseLevel:
        (noisiest,) = self.at(torch.ones_like(ratio)[None])
        u = self._bisect(ratio.atan()[None], 1.0 if ratio <= noisiest.ratio else 2.0)
        return self.at(u)[0]

    def log_snr_rate(self, time: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            # At zero SNR the rate is infinite; use that of half a step earlier.
            u = time.clamp(max=1 - 0.5 / self.num_steps).requires_grad_()
            alpha, sigma = self.curve(u)
            (rate,) = torch.autograd.grad(2 * (sigma.log() - alpha.log()).sum(), u)
        return rate

    def _bisect(self, angle: Tensor, end: float) -> Tensor:
        """Return the positions (N,) in [0, end] of the angles (N,) by bisection of the monotone curve."""
        low, high = torch.zeros_like(angle), torch.full_like(angle, end)
        for _ in range(60):
            middle = (low + high) / 2
            alpha, sigma, _ = self._level(middle)
            # NaN counts as above: a curve may be undefined beyond u = 1.
            above = ~(torch.atan2(sigma, alpha) <= angle)
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2

    def _level(self, u: Tensor) -> NoiseLevel:
        return NoiseLevel(*self.curve(u), u)


def terminal_alpha_bar(schedule: Schedule) -> float:
    """Return alpha^2 / (alpha^2 + sigma^2) at the noisiest level, which is alpha_bar_T for tables."""
    noisiest = schedule.row(schedule.num_steps - 1)
    return (noisiest.alpha / noisiest.norm).square().item()


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, ..., 1) with the rank of `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))
