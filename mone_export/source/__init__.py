"""What a model is, and everything that is read of it.

checkpoint.py    open_source(): a name -> a Source; a folder in Hugging Face's form is one
gguf_file.py     a GGUF is another; gguf_header.py: what it holds; gguf_conversion.py: with fewer
                 experts; gguf_types.py: ggml's types, ggml.py: its packing; fingerprints.py: hashed once;
                 gguf_format.py: what a pruned file adds to an ordinary GGUF; pruned_before.py: read again
shape.py         config.json -> the mixture-of-experts shape, and what cannot be exported
substituted.py   checkpoints in which constants stand in for experts
weights.py       which files are the weights, and their fingerprint
hub.py           models on the Hugging Face Hub: small files, headers, weights
tokenizing.py    text -> token ids; gguf_tokenizing.py: by a GGUF's own tokenizer and template
remote_code.py   code that comes with a model does not run unasked
llamacpp.py      llama.cpp's converter; opened.py: the seam in it; naming.py: what the file is called;
                 prediction.py: blocks that predict further tokens; tracing.py: which matrix becomes which
"""

from mone_export.source.checkpoint import (
    DEMO,
    Checkpoint,
    Download,
    Rewriting,
    Source,
    inspect,
    open_source,
)
from mone_export.source.gguf_file import GgufFile

__all__ = ["DEMO", "Checkpoint", "Download", "GgufFile", "Rewriting", "Source", "inspect", "open_source"]
