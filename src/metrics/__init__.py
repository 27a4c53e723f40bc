"""Metrics of sample quality and memorization as functions of features (N, F), and feature extractors for images.

Every metric compares n samples with a reference. Distances and kernels are computed in chunks, so memory grows with
n and not with n^2.
"""
