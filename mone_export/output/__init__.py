"""A model, its statistics and a plan in; a GGUF out.

importance.py    the pruned model's importance matrix, for rounding it
quantizing.py    which type llama-quantize would give to each tensor
packing.py       tensors rounded while they are written
splitting.py     in several files
restore_check.py is every expert that stayed the original's?
recombining.py   DERN, one layer at a time
thin_experts.py  experts with fewer channels, made when they are written
provenance.py    what a file says about how it was made
redoing.py       the command that made it, stated and read back
writing.py       write(): what each tensor becomes
rounding.py      what a type costs, tried on the model's own weights
"""
