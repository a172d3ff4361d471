"""How it is learned: a recipe becomes a run.

recipe       what a recipe holds, and its values' laws
loading      a shipped name or a YAML file, with overrides, becomes a recipe
backbone     the pretrained model under its head, with the adapter attached
optimizer    parameter groups: gates, methods, head, backbone
callbacks    gate warm-up, progress bar, history, stopping between two steps
trainer      transformers' Trainer with those groups, that stops on a loss which is no number
folder       the files of a run
fit          trains, or goes on; evaluates; saves
run          a finished run: predict and evaluate
"""
