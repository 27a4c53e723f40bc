"""Couple the noise of training with the samples by optimal transport within a batch.

The network regresses eps - x_0 at x_t, and the ODE with its mean as velocity moves the distribution of the noise to
that of the data for any joint distribution of x_0 and eps with these marginals (Tong et al. 2024, arXiv 2302.00482,
theorem 3.1; Pooladian et al. 2023, arXiv 2304.14772, sec. 3). A permutation of the noise of a batch keeps both
marginals, and the shortest assignment makes the paths straighter, so that fewer steps suffice. The rest of the theory
of diffusion assumes independent noise:

- E[eps | x_t] is no longer proportional to the score, which stochastic samplers and the reverse variance need.
- The variational bound is one of a forward process that adds independent noise.
- The noise depends on the batch's samples, and so on their conditions. Sampling with a condition starts from noise
  that does not (Cheng & Schwing 2025, arXiv 2503.10636).
- A schedule that ends above zero SNR would need to start from a mixture of noise and the sample that it belongs to.

So the coupling needs deterministic samplers, a loss without the bound, no conditions and a schedule that ends in pure
noise. The likelihood by the flow stays right: it is that of the ODE.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from src.diffusion.noise import Schedule, terminal_alpha_bar
from src.rng import StepRng


def coupled_noise(x0: Tensor, rng: StepRng) -> Tensor:
    """Return noise (B, *data) for x0 (B, *data), assigned within one forward pass of all processes. Collective.

    Every process draws the noise of all positions and computes the same assignment, so that the result does not depend
    on their number. With gradient accumulation each micro-batch is coupled separately.
    """
    parts, rank = [x0], 0
    if torch.distributed.is_initialized():
        parts, rank = gather_all_tensors(x0), torch.distributed.get_rank()
    before = sum(map(len, parts[:rank]))  # the processes have consecutive positions
    everywhere = replace(rng, start=rng.start - before, count=sum(map(len, parts)))
    eps = everywhere.normal("eps", x0.shape[1:])
    return eps[assign(torch.cat(parts), eps)[before : before + len(x0)]]


def assign(x0: Tensor, eps: Tensor) -> Tensor:
    """Return the permutation (N,) for which sum_i |x0_i - eps_permutation(i)|^2 is minimal; both are (N, *data).

    Only the inner products depend on the permutation. Takes O(N^3) operations in the worst case, on the CPU.
    """
    from scipy.optimize import linear_sum_assignment

    with torch.autocast(x0.device.type, enabled=False):  # bfloat16 would round the products, and numpy has no such type
        products = x0.float().flatten(1) @ eps.flatten(1).T
    _, columns = linear_sum_assignment(products.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(x0.device)


def check_coupling(schedule: Schedule, conditional: bool, estimates_bound: bool) -> None:
    """Raise ValueError for a model that optimal transport within batches would train wrongly."""
    setting = "data.coupling=ot"
    if terminal_alpha_bar(schedule) > 0:
        raise ValueError(f"{setting} needs a schedule that ends in pure noise; add schedule=rectified_flow")
    if conditional:
        raise ValueError(
            f"{setting} needs conditioning=null: the noise would depend on the condition; leave out one of them"
        )
    if estimates_bound:
        raise ValueError(
            f"{setting} needs a loss without the variational bound, which assumes other noise; set loss=simple"
        )
