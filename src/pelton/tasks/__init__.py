"""What is learned: data, labels, head, collator and metric; a kind of task is one file.

base            what a kind of task is
load            settings become a task and its splits; the table of kinds
settings        what a recipe says about any task

Kinds
classification  one of several classes for a text or a pair
regression      a number for a text or a pair
glue            GLUE's nine tasks, a row each
intents         one of several intents for a text, or none of them
tokens          one tag for each word; `tags` checks BIO
answers         answers as spans of a text; `questions`, `windows`, `spans` and `squad` are its parts
causal          a language model's responses; `conversations`, `templates`, `completions`, `packing` and `decoding`
running         running text, token by token; `vocabulary` learns a tokenizer, `blocks` cuts
seq2seq         a target text for each source text
images          one of several classes for an image; `pictures` finds files, `checked` decodes, `pixels` makes tensors
masked_images   what hidden patches of an image show; `hiding` says which are hidden
segmentation    a class for every pixel; `masks` reads and changes labels, `segmenters` is the head on any encoder

What they share
tables          rows of one file, each with the line it came from
splits          train, validation and test of a folder, a file, a hub name or a packaged set
columns         which columns hold the texts and the label
texts           texts and pairs: checked, tokenised, cut
labels          names of classes and their ids
sampling        few examples a class or in all; rows held back from training
streams         training rows that are read while training lasts
metrics         scores, by scikit-learn, SciPy and seqeval
heads           mean pooling and a linear classifier on any encoder
check           what can be told of data before a run; `findings` is what it found
"""
