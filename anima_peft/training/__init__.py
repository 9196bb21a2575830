"""Training: the flow's maths, optimizers, the loop, run state, tracking."""
