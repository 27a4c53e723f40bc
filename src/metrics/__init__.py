"""Sample quality and memorisation: functions of features (N, F), and the extractors that make these of images.

Every figure is of a set of n samples against a reference; what needs distances or kernels goes through them in
chunks, so that memory grows with n alone and never with n^2.
"""
