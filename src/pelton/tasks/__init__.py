"""What is learned: data, labels, head, collator and metric.

settings        what a recipe says about a task
tables          rows of one file, each with the line it came from
splits          train, validation and test of a folder, a file, a hub name or a packaged set
columns         which columns hold the texts and the label
labels          names of classes and their ids
sampling        few examples a class; validation rows held back from training
classification  the task itself: checked examples, encoded for a model
metrics         accuracy, macro F1, F1
heads           mean pooling and a linear classifier on any encoder
"""
