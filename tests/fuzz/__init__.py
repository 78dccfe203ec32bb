"""Bad inputs by the thousand: every command on files that were mutated at random.

mutations.py   what is done to text, JSON, YAML, pickles and archives
cases.py       which file of which kind, and the commands on it
child.py       one command in a process of its own, and what is wrong with its end
test_fuzz.py   some of each kind; python -m tests.fuzz [CASES] [SEED] for thousands
"""
