"""What `make demo` runs: the built-in model before and after half of its experts are pruned, in a table.

Exports the demo model in full, with half of its experts' bytes (whole, thin and constant ones), with half of
the experts as constants only, and with half of them simply zero; measures each on text that neither training
nor calibration has seen; lets two of them write a few lines.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from measuring import ask_perplexity
from mone_export import runtime
from mone_export.calibration.documents import builtin_documents
from mone_export.cli import main as mone_export
from mone_export.errors import MoneError
from mone_export.source import inspect

OUT = Path(os.path.relpath(Path(__file__).resolve().parents[1] / "build" / "demo"))
N_CHUNK = 40  # of 512 tokens
PROMPT = 'def read_file(path):\n    """'

# name in the table, file, options that differ; the one that a user would run shows its report
VARIANTS: tuple[tuple[str, str, Sequence[str]], ...] = (
    ("before: all experts", "full.gguf", ("--ratio", "0", "-q")),
    ("after: half of their bytes", "half.gguf", ("--ratio", "50%")),
    ("half are constants only", "constants.gguf", ("--ratio", "50%", "--novice", "least-squares", "-q")),
    ("for comparison: half are zero", "zero.gguf", ("--ratio", "50%", "--novice", "zero", "-q")),
)


def main() -> int:
    """Export, measure, print the table and two samples; returns the exit status."""
    OUT.mkdir(parents=True, exist_ok=True)
    spec = inspect("demo")
    print(
        f"The built-in model: {spec.n_layer} layers with {spec.n_expert} experts each, of which a token uses "
        f"{spec.top_k}. Half of their bytes go.\n"
    )
    for _, file, options in VARIANTS:
        arguments = ["demo", *options, "--outtype", "f32"]
        arguments += ["--stats", str(OUT / "stats"), "-o", str(OUT / file)]
        print(f"$ mone-export {shlex.join(arguments)}", flush=True)
        if status := mone_export(arguments):
            return status
        print()
    _print_table()
    print("\nA beginning of two lines, and what each goes on with:")
    for title, file in (("before", "full.gguf"), ("after", "half.gguf")):
        print(f"\n{title}:\n{_indented(_sample(OUT / file))}", flush=True)
    print(f"\nThe files are in {OUT}. To run one: activate .venv, then use the `run` line above.")
    return 0


def _print_table() -> None:
    """Measure the files, and print a line for each as it is done."""
    text = OUT / "held-out.txt"
    text.write_text("\n\n".join(_held_out(N_CHUNK * 512)), encoding="utf-8")
    print(f"Perplexity on {N_CHUNK * 512} tokens of text that no calibration has seen; lower is better:\n")
    print(f"{'':34}{'size':>9}  {'whole a layer':>16}  {'perplexity':>10}")
    for name, file, _ in VARIANTS:
        size = f"{(OUT / file).stat().st_size / 1e6:.1f} MB"
        print(
            f"{name:34}{size:>9}  {_experts(OUT / file):>16}  {_perplexity(OUT / file, text):>10}", flush=True
        )


def _held_out(n_token: int) -> Iterator[str]:
    """Yield held-out documents until they hold about `n_token` tokens, at two characters or more each."""
    n_char = 0
    for document in builtin_documents("held-out"):
        yield document.text
        n_char += len(document.text)
        if n_char > 6 * n_token:
            return


def _experts(file: Path) -> str:
    """Return how many experts the layers keep whole."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    n_expert = fields["llama.expert_count"].contents()
    kept = fields.get("llama.expert_kept_count")
    counts = [n or n_expert for n in kept.contents()] if kept else [n_expert]
    return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"


def _perplexity(file: Path, text: Path) -> str:
    # the running value after the last chunk, which comes before the final estimate
    found = ask_perplexity(runtime.path(), file, text, rf"\[{N_CHUNK}\]([\d.]+)", "--chunks", N_CHUNK)
    return f"{float(found[1]):.2f}"


def _sample(file: Path) -> str:
    """Return the prompt and what a model most likely says next."""
    options = ["-p", PROMPT, "-n", "60", "--temp", "0", "-no-cnv", "--no-display-prompt", "--simple-io"]
    command = [str(runtime.path() / "llama-completion"), "-m", str(file), *options]
    result = subprocess.run(
        command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
    )
    if result.returncode != 0:
        sys.exit(f"llama-completion failed:\n{result.stderr[-2000:]}")
    return PROMPT + result.stdout.rstrip()


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MoneError as error:
        sys.exit(f"demo: {error}")
