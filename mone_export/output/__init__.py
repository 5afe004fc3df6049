"""A model, its statistics and a plan in; a GGUF out.

gguf_format.py   what a file adds to an ordinary GGUF
quantizing.py    llama-quantize
recombining.py   DERN, one layer at a time
provenance.py    what a file says about how it was made
writing.py       write(): what each tensor becomes
rounding.py      what a type costs, tried on the model's own weights
"""
