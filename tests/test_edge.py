"""A novice file in the ways llama.cpp can run a model on small machines; docs/runtime.md lists them."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf_file
import numpy as np
import parallel_clients
import pytest
from programs import PROMPT, Completion, complete, post, run, running_rpc_server, running_server

from mone_export import runtime
from mone_export.pipeline import export

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bin_folder() -> Path:
    return runtime.path()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("edge")


@pytest.fixture(scope="module")
def novice_file(folder: Path, text: Path) -> Path:
    return exported(folder, text, "f32")


@pytest.fixture(scope="module")
def plain(bin_folder: Path, novice_file: Path) -> Completion:
    """What the file says with no options at all."""
    return complete(bin_folder, novice_file)


@pytest.fixture(scope="module")
def rpc_server(bin_folder: Path) -> Iterator[str]:
    with running_rpc_server(bin_folder) as server:
        yield server


def exported(folder: Path, text: Path, outtype: str, ratio: float = 0.5) -> Path:
    outfile = folder / f"{outtype}-{ratio}.gguf"
    options: dict[str, Any] = {"files": [text], "n_row": 16, "seq_len": 256, "stats": folder / "stats"}
    export("demo", ratio=ratio, outfile=outfile, outtype=outtype, **options)
    return outfile


@pytest.mark.parametrize(
    "options",
    [
        ("--load-mode", "mmap"),
        ("--load-mode", "none"),
        ("--no-warmup",),
        ("--n-cpu-moe", 3),
        ("--override-tensor", "exps=CPU"),
        ("--batch-size", 5, "--ubatch-size", 3),
    ],
    ids=str,
)
def test_options_change_no_word(
    options: tuple[object, ...], bin_folder: Path, novice_file: Path, plain: Completion
) -> None:
    assert len(plain.text) > 40
    assert complete(bin_folder, novice_file, *options).text == plain.text


def test_split_file_loads_and_merges(
    bin_folder: Path, novice_file: Path, plain: Completion, tmp_path: Path
) -> None:
    run(bin_folder / "llama-gguf-split", "--split-max-tensors", 16, novice_file, tmp_path / "part")
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) > 2
    assert complete(bin_folder, parts[0]).text == plain.text
    run(bin_folder / "llama-gguf-split", "--merge", parts[0], tmp_path / "merged.gguf")
    merged, original = gguf_file.read(tmp_path / "merged.gguf"), gguf_file.read(novice_file)
    assert merged.tensors.keys() == original.tensors.keys()
    for name, tensor in original.tensors.items():
        merged_data = merged.tensors[name].data.reshape(
            tensor.data.shape
        )  # merging drops last dimensions of 1
        np.testing.assert_array_equal(merged_data, tensor.data)


@pytest.mark.parametrize(
    ("options", "experts_on"),
    [
        (("-ngl", 99), {"RPC0"}),
        (("-ngl", 3), {"RPC0", "CPU"}),
        (("-ngl", 99, "--load-mode", "none"), {"RPC0"}),
        (("-ngl", 99, "--n-cpu-moe", 2), {"RPC0", "CPU"}),
        (("-ngl", 99, "--cpu-moe"), {"CPU"}),
        (("-ngl", 99, "--override-tensor", r"blk\.[02]\.ffn_.*_exps=CPU"), {"RPC0", "CPU"}),
    ],
    ids=lambda given: " ".join(map(str, sorted(given, key=str))),
)
def test_two_processes_share_a_model(
    options: tuple[object, ...],
    experts_on: set[str],
    bin_folder: Path,
    novice_file: Path,
    plain: Completion,
    rpc_server: str,
) -> None:
    found = complete(bin_folder, novice_file, "--rpc", rpc_server, *options)
    assert found.experts_on == experts_on
    assert found.text == plain.text


def test_rpc_server_without_the_patches_is_not_given_experts(
    bin_folder: Path, novice_file: Path, plain: Completion
) -> None:
    stock = runtime.build(patched=False, targets=("ggml-rpc-server",)).bin
    with running_rpc_server(stock) as server:
        found = complete(bin_folder, novice_file, "--rpc", server, "-ngl", 99)
    assert "RPC0" in found.log
    assert found.experts_on == {"CPU"}
    assert found.text == plain.text


def test_draft_model_changes_no_word(bin_folder: Path, novice_file: Path, folder: Path, text: Path) -> None:
    question = {"prompt": PROMPT, "n_predict": 64, "temperature": 0, "ignore_eos": True}
    draft = ("--spec-type", "draft-simple", "-md", exported(folder, text, "f32", ratio=0.75))
    with running_server(bin_folder, "-m", novice_file, "-c", 512) as server:
        expected = post(f"{server.url}/completion", question)
    with running_server(bin_folder, "-m", novice_file, "-c", 512, *draft) as server:
        found = post(f"{server.url}/completion", question)
    timings = found["timings"]
    print(f"{timings['draft_n_accepted']} of {timings['draft_n']} drafted tokens accepted", end=" ")
    assert timings["draft_n_accepted"] > 8
    assert found["content"] == expected["content"]


def test_lora_on_attention_is_the_merged_model(
    bin_folder: Path, novice_file: Path, plain: Completion, tmp_path: Path
) -> None:
    merged = tmp_path / "merged.gguf"
    shutil.copyfile(novice_file, merged)
    adapter = write_adapter(
        tmp_path / "adapter.gguf", merged, ["blk.0.attn_q.weight", "blk.2.attn_output.weight"]
    )
    found = complete(bin_folder, novice_file, "--lora", adapter)
    assert found.text == complete(bin_folder, merged).text
    assert found.text != plain.text


def test_lora_of_the_unpruned_model_on_experts_is_refused(
    bin_folder: Path, folder: Path, text: Path, novice_file: Path, tmp_path: Path
) -> None:
    unpruned = tmp_path / "unpruned.gguf"
    shutil.copyfile(exported(folder, text, "f32", ratio=0), unpruned)
    adapter = write_adapter(tmp_path / "adapter.gguf", unpruned, ["blk.0.ffn_down_exps.weight"])
    with pytest.raises(RuntimeError, match="has a wrong number of experts"):
        complete(bin_folder, novice_file, "--lora", adapter)


def write_adapter(adapter: Path, model: Path, names: list[str], *, rank: int = 4) -> Path:
    """Write a random LoRA for some tensors of an F32 model, and merge it into `model` itself."""
    from gguf import GGUFReader, GGUFWriter

    rng = np.random.default_rng(0)
    writer = GGUFWriter(adapter, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", rank)
    tensors = {tensor.name: tensor for tensor in GGUFReader(model, "r+").tensors}
    for name in names:
        weight = tensors[name].data
        *experts, n_out, n_in = weight.shape
        a = rng.normal(0, 0.05, (*experts, rank, n_in)).astype(np.float32)
        b = rng.normal(0, 0.5, (*experts, n_out, rank)).astype(np.float32)
        weight += b @ a
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return adapter


def test_prompt_cache_is_saved_and_restored(
    bin_folder: Path, novice_file: Path, plain: Completion, tmp_path: Path
) -> None:
    command = [
        bin_folder / "llama-completion",
        "-m",
        novice_file,
        "-c",
        512,
        "-p",
        PROMPT,
        "-n",
        48,
        "--temp",
        0,
    ]
    command += [
        "-no-cnv",
        "--no-display-prompt",
        "--simple-io",
        "-t",
        2,
        "--prompt-cache",
        tmp_path / "cache",
    ]
    first, second = run(*command), run(*command)
    assert "session file has exact match" not in first
    assert "session file has exact match" in second
    # the last token or two may be lost when the program ends before its log is flushed
    for output in (first, second):
        assert plain.text[:100] in output


def test_slot_is_saved_and_restored(bin_folder: Path, novice_file: Path, tmp_path: Path) -> None:
    question = {"prompt": PROMPT, "n_predict": 32, "temperature": 0, "id_slot": 0}
    options = ("-m", novice_file, "-c", 512, "-np", 1, "--slot-save-path", tmp_path)
    with running_server(bin_folder, *options) as server:
        expected = post(f"{server.url}/completion", question)
        saved = post(f"{server.url}/slots/0?action=save", {"filename": "slot.bin"})
    with running_server(bin_folder, *options) as server:
        restored = post(f"{server.url}/slots/0?action=restore", {"filename": "slot.bin"})
        assert restored["n_restored"] == saved["n_saved"] > 0
        found = post(f"{server.url}/completion", question)
    assert found["timings"]["cache_n"] > 0
    assert found["content"] == expected["content"]


@pytest.mark.nightly
def test_parallel_clients_get_the_answers_of_serial_ones(novice_file: Path) -> None:
    tally = parallel_clients.measure(novice_file, seconds=20)
    print(f"{tally.n_answer} answers, {tally.n_tie} differ at a tie", end=" ")
    assert not tally.wrong
    assert tally.n_answer > 2 * parallel_clients.N_CLIENT


def test_every_row_of_the_table_names_its_test() -> None:
    table = (ROOT / "docs" / "runtime.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", table))
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    assert named and not {name for name in named if f"def {name}(" not in tests}
