"""What `tp_shm.py` is made of.

config      what one invocation does; presets
workloads   raw requests, and how one becomes arrays (photos: the real photographs)
strategies  the table of ways to get the arrays to every rank; one class each (collectives, naive, shm with in_place)
rank        a rank: what a strategy sees of it (gloo: its process group); tokenizer: the other kind of process
children    what both do alike; inputs: what both are given; records: what they tell of time
world       starts, commands, watches and ends those processes; counts CPU and memory from outside
session     the order in which things are measured; run: the command line
measure     from time stamps to figures
machine     where it ran, and the bounds there
report      tables, plot, targets
"""
