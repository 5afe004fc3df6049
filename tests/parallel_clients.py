"""Many clients of one llama-server at a time, held against the same questions asked one by one.

    python tests/parallel_clients.py MODEL [--seconds 600] [--clients 8]

A batch's composition may change how a sum is rounded, so a text may differ where two tokens are as good as
equally likely. An answer is wrong if it first differs at a token where the likeliest two of the serial run
were further apart than `TIE` nats.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from programs import Server, post, running_server

from mone_export import runtime

Answer = list[dict[str, Any]]  # of each token its id, and the likeliest two with their log probabilities

N_CLIENT = 8
TIE = 3e-3  # with the cache in F16; one of the questions has two tokens 1.04e-3 apart
TEXT = "Return the number of lines in each file of a folder, in order, or raise an error if there is none."
# words of the prompt: short, middling and long ones, so that prompts are read while others generate
N_WORD = (1, 3, 170, 12, 40, 300, 7, 90, 2, 210, 25, 60)
# (prompt, tokens to generate)
QUESTIONS = [
    (" ".join(itertools.islice(itertools.cycle(TEXT.split()), i, i + n)), 8 + 7 * i % 41)
    for i, n in enumerate(N_WORD)
]


class Tally(NamedTuple):
    """What came back: answers in all, how many differ at a tie, and what is wrong with the others."""

    n_answer: int
    n_tie: int
    wrong: list[str]


def measure(model: Path, *, seconds: float, n_client: int = N_CLIENT) -> Tally:
    """Ask one by one, then with `n_client` clients at a time for `seconds`."""
    with running_server(runtime.path(), "-m", model, *slots(n_client)) as server:
        expected = [ask(server, number) for number in range(len(QUESTIONS))]
        until = time.monotonic() + seconds
        with ThreadPoolExecutor(n_client) as pool:
            clients = [pool.submit(_client, server, number, until) for number in range(n_client)]
            answers = [answer for client in clients for answer in client.result()]
    return judged(answers, expected)


def slots(n_client: int) -> tuple[object, ...]:
    """Return llama-server's options for so many clients; no answer comes from what was asked before."""
    return "-np", n_client, "-c", n_client * 768, "--no-cache-prompt"


def judged(answers: Sequence[tuple[int, Answer]], expected: Sequence[Answer]) -> Tally:
    """Hold answers, each with the number of its question, against those of the serial run."""
    differing = [(number, answer) for number, answer in answers if tokens(answer) != tokens(expected[number])]
    wrong = [
        f"question {number}: {tokens(answer)} instead of {tokens(expected[number])}"
        for number, answer in differing
        if not differs_at_tie(answer, expected[number])
    ]
    return Tally(len(answers), len(differing) - len(wrong), wrong)


def ask(server: Server, number: int) -> Answer:
    """Return the answer's tokens, each with the likeliest two and their log probabilities."""
    prompt, n_predict = QUESTIONS[number]
    body = {"prompt": prompt, "n_predict": n_predict, "temperature": 0, "n_probs": 2, "ignore_eos": True}
    answer: Answer = post(f"{server.url}/completion", body)["completion_probabilities"]
    assert len(answer) == n_predict, answer
    return answer


def tokens(answer: Answer) -> list[int]:
    """Return an answer's token ids."""
    return [token["id"] for token in answer]


def differs_at_tie(answer: Answer, expected: Answer) -> bool:
    """Say whether the first token that differs is the second best of two that are equally likely."""
    for found, wanted in zip(answer, expected, strict=True):
        if found["id"] != wanted["id"]:
            best, second = wanted["top_logprobs"][:2]
            return bool(found["id"] == second["id"] and best["logprob"] - second["logprob"] < TIE)
    raise AssertionError("the answers are equal")


def _client(server: Server, number: int, until: float) -> list[tuple[int, Answer]]:
    """Ask one question after the other, each client from another start, until the time is up."""
    answers = []
    for question in itertools.islice(itertools.cycle(range(len(QUESTIONS))), number, None):
        answers.append((question, ask(server, question)))
        if time.monotonic() > until:
            return answers
    raise AssertionError("the cycle does not end")


def main() -> int:
    """Run it on a file; 1 if an answer is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=N_CLIENT)
    args = parser.parse_args()
    tally = measure(args.model, seconds=args.seconds, n_client=args.clients)
    print(*tally.wrong[:10], sep="\n")
    print(f"{tally.n_answer} answers, {tally.n_tie} differ at a tie, {len(tally.wrong)} are wrong")
    return 1 if tally.wrong or not tally.n_answer else 0


if __name__ == "__main__":
    raise SystemExit(main())
