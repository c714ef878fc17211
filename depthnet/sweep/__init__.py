"""Studies over hyperparameters: populations of networks, durable results."""
