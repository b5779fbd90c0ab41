"""Engine steps compiled ahead of time, for machines that are not there, and what the compiler says of them.

What it is: named targets and models, the compile, and the reading of compiled programs: memory, collectives, work.
What it is not: the programs of a running engine (`loong_jax/programs.py`). `scripts/aot.py` is its command line.
"""
