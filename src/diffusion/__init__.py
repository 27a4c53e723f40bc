"""The mathematics of denoising diffusion. Imports torch and the standard library only."""
