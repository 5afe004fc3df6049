"""The demonstration behind `make demo`: the built-in model at half its experts, before and after, in a table.

Exports the demo model in full, with half of its experts as novices, and with half of them simply zero;
measures each on text that neither training nor calibration has seen; lets the novice model write a few lines.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from measuring import ask_perplexity
from mone_export import runtime
from mone_export.calibration.documents import builtin_documents
from mone_export.cli import main as mone_export
from mone_export.errors import MoneError

OUT = Path(__file__).resolve().parents[1] / "build" / "demo"
RATIO = "0.5"
N_CHUNK = 40  # of 512 tokens
PROMPT = 'def read_file(path):\n    """'

# name in the table, file, options that differ
VARIANTS: tuple[tuple[str, str, Sequence[str]], ...] = (
    ("full model", "full.gguf", ("--ratio", "0")),
    ("half of the experts are novices", "mone.gguf", ("--ratio", RATIO)),
    ("half of the experts are zero", "zero.gguf", ("--ratio", RATIO, "--novice", "zero")),
)


def main() -> int:
    """Export what is missing, measure, print the table and a sample; returns the exit status."""
    OUT.mkdir(parents=True, exist_ok=True)
    text = OUT / "held-out.txt"
    text.write_text("\n\n".join(_held_out(N_CHUNK * 512)), encoding="utf-8")
    print("\nfile size, experts kept per layer, and perplexity on text that was not used for calibration\n")
    print(f"{'':34}{'size':>9}  {'experts':>8}  {'perplexity':>10}")
    for name, file, options in VARIANTS:
        outfile = OUT / file
        arguments = ["demo", "-o", str(outfile), "--outtype", "f32", "--stats", str(OUT / "stats"), "-q"]
        if status := mone_export([*arguments, *options]):
            return status
        size = f"{outfile.stat().st_size / 1e6:.1f} MB"
        print(f"{name:34}{size:>9}  {_experts(outfile):>8}  {_perplexity(outfile, text):>10}", flush=True)
    print(f"\nthe novice model goes on from {PROMPT!r}:\n\n{_sample(OUT / 'mone.gguf')}\n")
    print(f"files in {OUT}; run them with $(mone-llama path)/llama-cli -m FILE")
    return 0


def _held_out(n_token: int) -> Iterator[str]:
    """Yield held-out documents until they hold about `n_token` tokens, at two characters or more each."""
    n_char = 0
    for document in builtin_documents("held-out"):
        yield document.text
        n_char += len(document.text)
        if n_char > 6 * n_token:
            return


def _experts(file: Path) -> str:
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
    options = ["-p", PROMPT, "-n", "60", "--temp", "0", "-no-cnv", "--no-display-prompt", "--simple-io"]
    command = [str(runtime.path() / "llama-completion"), "-m", str(file), *options]
    result = subprocess.run(
        command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
    )
    if result.returncode != 0:
        sys.exit(f"llama-completion failed:\n{result.stderr[-2000:]}")
    return PROMPT + result.stdout.rstrip()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MoneError as error:
        sys.exit(f"demo: {error}")
