"""Noise levels, the currency of every formula, and the two kinds of schedule that issue them.

A schedule is a curve u in [0, 1] -> (alpha, sigma), from clean data to noise. `NoiseSchedule` runs through the rows
of a table of betas and trains on these; `ContinuousSchedule` is given as functions and trains on all of it. Both
cut the curve into `num_steps` links, and whoever asks gets levels, links or grids and need not know which it is.
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Spacing = Literal["trailing", "leading", "linspace", "karras", "log_snr"]

# EDM's noisiest level and the bend of its grid (Karras et al. 2022, tab. 1).
MAX_RATIO = 80.0
KARRAS_RHO = 7.0


class DefaultSpacing(NamedTuple):
    """The spacings of a sampler where none is chosen, by the kind of schedule, as measured in docs/results.md."""

    table: Spacing
    """On a table of betas."""
    curve: Spacing
    """On a continuous schedule; one that ends in pure noise takes `trailing`, which alone starts there."""

    def on(self, schedule: "Schedule") -> Spacing:
        if isinstance(schedule, NoiseSchedule):
            return self.table
        return "trailing" if terminal_alpha_bar(schedule) == 0 else self.curve


class NoiseLevel(NamedTuple):
    """x = alpha x_0 + sigma eps. Fields are scalars, or (B, 1, ..., 1) to broadcast against data (B, *data).

    `time` in [0, 1] is what a network sees: (t + 1) / T for row t of a table, 0 for clean data. Scalars are float64
    on the CPU, which neither promote data nor wait for a device.
    """

    alpha: Tensor
    sigma: Tensor
    time: Tensor

    @property
    def snr(self) -> Tensor:
        """alpha^2 / sigma^2, in the fields' shape; infinite for clean data."""
        return (self.alpha / self.sigma).square()

    @property
    def ratio(self) -> Tensor:
        """sigma / alpha, EDM's sigma: infinite for pure noise."""
        return self.sigma / self.alpha

    @property
    def norm(self) -> Tensor:
        """sqrt(alpha^2 + sigma^2): the deviation of noised data whose own deviation is 1."""
        return torch.hypot(self.alpha, self.sigma)


class Transition(NamedTuple):
    """One of the `num_transitions` links of the chain, from level s to the noisier level t."""

    t: NoiseLevel
    s: NoiseLevel
    num_transitions: int


class Schedule(Protocol):
    """What a schedule issues.

    `first` is the position of its cleanest level that is not clean data. `decoder_scale` is the variance of the
    decoder p(x_0 | x_t) in units of (sigma / alpha)^2, that of x_0 given x_t alone.
    """

    num_steps: int
    first: float
    decoder_scale: float

    def row(self, t: int) -> NoiseLevel:
        """The noisier end of link t in [0, num_steps - 1], or clean data for -1, as scalars."""
        ...

    def transition(self, v: Tensor, like: Tensor) -> Transition:
        """The chain's links on which v (B,) in [0, 1) falls, as (B, 1, ..., 1) against `like` (B, *data).

        Link t, from row t to row t - 1, has the share [t / T, (t + 1) / T).
        """
        ...

    def level_at(self, v: Tensor, like: Tensor) -> NoiseLevel:
        """The levels on which v (B,) in [0, 1) falls, as (B, 1, ..., 1): of a table the links' noisier ends."""
        ...

    def at(self, u: Tensor) -> list[NoiseLevel]:
        """Scalar levels at positions u (N,) float64 in [0, 1]."""
        ...

    def position(self, angle: Tensor) -> Tensor:
        """The positions (N,) at which atan(sigma / alpha) takes these values (N,), float64."""
        ...

    def at_ratio(self, ratio: Tensor) -> NoiseLevel:
        """The scalar level at which sigma / alpha is `ratio`, a finite scalar, also beyond the noisiest level."""
        ...

    def log_snr_rate(self, time: Tensor) -> Tensor:
        """-d log SNR / d time at the levels of these times, in their shape."""
        ...


class TimeGrid(tuple[NoiseLevel, ...]):
    """The scalar levels that a sampler walks, noisiest first, clean data last, and the schedule they come from."""

    schedule: Schedule

    def __new__(cls, levels: Iterable[NoiseLevel], schedule: Schedule) -> "TimeGrid":
        grid = super().__new__(cls, levels)
        grid.schedule = schedule
        return grid

    def at_ratio(self, ratio: Tensor) -> NoiseLevel:
        """The level at which sigma / alpha is `ratio`, a finite scalar, also beyond the noisiest level."""
        return self.schedule.at_ratio(ratio.double())


CLEAN = NoiseLevel(*torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))


def make_time_grid(schedule: Schedule, steps: int, spacing: Spacing | DefaultSpacing = "trailing") -> TimeGrid:
    """`steps` + 1 levels for a sampler, noisiest first, clean data last; any number of steps >= 1.

    The first three names are those of Lin et al. (2305.08891, tab. 2), for positions on the curve:
    - trailing: from the noisiest down to clean in equal strides (never skips the noisiest row);
    - leading: multiples of 1 / steps up from the first row, which do not reach the last one;
    - linspace: from the last row to the first inclusive;
    - karras: uniform in (sigma / alpha)^(1/7) (EDM, 2206.00364, eq. 5), and
    - log_snr: uniform in log-SNR (Lu et al. 2022, DPM-Solver), both from 80, or from the noisiest level if that is
      less, to the first row.
    """
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, got {steps}: raise sampler.steps")
    if isinstance(spacing, DefaultSpacing):
        spacing = spacing.on(schedule)
    count = torch.arange(steps, dtype=torch.float64)
    fraction = count / max(steps - 1, 1)
    first = schedule.first
    match spacing:
        case "trailing":
            u = (steps - count) / steps  # exactly the rows' own positions where steps divides their number
        case "leading":
            # More steps than rows would overshoot the noisiest.
            u = first + min(1 / steps, (1 - first) / max(steps - 1, 1)) * (steps - 1 - count)
        case "linspace":
            u = 1 - (1 - first) * fraction
        case "karras" | "log_snr":
            noisiest, cleanest = schedule.at(torch.tensor([1.0, first], dtype=torch.float64))
            high, low = min(noisiest.ratio.item(), MAX_RATIO), cleanest.ratio.item()
            if spacing == "karras":
                bend = 1 / KARRAS_RHO
                ratio = (high**bend + fraction * (low**bend - high**bend)).pow(KARRAS_RHO)
            else:
                ratio = torch.exp(math.log(high) + fraction * (math.log(low) - math.log(high)))
            u = schedule.position(ratio.atan()).clamp(first, 1)
        case _:
            raise ValueError(
                f"unknown spacing {spacing!r}: choose trailing, leading, linspace, karras or log_snr (sampler.spacing)"
            )
    return TimeGrid([*schedule.at(u), CLEAN], schedule)


class NoiseSchedule(nn.Module):
    """The T levels of a chain with betas (T,) in (0, 1], and clean data as last row, so that index -1 is x_0.

    alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar) (Ho et al. 2020, eq. 4). Derived in float64; kept so on the
    CPU, and in float32 in buffers that no checkpoint stores and no change of precision touches.
    """

    alpha: Tensor
    sigma: Tensor
    time: Tensor
    rate: Tensor

    def __init__(self, betas: Tensor) -> None:
        super().__init__()
        betas = betas.double()
        if not (betas.min() > 0 and betas.max() <= 1):
            raise ValueError(
                f"betas must lie in (0, 1], got [{betas.min():.4g}, {betas.max():.4g}]: change the schedule's ends"
            )
        self.num_steps = len(betas)
        self.first = 1 / self.num_steps
        # The posterior's variance at t = 2 stands in for that at t = 1, which is 0 (Ho et al. 2020, sec. 3.2, as in
        # their code): (1 - alpha_bar_1) / (1 - alpha_bar_2) beta_2.
        b1, b2 = betas[0].item(), betas[min(1, len(betas) - 1)].item()
        self.decoder_scale = (1 - b1) * b2 / (b1 + b2 - b1 * b2)
        self.betas = betas
        # log1p and expm1: 1 - alpha_bar, taken plainly, loses the digits of the first steps.
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
            raise ValueError(f"a table needs at least 2 betas below 1, got {len(finite)}: add steps to schedule.betas")
        (rate,) = torch.gradient(-finite, spacing=1 / self.num_steps)
        # Where log-SNR is infinite, at pure noise and clean data, the rate is that of the next row where it is not.
        rate = torch.cat([rate, rate[-1:].expand(self.num_steps - len(rate)), rate[:1]])
        self.register_buffer("rate", rate.float(), persistent=False)
        # Clean data first here, so that the position rises with the noise.
        alpha, sigma = rows[0].roll(1), rows[1].roll(1)
        self._alpha, self._sigma, self._angle = alpha, sigma, torch.atan2(sigma, alpha)
        # What the angle lacks of pi / 2: near pure noise its digits are those of alpha, which the angle rounds away.
        self._rest = torch.atan2(alpha, sigma)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NoiseSchedule":
        # The tables follow the network to its device, but not to a lower precision.
        super()._apply(lambda table: table.to(fn(table).device), recurse)  # type: ignore[no-untyped-call]
        return self

    def row(self, t: int) -> NoiseLevel:
        return NoiseLevel(*(table[t] for table in self.rows))

    def level(self, t: Tensor, like: Tensor) -> NoiseLevel:
        """The levels of indices t (B,), integers in [-1, T - 1], as (B, 1, ..., 1) against `like` (B, *data)."""
        return NoiseLevel(*(per_sample(table[t], like) for table in (self.alpha, self.sigma, self.time)))

    def transition(self, v: Tensor, like: Tensor) -> Transition:
        t = (v * self.num_steps).long()
        return Transition(self.level(t, like), self.level(t - 1, like), self.num_steps)

    def level_at(self, v: Tensor, like: Tensor) -> NoiseLevel:
        return self.level((v * self.num_steps).long(), like)

    def at(self, u: Tensor) -> list[NoiseLevel]:
        """The rows themselves at their positions; between them interpolated in the angle atan(sigma / alpha)."""
        place = u * self.num_steps
        row = place.round()
        is_row, row = row / self.num_steps == u, row.long()
        below = place.floor().clamp(max=self.num_steps - 1).long()
        angle, rest = (torch.lerp(x[below], x[below + 1], place - below) for x in (self._angle, self._rest))
        alpha = torch.where(is_row, self._alpha[row], rest.sin())
        sigma = torch.where(is_row, self._sigma[row], angle.sin())
        return [NoiseLevel(*level) for level in zip(alpha, sigma, u, strict=True)]

    def position(self, angle: Tensor) -> Tensor:
        above = torch.searchsorted(self._angle, angle).clamp(1, self.num_steps)
        start, stop = self._angle[above - 1], self._angle[above]
        # Rows near pure noise may share an angle.
        fraction = torch.where(stop > start, (angle - start) / (stop - start), 1.0)
        return ((above - 1 + fraction) / self.num_steps).clamp(0, 1)

    def at_ratio(self, ratio: Tensor) -> NoiseLevel:
        """Beyond the noisiest row the time stays 1."""
        norm = torch.hypot(torch.ones_like(ratio), ratio)
        return NoiseLevel(1 / norm, ratio / norm, self.position(ratio.atan()[None])[0])

    def log_snr_rate(self, time: Tensor) -> Tensor:
        """Of rows, by the differences between their neighbors'."""
        return self.rate[(time * self.num_steps).round().long() - 1]


Curve = Callable[[Tensor], tuple[Tensor, Tensor]]
"""u in [0, 1], of any shape and precision -> (alpha, sigma); see `curves`."""


class ContinuousSchedule(nn.Module):
    """Levels anywhere on a curve (Kingma et al. 2021, VDM), its time being u; `num_steps` links for the bound.

    The curve's start is nearly clean; beyond it lies clean data, where the last link of every chain ends.
    """

    def __init__(self, curve: Curve, num_steps: int = 1000) -> None:
        super().__init__()
        if num_steps < 2:
            raise ValueError(f"num_steps must be at least 2, got {num_steps}: 1000 is usual (schedule.num_steps)")
        self.decoder_scale = 1.0
        self.curve = curve
        self.num_steps = num_steps
        self.first = 0.0

    def row(self, t: int) -> NoiseLevel:
        return CLEAN if t == -1 else self.at(torch.tensor([(t + 1) / self.num_steps], dtype=torch.float64))[0]

    def transition(self, v: Tensor, like: Tensor) -> Transition:
        # Both ends on the chain's grid, as VDM's code rounds its draws up (Kingma et al. 2021).
        below = (v * self.num_steps).floor()
        t, s = (self._level(place / self.num_steps) for place in (below + 1, below))
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
        """Beyond the noisiest level the curve is continued, and its time with it."""
        (noisiest,) = self.at(torch.ones_like(ratio)[None])
        u = self._bisect(ratio.atan()[None], 1.0 if ratio <= noisiest.ratio else 2.0)
        return self.at(u)[0]

    def log_snr_rate(self, time: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            # At zero SNR the rate is infinite: there it is that of half a step before.
            u = time.clamp(max=1 - 0.5 / self.num_steps).requires_grad_()
            alpha, sigma = self.curve(u)
            (rate,) = torch.autograd.grad(2 * (sigma.log() - alpha.log()).sum(), u)
        return rate

    def _bisect(self, angle: Tensor, end: float) -> Tensor:
        """The positions (N,) in [0, end] of these angles (N,), for which it is enough that the curve is monotone."""
        low, high = torch.zeros_like(angle), torch.full_like(angle, end)
        for _ in range(60):
            middle = (low + high) / 2
            alpha, sigma, _ = self._level(middle)
            # Where a curve has no values beyond 1, its end is the last position that has.
            above = ~(torch.atan2(sigma, alpha) <= angle)
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2

    def _level(self, u: Tensor) -> NoiseLevel:
        return NoiseLevel(*self.curve(u), u)


def terminal_alpha_bar(schedule: Schedule) -> float:
    """The share of the data's variance that is left at the noisiest level: alpha^2 / (alpha^2 + sigma^2)."""
    noisiest = schedule.row(schedule.num_steps - 1)
    return (noisiest.alpha / noisiest.norm).square().item()


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1), to broadcast against `like` (B, *data)."""
    return values.view(-1, *[1] * (like.ndim - 1))
