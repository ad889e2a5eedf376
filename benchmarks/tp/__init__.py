"""What `tp_shm.py` is made of.

config      what one invocation does; presets
workloads   raw requests, and how one becomes arrays (photos: the real photographs)
strategies  the table of ways to get the arrays to every rank; one class each (collectives, naive, shm with in_place,
            sockets, casting: with a `Caster`, with a cache; background: asynchronous ones in batches)
rank        a rank: what a strategy sees of it (gloo: its process group); tokenizer: the other kind of process
process     a rank's process; children: what all processes do alike; inputs: what they are given; records: what they
            tell of time; contents: what a rank has read, and whether it is right
world       starts, commands, watches and ends those processes; counts CPU and memory from outside
session     the order in which things are measured; run: the command line
repeats     which requests repeat an earlier one, and what an exact cache makes of them
measure     from time stamps to figures
machine     where it ran, and the bounds there
report      tables, plot, targets; counted_report: what strategies have counted themselves

Streams of requests, instead of batches:
arrivals    what comes when, what fails and what is cancelled
engine      the loop of a rank, one iteration a decode tick; wire: its own broadcast
servers     what the loop asks of a strategy (pools: asynchronous ones over the process group; casters: shmcast's;
            jobs: what those are given)
stream      the order in which things are measured; stream_measure, stream_report: as above
"""
