"""Denoising diffusion models: trained with Lightning, configured with Hydra.

Conventions that hold everywhere:

- x_t = alpha_t x_0 + sigma_t eps. A noise *level* is the pair (alpha, sigma); SNR = alpha^2 / sigma^2.
- Code index t in {0..T-1} stands for the papers' step t + 1. The last row of every table is clean data,
  so that index -1 means "x_0": alpha[-1] = 1, sigma[-1] = 0.
- v = alpha eps - sigma x_0 (Salimans & Ho 2022). No formula assumes alpha^2 + sigma^2 = 1.
- Time lies in [0, 1]: (t + 1) / T for index t, 0 for clean data. It is all that a network sees of a level.
- Images are in [-1, 1] inside and uint8 at the edges. Shape letters: B batch, C channels, H W height and
  width, D features, T steps.
- Randomness enters as an argument; it belongs to (seed, step, position in the global batch), see `draws`.
"""
