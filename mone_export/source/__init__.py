"""What a model is, and everything that is read of it.

checkpoint.py    open_source(): a name -> a Source; a folder in Hugging Face's form is one
shape.py         config.json -> the mixture-of-experts shape, and what cannot be exported
weights.py       which files are the weights, and their fingerprint
hub.py           models on the Hugging Face Hub: small files, headers, weights
tokenizing.py    text -> token ids; gguf_tokenizing.py: by a GGUF's own tokenizer and template
remote_code.py   code that comes with a model does not run unasked
llamacpp.py      llama.cpp's converter; opened.py: the seam in it; naming.py: what the file is called;
                 prediction.py: blocks that predict further tokens
"""

from mone_export.source.checkpoint import DEMO, Checkpoint, Download, Source, inspect, open_source

__all__ = ["DEMO", "Checkpoint", "Download", "Source", "inspect", "open_source"]
