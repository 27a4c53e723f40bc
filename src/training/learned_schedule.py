"""Train a noise schedule together with the network."""

from typing import Any

from torch import Tensor, nn

from src.diffusion.noise import Transition
from src.training.module import DiffusionModule


class LearnedScheduleModule(DiffusionModule):
    """A DiffusionModule whose schedule has parameters, trained to minimize the variance of the bound.

    In continuous time the bound's mean does not depend on the schedule's shape. Raises ValueError unless the loss is
    the bound. Source: Kingma et al. 2021 (arXiv 2107.00630), sec. 5.1 and 5.3.
    """

    def find_weights(self) -> None:
        assert isinstance(self.schedule, nn.Module)
        self.curve_weights = tuple(self.schedule.parameters())
        curve = {id(p) for p in self.curve_weights}
        self.weights = tuple(p for p in self.parameters() if p.requires_grad and id(p) not in curve)

    def compute_losses(
        self, x0: Tensor, transition: Transition, eps: Tensor, cond: Tensor | None, augment: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Also minimize the mean square of the losses over the schedule, in the network's backward pass.

        The gradient of the square is 2 loss times the gradient of the loss. The cleanest of the `num_steps` steps is
        held fixed, as in VDM: only the KL terms depend on the endpoint, and the decoder's term would outweigh them.
        """
        terms = super().compute_losses(x0, transition, eps, cond, augment)
        losses = terms["loss"].detach()
        for level in (transition.t, transition.s):
            learns = level.time > 1.5 / self.schedule.num_steps

            def scale(gradient: Tensor, learns: Tensor = learns) -> Tensor:
                return 2 * losses.view_as(gradient) * learns * gradient

            for field in level:
                if field.requires_grad:
                    field.register_hook(scale)  # type: ignore[no-untyped-call]
        return terms

    def parameter_groups(self) -> list[dict[str, Any]]:
        # Weight decay would pull the schedule towards the curve with all parameters 0, which is not preferable.
        return [*super().parameter_groups(), {"params": list(self.curve_weights), "weight_decay": 0.0}]

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Clip the schedule separately from the network: its gradients have another magnitude."""
        return super().clip_grad_norm(max_norm) + nn.utils.clip_grad_norm_(self.curve_weights, max_norm)

    def check_loss(self) -> dict[str, Tensor]:
        terms = super().check_loss()
        if terms.get("vlb") is not terms["loss"]:
            raise ValueError("schedule=learned needs the variational bound: set loss=vlb, or choose another schedule")
        return terms


def module_class(schedule: object) -> type[DiffusionModule]:
    """Return the LightningModule class that trains with this schedule."""
    learned = isinstance(schedule, nn.Module) and any(True for _ in schedule.parameters())
    return LearnedScheduleModule if learned else DiffusionModule
