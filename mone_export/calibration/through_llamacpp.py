"""stub"""

from typing import Any


class LlamaEngine:
    def __init__(self, *a: Any) -> None: ...
