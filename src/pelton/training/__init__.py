"""How it is learned: a recipe becomes a run.

recipe          what a recipe holds, and its values' laws; `sections` are its nested parts
loading         a shipped name or a YAML file, with overrides, becomes a recipe
feasible        what this adapter, task or machine cannot give, refused early
backbone        the pretrained model under its head, with the adapter attached; `unfrozen` trains it too
prepare         what a recipe names, found, loaded and checked
features        what the trainer learns from: in memory, in a mapped file, or streamed
batching        which examples come together, and in which order
optimizer       parameter groups: gates, methods, head and backbone; `depth` of each parameter
losses          class weights, focal loss, label smoothing; `anchor` is L2-SP
callbacks       progress bar, history, stopping between two steps
pruning         methods that go while training goes on; `contributions` weighs them
gate_callbacks  warm-up, penalties and temperature of gates
trackers        TensorBoard, Weights & Biases, MLflow, with histograms of gates
trainer         transformers' Trainer with all that, that stops on a loss which is no number
inference       a model over many examples, without gradients
folder          the files of a run
fit             trains, or goes on; evaluates; saves
run             a finished run: predict and evaluate
examine         `pelton data check`: data as a run would read it
"""
