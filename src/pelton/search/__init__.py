"""Which configuration: architectures by gradients, and what each of their parts costs."""
