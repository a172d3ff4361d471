"""Which method is worth it: the same tasks, data sizes and seeds for every method.

protocol    what a cell trains: the tasks, the methods with their learning rates, the steps
grid        the cells of a benchmark, and which rate a method chose
journal     finished cells in an append-only file that several processes share
worker      trains one cell after another
statistics  means, ranks, a paired comparison
means       all of these as a table
sentences   what they mean, what is missing, what diverged
report      Markdown and CSV
plots       scores against data size, bars, radar
"""
