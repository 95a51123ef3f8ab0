"""Experience becomes gradients: agent, losses, returns, learner."""
