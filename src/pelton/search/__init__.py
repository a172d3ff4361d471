"""Which configuration: studies over hyperparameters, and a recipe to start from."""
