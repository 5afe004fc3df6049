"""Text through the model, every expert's statistics out.

documents.py    files, datasets, built-in text -> documents
corpus.py       documents -> rows of token ids
observer.py     the reading seam: one experts' forward pass for all families, which feeds the statistics
input_sums.py   what goes into matrices, for importance matrices; linear_inputs.py: into ordinary ones
ranks.py        several processes share the rows
work_folder.py  what is finished stays finished
streaming.py    decoder layers that come one at a time
expected.py     whether a checkpoint's tensors fit its config
loading.py      load(): the model, whole or layer by layer
passes.py       calibrate(): the rows through the model
channels.py     a second pass, for thin experts; channel_sums.py: what it adds up
masking.py      the loaded model as it would be after pruning
merging.py      merge(): statistics of several texts -> those of all together
stability.py    whether more text still changes the decision
usage.py        how much of the text each expert saw
"""
