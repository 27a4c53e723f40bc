"""Networks: net(x (B, *data), time (B,)) -> (B, *data). Independent of schedules, losses and samplers."""
