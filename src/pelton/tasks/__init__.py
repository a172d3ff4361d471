"""What is learned: data, labels, head, collator and metric.

settings        what a recipe says about a task
tables          rows of one file, each with the line it came from
splits          train, validation and test of a folder, a file, a hub name or a packaged set
columns         which columns hold the texts and the label
labels          names of classes and their ids
sampling        few examples a class; validation rows held back from training
streams         training rows that are read while training lasts
pictures        image files in folders, zip archives or cells
pixels          images become tensors, changed at random for training
classification  one of several classes for a text or a pair
intents         one of several intents for a text, or none
images          one of several classes for an image
check           what can be told of data before a run, and `findings`, what it found
metrics         accuracy, macro F1, F1
heads           mean pooling and a linear classifier on any encoder
causal          a language model's responses: instruction tuning, conversations, plain text
conversations   prompts and responses out of rows
templates       a format or a chat template makes one text of them
completions     rendered texts become tokens, cut, with the labels that are learned
packing         several examples in one sequence, none of which sees another
decoding        a language model judged on responses, or answering prompts
answers         extractive question answering: questions, windows, spans and squad are its parts
questions       questions about a context and their right answers, as SQuAD has them
windows         a question with its context, cut into overlapping windows
spans           the best spans of a context over its windows
squad           exact match and F1 by the official SQuAD formulas
seq2seq         a target text for each source text
"""
