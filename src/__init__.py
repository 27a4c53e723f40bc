"""Denoising diffusion models, trained with Lightning and configured with Hydra.

Conventions:

- x_t = alpha_t x_0 + sigma_t eps. A noise level is the pair (alpha, sigma); SNR = alpha^2 / sigma^2.
- Code index t in {0..T-1} stands for the papers' step t + 1. The last row of every table is clean data,
  so index -1 means x_0: alpha[-1] = 1, sigma[-1] = 0.
- v = alpha eps - sigma x_0 (Salimans & Ho 2022). No formula assumes alpha^2 + sigma^2 = 1.
- Time is in [0, 1]: (t + 1) / T for index t, 0 for clean data. A network receives the noise level only as time.
- Images are in [-1, 1] inside and uint8 at the edges. Shape letters: B batch, C channels, H height, W width,
  D features, T steps.
- Randomness is an argument, keyed by (seed, purpose, step, position in the global batch); see `rng`.
"""

import sys

__version__ = "0.1.0"
NAME = "denoising-diffusion-lab"

COMMANDS = ("compare", "dashboard", "doctor", "ema", "evaluate", "export", "sample", "schedules", "train")
"""The modules that are commands."""


if sys.argv[:1] == ["-m"]:  # only while Python looks for the module of `python -m`
    # sys.orig_argv has Python's options, -m, the module, and then the words that follow in sys.argv.
    _module = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)].removeprefix("-m")
    if _module.partition(".")[0] == __name__:  # the user's package may import this one
        from src.distributed.ranks import end_on_ctrl_c
        from src.errors import check_command

        check_command(_module, COMMANDS)
        end_on_ctrl_c()
