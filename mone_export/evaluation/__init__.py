"""What a file is worth: measured on texts, in continuations, at tasks, in seconds and bytes.

`results` holds what `mone-eval` found, as values and as JSON; the other modules measure it.
"""
