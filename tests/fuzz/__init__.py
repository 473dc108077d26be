"""Files as strangers may send them: a corpus of broken ones, and fuzz targets for every loader.

corpus.py     files that must be refused (or passed over), each with what is wrong with it
making.py     the pieces they are made of: a checkpoint with right hashes, a .npy header, …
targets.py    one function of bytes for each loader; what it lets through is a finding
limits.py     memory and time that a loader may take for a file of a given size
mutation.py   a plain byte mutator, for Pythons that have no atheris

``python -m tests.fuzz --minutes 10`` runs all of the targets.
"""
