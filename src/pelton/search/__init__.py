"""Which configuration: architectures by gradients, studies over hyperparameters, and a recipe to start from."""
