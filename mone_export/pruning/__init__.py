"""Statistics in, a decision out: pure functions, no model.

scoring.py    how much each expert matters
guard.py      which experts are never pruned; protecting.py: nor those that a text of its own needs
planning.py   which experts stay
allocation.py how many each layer keeps
novices.py    what stands in for the others
thinning.py   experts with fewer channels, fitted again; fates.py: whole, thin or a constant, by one budget
dern.py       what pruned experts can still give to the kept ones
damage.py     what a decision costs, estimated
"""
