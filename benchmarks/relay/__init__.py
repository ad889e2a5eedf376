"""What `sglang.py` is made of.

plan        what one invocation does: sizes, and the variants of both sides
engine      SGLang's own objects, as the tests against it make them
tokenizer   the tokenizer's process; rank: that of a tensor-parallel rank
world       starts, commands and ends the processes of one side; puts together what they tell; what they leave in /dev/shm
session     the order in which things are measured; from marks to figures
report      tables, bars, plot; run: the command line
"""
