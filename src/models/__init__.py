"""Networks: net(x (B, *data), time (B,)) -> (B, *data). They know no schedule, loss or sampler."""
