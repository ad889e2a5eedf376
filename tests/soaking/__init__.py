"""Random kills under load: what `tests/soak.py` is made of.

One parent forks owners, readers, sweepers and groups of ranks, tells each what to do next, and kills or pauses them at
random. It knows what every one of them should see::

    board       a page that a process shares with its parent: where it is, and where to stop it
    link        messages between the two
    actors      what owners, readers and sweepers do       party     what the ranks of a group do
    ledger      who was promised what: when an attach has to succeed, and which bytes must not be reused
    census      what is in /dev/shm, in /proc/*/fd and mapped; is it the same late in the run as early
    herd        the processes: fork, end, pause, kill
    conductor   the parent
"""
