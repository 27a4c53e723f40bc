"""Noise levels, the currency of every formula, and the schedule that issues them."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Spacing = Literal["trailing", "leading", "linspace", "karras"]

# EDM's noisiest level and the bend of its grid (Karras et al. 2022, tab. 1).
KARRAS_MAX_RATIO = 80.0
KARRAS_RHO = 7.0


class Level(NamedTuple):
    """x = alpha x_0 + sigma eps. Fields are scalars, or (B, 1, ..., 1) to broadcast against data (B, *data).

    `time` in [0, 1] is what a network sees: (t + 1) / T for row t of a table, 0 for clean data.
    """

    alpha: Tensor
    sigma: Tensor
    time: Tensor

    @property
    def snr(self) -> Tensor:
        """alpha^2 / sigma^2, in the fields' shape; infinite for clean data."""
        return (self.alpha / self.sigma).square()


class NoiseSchedule(nn.Module):
    """The T levels of a chain with betas (T,) in (0, 1], and clean data as last row, so that index -1 is x_0.

    alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar) (Ho et al. 2020, eq. 4). Derived in float64, kept in
    `dtype` in buffers that no checkpoint stores and no change of precision touches.
    """

    alpha: Tensor
    sigma: Tensor
    time: Tensor

    def __init__(self, betas: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        betas = betas.double()
        if not (betas.min() > 0 and betas.max() <= 1):
            raise ValueError(
                f"betas must lie in (0, 1], got [{betas.min():.4g}, {betas.max():.4g}]: change the schedule's ends"
            )
        self.num_steps = len(betas)
        # log1p and expm1: 1 - alpha_bar, taken plainly, loses the digits of the first steps.
        log_alpha_bar = torch.log1p(-betas).cumsum(0)
        alpha = torch.exp(log_alpha_bar / 2)
        variance = -torch.expm1(log_alpha_bar)
        time = torch.arange(1, self.num_steps + 1, dtype=torch.float64) / self.num_steps
        for name, rows, clean in (("alpha", alpha, 1.0), ("sigma", variance.sqrt(), 0.0), ("time", time, 0.0)):
            table = torch.cat([rows, torch.tensor([clean], dtype=torch.float64)])
            self.register_buffer(name, table.to(dtype), persistent=False)
        # Posterior variance at t = 1 (DDPM eq. 7); the decoder p(x_0 | x_1) borrows it, since its own is 0.
        self.decoder_log_variance = math.log(betas[1] * variance[0] / variance[1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NoiseSchedule":
        # The tables follow the network to its device, but not to a lower precision.
        super()._apply(lambda table: table.to(fn(table).device), recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def terminal_alpha_bar(self) -> float:
        """alpha_bar at the noisiest row: what is left of the data's variance at the end of the chain."""
        return self.alpha[-2].cpu().double().square().item()

    def level(self, t: Tensor, like: Tensor) -> Level:
        """The levels of indices t (B,), integers in [-1, T - 1], as (B, 1, ..., 1) against `like` (B, *data)."""
        return Level(*(per_sample(table, t, like) for table in (self.alpha, self.sigma, self.time)))

    def grid(self, steps: int, spacing: Spacing = "trailing") -> list[Level]:
        """`steps` + 1 scalar levels for a sampler, noisiest first, clean data last; any number of steps >= 1.

        Positions on the axis of rows, where T - 1 is the noisiest and -1 is clean data; the names are those of
        Lin et al. (2305.08891, tab. 2), `karras` is uniform in (sigma / alpha)^(1/7) (EDM, 2206.00364, eq. 5),
        starting at 80 or at the schedule's noisiest row, whichever is less.
        - trailing: T - 1 down to clean in equal strides (never skips the noisiest row);
        - leading: multiples of T / steps from 0 up, which do not reach T - 1 for fewer than T steps;
        - linspace: from T - 1 to 0 inclusive.
        Levels between rows are interpolated in the angle atan(sigma / alpha), finite even at zero SNR.
        """
        if steps < 1:
            raise ValueError(f"a sampler needs at least 1 step, got {steps}: raise sampler.steps")
        count = torch.arange(steps, dtype=torch.float64)
        last = self.num_steps - 1
        match spacing:
            case "trailing":
                rows = self.num_steps * (1 - count / steps) - 1
            case "leading":
                # More steps than rows would overshoot the noisiest.
                rows = min(self.num_steps / steps, last / max(steps - 1, 1)) * (steps - 1 - count)
            case "linspace":
                rows = last * (1 - count / max(steps - 1, 1))
            case "karras":
                rows = self._karras_rows(count / max(steps - 1, 1))
            case _:
                raise ValueError(
                    f"unknown spacing {spacing!r}: choose trailing, leading, linspace or karras (sampler.spacing)"
                )
        return [*self._between(rows), Level(self.alpha[-1], self.sigma[-1], self.time[-1])]

    def _between(self, rows: Tensor) -> list[Level]:
        """Levels at fractional positions in [-1, T - 1], interpolated in angle and norm of (alpha, sigma)."""
        angle, norm = self._polar()
        below = rows.floor().clamp(max=self.num_steps - 2)
        weight = rows - below
        index = below.long() + 1  # the tables of _polar begin with clean data
        theta = torch.lerp(angle[index], angle[index + 1], weight)
        radius = torch.lerp(norm[index], norm[index + 1], weight)
        tables = radius * theta.cos(), radius * theta.sin(), (rows + 1) / self.num_steps
        return [Level(*level) for level in zip(*(table.to(self.alpha) for table in tables), strict=True)]

    def _karras_rows(self, fraction: Tensor) -> Tensor:
        """Rows at which sigma / alpha takes the values of EDM eq. 5, for fraction 0 (noisiest) to 1 (row 0)."""
        angle, _ = self._polar()
        high = min(math.tan(angle[-1].item()), KARRAS_MAX_RATIO) if angle[-1] < math.pi / 2 else KARRAS_MAX_RATIO
        low = math.tan(angle[1].item())
        bend = 1 / KARRAS_RHO
        target = (high**bend + fraction * (low**bend - high**bend)).pow(KARRAS_RHO).atan()
        above = torch.searchsorted(angle, target).clamp(1, self.num_steps)
        start, stop = angle[above - 1], angle[above]
        rows: Tensor = above - 2 + (target - start) / (stop - start)
        return rows.clamp(0, self.num_steps - 1)

    def _polar(self) -> tuple[Tensor, Tensor]:
        """Angle and norm of (alpha, sigma), float64 on the CPU, clean data first, then rows 0..T-1: (T + 1,)."""
        alpha, sigma = (table.cpu().double().roll(1) for table in (self.alpha, self.sigma))
        return torch.atan2(sigma, alpha), torch.hypot(alpha, sigma)


def per_sample(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """table[t] as (B, 1, ..., 1), to broadcast against `like` (B, *data)."""
    return table[t].view(-1, *[1] * (like.ndim - 1))
