"""A model folder, its statistics and a plan in; a GGUF out.

gguf_format.py   what a file adds to an ordinary GGUF
llamacpp.py      llama.cpp's own converter, opened at one seam
quantizing.py    llama-quantize
recombining.py   DERN, one layer at a time
writing.py       write(): what each tensor becomes
rounding.py      what a type costs, tried on the model's own weights
"""
